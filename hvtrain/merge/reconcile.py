"""`hvtrain merge --reconcile`: from LoRAs and a few dozen clips of what each was trained on to changes that keep them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hvtrain.config import MergeConfig, ReconcileConfig, asset
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.overlap import Contribution, by_layer, labels
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge.changes import ByLayer, Change, Full, LowRank, low_rank
from hvtrain.merge.distill import Draw, distill
from hvtrain.merge.evaluate import compute_dtype
from hvtrain.merge.fit import STUDENT, Solving, Target, fit_block, push, streams
from hvtrain.merge.inputs import Inputs
from hvtrain.merge.policies import Dense, Result
from hvtrain.merge.report import Report
from hvtrain.merge.states import Clips, Task, batches, fidelity, measure, spread
from hvtrain.merge.stream import Streamed
from hvtrain.models.load import Identified, identify
from hvtrain.parallel.context import start
from hvtrain.train.calibration import CALIBRATION
from hvtrain.train.setup import open_shards
from shards.edit import pick

KEEP = "keep"
SUM = "sum"
LEFT = 64  # samples that a merge leaves of each set


def sources(cfg: ReconcileConfig, inputs: Inputs) -> list[tuple[str, int, list[str]]]:
    """(name, number of the LoRA, its sets) of each task, before anything heavy is read. Raises ConfigError."""
    loras = [lora for lora, _ in inputs.loras]
    names = labels(inputs.loras)
    if cfg.samples and len(cfg.samples) != len(loras):
        raise ConfigError(f"reconcile.samples: {len(cfg.samples)} sets for {len(loras)} LoRAs; give one for each, in order")
    found: list[tuple[str, int, list[str]]] = []
    for number, lora in enumerate(loras):
        place = Path(cfg.samples[number]) if cfg.samples else left_beside(lora.path)
        if not place.is_dir():
            raise ConfigError(
                f"{lora.path}: nothing says what it was trained on: no {place}; train with data.calibration, or name a shard set "
                "of its data for each LoRA with --samples"
            )
        parts = {p.name: [str(p)] for p in sorted(place.iterdir()) if (p / "manifest.json").is_file() and p.name != KEEP}
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
    left = [left_beside(lora.path) / KEEP for lora, _ in inputs.loras] if not cfg.keep and not cfg.samples else []
    return [*cfg.keep, *(str(place) for place in left if (place / "manifest.json").is_file())]


def leave_calibration(cfg: ReconcileConfig, inputs: Inputs, output: Path) -> Path:
    """NAME-calibration/ beside a merged LoRA: with it and this file, LoRAs can be added to the merge later."""
    root = output.with_name(f"{output.stem}-{CALIBRATION}")
    for number, (name, _, sets) in enumerate(sources(cfg, inputs), start=1):
        pick(sets, root / f"{number:02d}-{Path(name).stem}", LEFT)
    if keep := kept_sets(cfg, inputs):
        pick(keep, root / KEEP, LEFT * len(inputs.loras) // 2)
    return root


def reconcile(cfg: MergeConfig, inputs: Inputs, report: Report) -> dict[str, Result]:
    """The changes by layer; `report` gets the distances. Raises CheckpointError if a LoRA is lost."""
    c = cfg.reconcile
    ctx = start(device=cfg.device)
    dtype = compute_dtype(ctx.device)
    found = identify(asset(cfg.dit), model=cfg.model, flavor=cfg.flavor)
    clips = Clips(found.spec, found.flavor, c.states, c.held_out, cfg.seed)
    tasks = _tasks(c, inputs, found, clips)
    model = Streamed(found, ctx, dtype)
    for number, one in enumerate(inputs.loras):
        model.changes.put(number, _changes(by_layer([one])))
    layers = by_layer(inputs.loras)
    solved: ByLayer = _changes(layers)
    model.changes.put(SUM, solved)
    if c.own_states:
        clips.own_states(model.velocities, tasks, c.batch_size)
    measure(clips, model.velocities, tasks, c.batch_size)
    report.summed = fidelity(clips, model.velocities, tasks, SUM, c.batch_size)
    if c.how in ("fit", "fit+distill"):
        whole = c.how == "fit" and cfg.target == "model"
        ranks = {name: cfg.rank or sum(p.pair.rank for p in own) for name, own in layers.items()}
        solved = {**solved, **_fit(c, model, layers, tasks, clips, {} if whole else ranks)}
    if c.how in ("distill", "fit+distill"):
        lr = c.lr or min(_rate_of(lora.metadata) for lora, _ in inputs.loras)
        solved = distill(found, ctx, dtype, _pairs(solved), Draw(tasks, cfg.seed), clips, c, lr=lr)
    model.changes.sets[STUDENT] = {}
    model.changes.put(STUDENT, solved)
    report.fidelity = fidelity(clips, model.velocities, tasks, STUDENT, c.batch_size)
    for line in report.kept():
        print(line, flush=True)
    lost = [name for name, away in report.fidelity.items() if name != KEEP and not away <= c.lost]
    if lost and not c.allow_lost:
        raise CheckpointError(
            f"lost in the merge (further than reconcile.lost={c.lost:g} from what they do alone): {', '.join(lost)}; give more "
            "reconcile.states or reconcile.steps, another --reconcile, or reconcile.allow_lost=true; nothing was written"
        )
    return _results(solved, layers)


def _tasks(c: ReconcileConfig, inputs: Inputs, found: Identified, clips: Clips) -> list[Task]:
    tasks = []
    for name, number, sets in sources(c, inputs):
        states, held = clips.states_of(open_shards(sets, found.flavor, key="--samples"), name)
        tasks.append(Task(name, number, 1.0, states, held))
    if keep := kept_sets(c, inputs):
        kept = open_shards(keep, found.flavor, key="--keep")
        states, held = clips.states_of(kept, KEEP, n=clips.n * len(tasks) // 4)
        tasks.append(Task(KEEP, None, c.keep_weight * len(tasks), states, held))
    return tasks


def _changes(layers: Mapping[str, Sequence[Contribution]]) -> dict[str, list[Change]]:
    return {module: [low_rank(c) for c in own] for module, own in layers.items()}


def _fit(
    c: ReconcileConfig, model: Streamed, layers: Mapping[str, Sequence[Contribution]], tasks: Sequence[Task], clips: Clips,
    ranks: Mapping[str, int],
) -> dict[str, list[Change]]:
    jobs = []
    every = list(spread(tasks))
    counts = {id(s): w for _, s, w in every}
    for job in batches([(t.teacher, s) for t, s, _ in every], c.batch_size):
        weights = torch.tensor([counts[id(s)] for _, s in job])
        jobs.append((clips.input([s for _, s in job]), job[0][0], weights))
    running = streams(model, jobs)
    solved: dict[str, list[Change]] = {}
    solving = Solving(c.ridge, lambda name: ranks.get(name))
    for number, names in enumerate(model.layers):
        targets = {name: _target(layers[name]) for name in names if name in layers}
        with model.block(number) as block:
            if targets:
                found = fit_block(model, block, targets, running, solving)
                solved |= {name: [change] for name, change in found.items()}
            push(model, block, running)
        print(f"fit: block {number + 1} of {len(model.layers)}, {len(targets)} layers", flush=True)
    return solved


def _target(own: Sequence[Contribution]) -> Target:
    parts = [low_rank(c) for c in own]
    begin, end = min(p.begin for p in parts), max(p.begin + len(p.up) for p in parts)

    def prior() -> torch.Tensor:
        total = torch.zeros(end - begin, parts[0].down.shape[1])
        for p in parts:
            total[p.begin - begin : p.begin - begin + len(p.up)] += p.up @ p.down
        return total

    return Target(begin, end, prior)


def _pairs(solved: ByLayer) -> dict[str, list[LowRank]]:
    return {name: [p for p in own if isinstance(p, LowRank)] for name, own in solved.items()}


def _rate_of(metadata: Mapping[str, str]) -> float:
    try:
        return float(metadata.get("ss_learning_rate", 1e-3))
    except ValueError:
        return 1e-3


def _results(solved: ByLayer, layers: Mapping[str, Sequence[Contribution]]) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for name, own in solved.items():
        out = len(layers[name][0].pair.up)
        if any(isinstance(p, Full) for p in own):
            results[name] = Dense(lambda own=own, out=out: _whole(own, out))
            continue
        pairs = [p for p in own if isinstance(p, LowRank)]
        lora = [c.lora for c in layers[name]] if len(pairs) == len(layers[name]) else ["merged"] * len(pairs)
        results[name] = [
            Contribution(label, LoraPair(p.down, torch.nn.functional.pad(p.up, (0, 0, p.begin, out - p.begin - len(p.up))),
                                         float(len(p.down))), 1.0)
            for label, p in zip(lora, pairs, strict=True)
        ]
    return results


def _whole(own: Sequence[Change], out: int) -> torch.Tensor:
    total = torch.zeros(0)
    for p in own:
        matrix = p.matrix if isinstance(p, Full) else p.up @ p.down
        if not len(total):
            total = torch.zeros(out, matrix.shape[1])
        total[p.begin : p.begin + len(matrix)] += matrix
    return total
