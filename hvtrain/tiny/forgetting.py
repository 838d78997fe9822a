"""Which way of slicing keeps what was learnt? `python -m hvtrain.tiny.forgetting configs/tiny/forgetting.yaml [key=value ...]`.

The six words of words.py are six slices of the data, each together with as many clips of old words, and each has a LoRA of its
own; the six are merged, and prompts with each word are generated and looked at. Ways: LORAID slices (contiguous, interleaved,
rows) and six ordinary LoRAs, all of the same number of parameters. They are added up, averaged, merged by TIES and DARE, and
reconciled, from what each training left beside its LoRA and from clips of old words. Prints the table of docs/loraid.md; started
again, it continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvtrain.config import (
    EncodeConfig,
    GenerateConfig,
    LoraFileConfig,
    MergeConfig,
    SampledLora,
    TrainConfig,
    asset,
    load,
)
from hvtrain.encode import run as encode
from hvtrain.generate import run as generate
from hvtrain.merge import run as merge
from hvtrain.slices.plan import Cut, SlicePlan, load_plan, save_plan
from hvtrain.slices.run import plan_for
from hvtrain.tiny.clips import Drawing
from hvtrain.tiny.score import CONFIGS
from hvtrain.tiny.words import (
    CONCEPTS,
    OLD,
    asked,
    clips_of,
    dataset_of,
    mean,
    old_clips,
    shares,
    write_pairs,
)
from hvtrain.train import run as train

POLICIES = ("sum", "average", "ties", "dare")
SLOTTED = ("error", "distill", "fit+distill")
NO_DATA, IN_TWO = "fit+distill, captions only", "fit+distill, five and then the sixth"


@dataclass(frozen=True)
class Recipe:
    """The experiment."""

    output: str = ""
    """Directory of everything; about 300 MB"""
    clips: int = 36
    """Clips of each concept, a multiple of 12; as many of old words are added"""
    steps: int = 400
    """Training steps of each LoRA"""
    rank: int = 8
    """Rank of the ordinary LoRAs; slices get the rank with which they have as many parameters"""
    seed: int = 1
    """Seed of clips and training"""
    keep: int = 48
    """Clips of old words that the merger is given (--keep)"""
    ways: tuple[str, ...] = ()
    """Names of the ways to try; none: all"""
    policies: tuple[str, ...] = ()
    """Rows of each: base, alone, and names of the policies to merge by; none: all"""


@dataclass(frozen=True)
class Way:
    """How a concept's LoRA is trained, and how the six become one."""

    name: str
    cut: Cut | None  # None: an ordinary LoRA
    policies: tuple[str, ...]


WAYS = (
    Way("LORAID contiguous", Cut(n=6, granularity="module", order="contiguous"), SLOTTED),
    Way("LORAID interleaved", Cut(n=6, granularity="module", order="interleaved"), SLOTTED),
    Way("LORAID rows", Cut(n=6, granularity="rows", order="interleaved"), SLOTTED),
    Way("ordinary LoRA", None, (*POLICIES, "fit", "distill", "fit+distill", NO_DATA, IN_TWO)),
)


def run(recipe: Recipe) -> None:
    root = Path(recipe.output)
    shards = {w: _shards(root / "data" / w, clips_of(w, recipe.clips, seed=recipe.seed)) for w in CONCEPTS}
    kept = _shards(root / "data" / "old", old_clips(recipe.keep, seed=recipe.seed))
    table = []
    base = asset("tiny:dit.safetensors")
    if "base" in (recipe.policies or ("base",)):
        table.append(("base model", "", 0, _score(root / "base", base)))
    for way in (w for w in WAYS if w.name in (recipe.ways or [w.name for w in WAYS])):
        folder = root / way.name.replace(" ", "-").lower()
        plan = _plan(way, folder)
        rank = recipe.rank if plan is None else equal_rank(plan, recipe.rank)
        files = [_train(recipe, folder, plan, i, shards[word], rank) for i, word in enumerate(CONCEPTS, start=1)]
        n = sum(_parameters(path) for path in files)
        if "alone" in (recipe.policies or ("alone",)):
            table.append((way.name, "alone", n, _alone(folder, files)))
        for policy in (p for p in way.policies if p in (recipe.policies or way.policies)):
            merged = folder / f"merged-{policy.replace(', ', '-').replace(' ', '-')}.safetensors"
            if not merged.exists():
                _merge(merged, files, policy, kept)
            shown = "merged" if policy == "error" else policy
            table.append((way.name, shown, n, _score(merged.with_suffix(""), str(merged))))
    print(markdown(table))


def _alone(folder: Path, files: Sequence[Path]) -> dict[str, float]:
    base = asset("tiny:dit.safetensors")
    alone = [
        _score(folder / f"alone-{word}", base, (SampledLora(str(path)),), words=(word,))
        for path, word in zip(files, CONCEPTS, strict=True)
    ]
    own = {word: scores[word] for scores in alone for word in scores if word in CONCEPTS}
    return {**own, OLD: sum(scores[OLD] for scores in alone) / len(alone)}


