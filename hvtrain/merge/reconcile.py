"""`hvtrain merge --reconcile`: from LoRAs and a few dozen clips of what each was trained on to
changes that keep them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.config import ReconcileConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.generate.conditions import encode_texts
from hvtrain.lorafiles.files import STALE
from hvtrain.lorafiles.overlap import Contribution, by_layer, labels
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.runs import CONFIG
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge.changes import ByLayer, Change, Full, LowRank, low_rank
from hvtrain.merge.distill import Draw, Polish, distill
from hvtrain.merge.evaluate import compute_dtype
from hvtrain.merge.fit import STUDENT, device_bytes, fit_block, push, streams, targets_of
from hvtrain.merge.inputs import Inputs, expert_of, learning_rate
from hvtrain.merge.journal import Journal
from hvtrain.merge.policies import Dense, Result
from hvtrain.merge.report import Report
from hvtrain.merge.states import Clips, NoisyClip, Task, batches, fidelity, leak, measure, spread
from hvtrain.merge.stream import Streamed
from hvtrain.merge.write import signature
from hvtrain.models.load import Identified
from hvtrain.models.spec import Flavor
from hvtrain.parallel.context import ParallelContext
from hvtrain.slices.plan import FILE, save_plan
from hvtrain.train.calibration import CALIBRATION
from hvtrain.train.data import open_shards
from shards.atomic import write_text
from shards.edit import pick

KEEP = "keep"
SUM = "sum"
WORSE = 0.1  # of a mean distance: what distill may cost one LoRA for the others' and keep's sake
LEFT = 64  # samples that a merge leaves of each set
UNTOLD = 1e-3  # learning rate of distill where no LoRA says its own


def sources(cfg: ReconcileConfig, inputs: Inputs) -> list[tuple[str, int, list[str]]]:
    """(name, number of the LoRA, its sets) of each task, before anything heavy is read. Raises
    ConfigError."""
    loras = [lora for lora, _ in inputs.loras]
    names = labels(inputs.loras)
    if cfg.samples and len(cfg.samples) != len(loras):
        raise ConfigError(
            f"reconcile.samples: {len(cfg.samples)} sets for {len(loras)} LoRAs; give one for each, in order"
        )
    found: list[tuple[str, int, list[str]]] = []
    for number, lora in enumerate(loras):
        place = Path(cfg.samples[number]) if cfg.samples else left_beside(lora.path)
        if not place.is_dir():
            raise ConfigError(
                f"{lora.path}: nothing says what it was trained on: no {place}; train with data.calibration, "
                "or name a shard set of its data for each LoRA with --samples"
            )
        parts = {
            p.name: [str(p)]
            for p in sorted(place.iterdir()) if (p / "manifest.json").is_file() and p.name != KEEP
        }
        if (place / "manifest.json").is_file():
            found.append((names[number], number, [str(place)]))
        elif parts:  # of a LoRA that is a merge itself: what each of its own LoRAs left
            found += [(f"{names[number]}/{part}", number, sets) for part, sets in parts.items()]
        else:
            raise ConfigError(f"{place}: no shard set; `hvtrain encode` and `hvtrain shards split` make some")
    return found


def left_beside(path: Path) -> Path:
    """What training or merging left for a merge: NAME-calibration/ or calibration/ beside the LoRA."""
    own = path.with_name(f"{path.stem}-{CALIBRATION}")
    return own if own.is_dir() else path.with_name(CALIBRATION)


def kept_sets(cfg: ReconcileConfig, inputs: Inputs) -> list[str]:
    """What the base knows: as given, else as earlier merges among the LoRAs left it."""
    if cfg.keep or cfg.samples:
        return list(cfg.keep)
    left = [left_beside(lora.path) / name for lora, _ in inputs.loras for name in (KEEP, f"{KEEP}.txt")]
    return [str(place) for place in left if place.is_file() or (place / "manifest.json").is_file()]


def leave_calibration(cfg: ReconcileConfig, inputs: Inputs, output: Path) -> Path:
    """NAME-calibration/ beside a merged LoRA: with it and this file, LoRAs can be added to the merge
    later."""
    root = output.with_name(f"{output.stem}-{CALIBRATION}")
    for number, (name, _, sets) in enumerate(sources(cfg, inputs), start=1):
        pick(sets, root / f"{number:02d}-{Path(name).stem}", LEFT)
    sets, files = _sets_and_files(kept_sets(cfg, inputs))
    if sets:
        pick(sets, root / KEEP, LEFT * len(inputs.loras) // 2)
    if files:
        write_text(root / f"{KEEP}.txt", "".join(f"{line}\n" for line in _captions(files)))
    return root


def _sets_and_files(places: Sequence[str]) -> tuple[list[str], list[str]]:
    return [p for p in places if Path(p).is_dir()], [p for p in places if not Path(p).is_dir()]


def _captions(files: Sequence[str]) -> list[str]:
    lines = [line.strip() for file in files for line in Path(file).read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ConfigError(f"keep: {', '.join(files)}: no captions in it; write one a line")
    return [line for line in lines if line]


@dataclass(frozen=True)
class Wanted:
    """What the merge is to become."""

    output: Path
    whole: bool  # matrices, not pairs
    rank: int | None  # of the pairs; None: ranks add up
    seed: int
    about: str  # whatever else makes it another merge than one that was begun before
    expert: str | None = None  # which the model is, of several, as the user says


@dataclass(frozen=True)
class Reconciled:
    """The changes by layer, and what is on the disk of them until the output is written."""

    changes: dict[str, Result]
    journal: Journal


def reconcile(
    c: ReconcileConfig, inputs: Inputs, report: Report, found: Identified, ctx: ParallelContext,
    wanted: Wanted
) -> Reconciled:
    """The merge's changes; `report` gets the distances. Collective. Raises
    CheckpointError if a LoRA is lost."""
    dtype, built_on = compute_dtype(ctx.device), inputs.built_on()
    sets, files = _sets_and_files(kept_sets(c, inputs))
    levels = levels_of(c, found.flavor, inputs, wanted.expert)
    clips = Clips(found.spec, found.flavor, c.states, c.held_out, wanted.seed, levels)
    prompts = encode_texts(_captions(files), found.spec, found.flavor, c.text, ctx) if files else []
    model = Streamed(found, ctx, dtype, host_bytes=c.host_gb * 1e9)
    tasks = _tasks(c, inputs, found, clips)
    tasks += _kept(c, clips, sets, prompts, tasks, model)
    layers = by_layer(inputs.loras)
    solved: ByLayer = (every := _changes(layers))
    names = labels(inputs.loras)
    for number, under in enumerate(built_on):
        own = {names[i] for i in (number, *under)}
        model.changes.put(
            number, {module: [p for p in parts if p.owner in own] for module, parts in every.items()}
        )
    model.changes.put(SUM, solved)
    if c.own_states:
        clips.own_states(model.velocities, tasks, c.batch_size)
    measure(clips, model.velocities, tasks, c.batch_size)
    for task in tasks:
        if task.teacher is not None and not any(s.told for s in (*task.states, *task.held)):
            raise CheckpointError(
                f"{task.name}: changes nothing on its samples, so there is nothing to keep; leave it out"
            )
    report.summed = report.fidelity = fidelity(clips, model.velocities, tasks, SUM, c.batch_size)
    report.leak = leak(clips, model.velocities, tasks)
    journal = Journal(wanted.output, _signature(c, inputs, found, wanted.about))

    def judge() -> None:
        model.changes.sets[STUDENT] = {}
        model.changes.put(STUDENT, solved)
        report.fidelity = fidelity(clips, model.velocities, tasks, STUDENT, c.batch_size)

    if c.how in ("fit", "fit+distill"):
        rank = (lambda n: None) if c.how == "fit" and wanted.whole else (lambda n: min(n, wanted.rank or n))
        solved = {**solved, **_fit(c, model, solved, tasks, clips, rank, journal)}
        judge()
    if c.how in ("distill", "fit+distill"):
        lr = c.lr or learning_rate(inputs.loras) or UNTOLD
        pairs = {name: [p for p in own if isinstance(p, LowRank)] for name, own in solved.items()}
        before = _mean(report)
        draw = Draw(tasks, wanted.seed, c.new_noise)
        teachers = {t.teacher: model.changes.sets[t.teacher] for t in tasks if t.teacher is not None}
        polish = Polish(c.steps, lr, c.batch_size)
        solved = distill(found, ctx, dtype, pairs, draw, clips, teachers, polish, journal)
        judge()
        _refuse_worse(before, _mean(report), lr)
    for line in report.kept() if ctx.is_main else ():
        print(line, flush=True)
    _refuse_lost(c, report)
    return Reconciled(
        {name: _result(own, len(layers[name][0].pair.up)) for name, own in solved.items()}, journal
    )


def _mean(report: Report) -> float:
    away = [away for name, away in report.fidelity.items() if name != KEEP]
    return sum(away) / len(away)


def _refuse_worse(before: float, after: float, lr: float) -> None:
    if not after <= max(2 * before, before + WORSE):
        raise CheckpointError(
            f"distill took the merge further from its LoRAs (mean distance {after:.3g}, {before:.3g} before "
            f"it): its rate of {lr:g} is too high; give reconcile.lr={lr / 4:g}; nothing was written"
        )


def _refuse_lost(c: ReconcileConfig, report: Report) -> None:
    lost = [name for name, away in report.fidelity.items() if name != KEEP and not away <= c.lost]
    if lost and not c.allow_lost:
        raise CheckpointError(
            f"lost in the merge (further than reconcile.lost={c.lost:g} from what they do alone): "
            f"{', '.join(lost)}; give more reconcile.states or reconcile.steps, another --reconcile, "
            "reconcile.allow_lost=true, or --on-overlap sum to add up LoRAs that were only tried for a few "
            "steps; nothing was written"
        )


def levels_of(
    c: ReconcileConfig, flavor: Flavor, inputs: Inputs, name: str | None
) -> tuple[float, float]:
    """Of noise, on which the model predicts. Raises ConfigError."""
    if not flavor.experts:
        return 0.0, 1.0
    if (expert := expert_of(flavor, inputs, name)) is None:
        listed = " or ".join(expert.name for expert in flavor.experts)
        raise ConfigError(f"expert: the LoRAs do not say whose they are; give --expert {listed}")
    if c.own_states or _sets_and_files(kept_sets(c, inputs))[1]:
        raise ConfigError(
            f"reconcile: clips are sampled by {' and '.join(e.name for e in flavor.experts)} together, and "
            f"only '{expert.name}' is here: give shard sets in keep, and reconcile.own_states=false"
        )
    return expert.sigmas


def _tasks(c: ReconcileConfig, inputs: Inputs, found: Identified, clips: Clips) -> list[Task]:
    tasks = []
    for name, number, sets in sources(c, inputs):
        states, held = clips.states_of(open_shards(sets, found.flavor, key="--samples"), name)
        tasks.append(Task(name, number, 1.0, states, held))
    return tasks


def _kept(
    c: ReconcileConfig, clips: Clips, sets: Sequence[str], prompts: Sequence[Mapping[str, Tensor]],
    tasks: Sequence[Task], model: Streamed,
) -> list[Task]:
    """The base as the teacher of its own words: of sets, and of captions, in the size of the LoRAs' clips."""
    n, task = max(1, clips.n * len(tasks) // 4), Task(KEEP, None, c.keep_weight * len(tasks), [], [])
    if sets:
        task.states, task.held = clips.states_of(open_shards(sets, clips.flavor, key="--keep"), KEEP, n=n)
    if prompts:
        blank = torch.zeros_like(tasks[0].states[0].clean)
        made = [NoisyClip(blank, blank, 1.0, prompts[i % len(prompts)]) for i in range(n + clips.n_held)]
        own = Task(f"{KEEP} captions", None, 0.0, made[clips.n_held :], made[: clips.n_held])
        clips.own_states(model.velocities, [own], c.batch_size)
        task.states, task.held = task.states + own.states, task.held + own.held
    return [task] if task.states else []


def _signature(c: ReconcileConfig, inputs: Inputs, found: Identified, about: str) -> str:
    sets = [place for _, _, own in sources(c, inputs) for place in own] + kept_sets(c, inputs)
    places = [Path(place) / "manifest.json" if Path(place).is_dir() else Path(place) for place in sets]
    files = [*found.weights.files, *(lora.path for lora, _ in inputs.loras), *places]
    return signature(files, about)


def _changes(layers: Mapping[str, Sequence[Contribution]]) -> dict[str, list[LowRank]]:
    """Without those that change no row."""
    found = {module: [p for p in map(low_rank, own) if len(p.up)] for module, own in layers.items()}
    return {module: own for module, own in found.items() if own}


def _fit(
    c: ReconcileConfig, model: Streamed, layers: ByLayer, tasks: Sequence[Task], clips: Clips,
    rank: Callable[[int], int | None], journal: Journal,
) -> dict[str, list[Change]]:
    counts = {id(s): (t.teacher, s, w) for t, s, w in spread(tasks)}
    jobs = [
        (clips.input([s for _, s in job]), job[0][0], torch.tensor([counts[id(s)][2] for _, s in job]))
        for job in batches([(teacher, s) for teacher, s, _ in counts.values()], c.batch_size)
    ]
    ctx = model.ctx
    running = streams(model, jobs, journal.folder / "states")
    there, gone = (
        sum(s.n_bytes for s in running if (s.folder is None) == here) / 1e9 for here in (True, False)
    )
    said = (
        f"{there:.2g} GB of states in memory, {gone:.2g} GB on the disk, up to "
        f"{device_bytes(model, layers) / 1e9:.2g} GB for "
    )
    if ctx.is_main:
        each = f" of each of {ctx.world} processes" if ctx.world > 1 else ""
        print(
            f"fit: {len(counts)} noisy clips of {len(tasks)} sets; {said}a block's weights and sums{each}",
            flush=True
        )
    solved: dict[str, list[Change]] = {}
    began = time.monotonic()
    for number, names in enumerate(model.layers):
        parts = {
            name: [p for p in layers[name] if isinstance(p, LowRank)] for name in names if name in layers
        }
        targets = {name: targets_of(own, rank) for name, own in parts.items()}
        known = journal.load(number)
        with model.block(number) as block:
            if known is None and targets:
                found = fit_block(model, block, targets, running, c.ridge)
                if ctx.is_main:
                    journal.save(number, found)
                ctx.barrier()
            solved |= (own := journal.load(number) or {})
            model.changes.put(STUDENT, own)
            push(model, block, running)
        left = (time.monotonic() - began) / (number + 1) * (len(model.layers) - number - 1)
        done = "done before" if known else f"{len(targets)} layers"
        if ctx.is_main:
            print(f"fit: block {number + 1} of {len(model.layers)}, {done}, {left:.0f} s left", flush=True)
    return solved


def _result(own: Sequence[Change], out: int) -> Result:
    """`out`: rows of the layer."""
    pairs = [p for p in own if isinstance(p, LowRank)]
    if len(pairs) < len(own):
        return Dense(lambda: _whole(own, out))
    ups = [F.pad(p.up, (0, 0, p.begin, out - p.begin - len(p.up))) for p in pairs]
    return [
        Contribution(p.owner or "merged", LoraPair(p.down, up, float(len(p.down))), 1.0) for p,
        up in zip(pairs, ups, strict=True)
    ]


def _whole(own: Sequence[Change], out: int) -> Tensor:
    parts = [(p.begin, p.matrix() if isinstance(p, Full) else p.up @ p.down) for p in own]
    total = torch.zeros(out, parts[0][1].shape[1])
    for begin, matrix in parts:
        total[begin : begin + len(matrix)] += matrix
    return total


def write_slices(output: Path, inputs: Inputs, changes: Mapping[str, Result]) -> Path | None:
    """Each slice of a plan as the merge has changed it, in NAME-slices/01, 02, ...: `--loraid` takes them as
    it takes the slices themselves. None where there is no plan, or other LoRAs beside it, or matrices that
    are nobody's."""
    if inputs.plan is None or len(inputs.loras) + len(inputs.missing) > inputs.plan.n:
        return None
    if any(isinstance(result, Dense) for result in changes.values()):
        return None
    root = output.with_name(f"{output.stem}-slices")
    for name, (lora, _) in zip(labels(inputs.loras), inputs.loras, strict=True):
        pairs = {
            m: c.pair for m,
            result in changes.items() if isinstance(result, list) for c in result if c.lora == name
        }
        number = f"{int(lora.metadata['ss_loraid']):02d}"
        kept = {key: value for key, value in lora.metadata.items() if not key.startswith(STALE)}
        (root / number).mkdir(parents=True, exist_ok=True)
        write_lora(root / number / f"slice-{number}.safetensors", pairs, metadata=kept)
        write_text(
            root / number / CONFIG, f"# made by `hvtrain merge --reconcile`\nrun: {{name: slice-{number}}}\n"
        )
    save_plan(inputs.plan, root / FILE)
    return root