def _merge(output: Path, files: Sequence[Path], policy: str, kept: Path) -> None:
    """Into the model. A reconciled one is made of what the trainings left in calibration/."""
    cfg = MergeConfig(dit=asset("tiny:dit.safetensors"), output=str(output), lora=tuple(LoraFileConfig(str(p)) for p in files))
    if policy in ("error", *POLICIES):
        merge.run(replace(cfg, on_overlap=policy))
        return
    how = [f"reconcile.how={policy.partition(',')[0]}", f"reconcile.own_states={policy == NO_DATA}", "reconcile.allow_lost=true"]
    given = load(MergeConfig, None, [*how, f"reconcile.keep={kept}", "reconcile.batch_size=12"])
    cfg = replace(cfg, reconcile=given.reconcile)
    if policy == IN_TWO:
        five = output.with_name("five.safetensors")
        merge.run(replace(cfg, lora=cfg.lora[:-1], target="lora", output=str(five)))
        cfg = replace(cfg, lora=(LoraFileConfig(str(five)), cfg.lora[-1]), reconcile=replace(cfg.reconcile, keep=()))
    merge.run(cfg)


def equal_rank(plan: SlicePlan, rank: int) -> int:
    """The rank with which all slices together have the parameters of as many ordinary LoRAs of `rank`, rounded down."""
    shapes = dict(_layers())
    whole = sum(out + width for out, width in shapes.values())
    sliced = sum(slot.end - slot.begin + shapes[slot.module][1] for s in plan.slices for slot in s.slots)
    return rank * plan.n * whole // sliced


def _layers() -> list[tuple[str, tuple[int, int]]]:
    from hvtrain.models.load import identify, whole_model
    from hvtrain.slices.run import target_shapes

    found = identify(asset("tiny:dit.safetensors"))
    return list(target_shapes(whole_model(found), found.spec).items())


def _shards(folder: Path, made: Sequence[Drawing]) -> Path:
    out = folder / "shards"
    if not (out / "manifest.json").exists():
        write_pairs(folder / "clips", made, folder.name)
        dataset = dataset_of([folder / "clips"], folder / "dataset.toml")
        encode.run(load(EncodeConfig, CONFIGS / "encode.yaml", [f"dataset={dataset}", f"output={out}"]))
    return out


def _plan(way: Way, folder: Path) -> SlicePlan | None:
    if way.cut is None:
        return None
    path = folder / "plan.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_plan(plan_for(way.cut, dit="tiny:dit.safetensors", model=None, flavor=None), path)
    return load_plan(path)


def _train(recipe: Recipe, folder: Path, plan: SlicePlan | None, loraid: int, shards: Path, rank: int) -> Path:
    name = f"{loraid:02d}"
    output = folder / name
    path = output / f"{name}.safetensors"
    if not path.exists():
        slot = ["adapter.type=loraid", f"adapter.plan={folder / 'plan.json'}", f"adapter.loraid={loraid}"]
        owner = slot if plan is not None else []
        train.run(load(TrainConfig, CONFIGS / "lora.yaml", [
            f"data.shards={shards}", f"run.output_dir={output}", f"run.name='{name}'", f"run.steps={recipe.steps}",
            f"run.seed={recipe.seed}", f"adapter.rank={rank}", f"adapter.alpha={rank}", "zero.engine=torch",
            "zero.offload_optimizer=none", "preview.every_steps=0", "run.log_every=50", *owner,
        ]))
    return path


def _parameters(path: Path) -> int:
    """What was trained: rows that a slice does not own are zeros in its file and count for nothing."""
    from hvtrain.lorafiles.tools import open_any

    pairs = open_any(path).lora.pairs.values()
    return sum(p.down.numel() + int(p.up.ne(0).any(dim=1).sum()) * p.rank for p in pairs)


def _score(
    folder: Path, dit: str, loras: tuple[SampledLora, ...] = (), words: tuple[str, ...] = tuple(CONCEPTS)
) -> dict[str, float]:
    """Share of videos that show the concept of each word; and of old prompts whose colour and motion are right."""
    note = folder / "score.json"
    if note.exists():
        return json.loads(note.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    wanted = asked(words)
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{clip.caption}\n" for clip in wanted))
    cfg = load(GenerateConfig, CONFIGS / "generate.yaml", [f"prompt_file={prompts}", f"output={folder}"])
    files = generate.run(replace(cfg, model=replace(cfg.model, dit=dit), lora=loras))
    scores = shares(wanted, files)
    note.write_text(json.dumps(scores))
    return scores


def markdown(table: Sequence[tuple[str, str, int, Mapping[str, float]]]) -> str:
    head = ["", "", "parameters", *CONCEPTS, "mean", OLD]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, how, n, scores in table:
        cells = [f"{100 * share:.0f} %" for share in (*(scores[w] for w in CONCEPTS), mean(scores), scores[OLD])]
        lines.append("| " + " | ".join([name, how, f"{n:,}" if n else "", *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    run(load(Recipe, argv[0], argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
