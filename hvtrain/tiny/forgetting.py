"""Which way of slicing keeps what was learnt? `python -m hvtrain.tiny.forgetting
configs/tiny/forgetting.yaml [key=value ...]`.

The six words of words.py are six slices of the data, each together with as many clips of old words, and each
has a LoRA of its own; the six are merged, and prompts with each word are generated and looked at. Ways:
LORAID slices (contiguous, interleaved, rows), six ordinary LoRAs, all of the same number of parameters, and
as an upper bound one such LoRA for all six sets together. They are added up, averaged, merged by TIES and
DARE, and reconciled, from what each training left beside its LoRA and from clips of old words; a seventh word
is then added to the reconciled six. Slices of a plan share no row, and what averages, TIES and DARE make of
those is the sum. Every seed has its own clips and trainings, in a folder of its own. Prints the table of
docs/loraid.md; started again, it continues. `words=24`, as configs/tiny/words.yaml has twelve, is the same
for the first 24 of forty words, most of which tell more than a colour: ordinary LoRAs, added up and
reconciled. Trainings of 12 serve 24.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from hvtrain.errors import ConfigError, suggest
from hvtrain.generate import run as generate
from hvtrain.merge import run as merge
from hvtrain.slices.plan import Cut, SlicePlan, load_plan, save_plan
from hvtrain.slices.run import plan_for
from hvtrain.tiny.clips import Drawing, training_clips
from hvtrain.tiny.rows import Row, markdown, read_row
from hvtrain.tiny.score import CONFIGS
from hvtrain.tiny.words import (
    CONCEPTS,
    OLD,
    PLACES,
    WORDS,
    asked,
    clips_of,
    dataset_of,
    first,
    old_clips,
    prompt_lines,
    shares,
    write_pairs,
)
from hvtrain.train import run as train

DIT = "tiny:dit.safetensors"
ALONE, BEST, NO_DATA = "alone", "fit+distill", ", captions only"
POLICIES = ("sum", "average", "ties", "dare")
RECONCILED = tuple(f"{how}{data}" for data in ("", NO_DATA) for how in ("fit", "distill", "fit+distill"))
SEVENTH, SEVENTH_COLOR = "ring", "orange"  # learnt after the six, of a colour that is none of theirs
SEVENTH_ALONE, ADDED = "the seventh alone", "fit+distill of six, the seventh added"


@dataclass(frozen=True)
class Recipe:
    """The experiment."""

    output: str = ""
    """Directory of everything; about 300 MB a seed"""
    words: int = 6
    """The first so many words of words.py, up to 40; more than six only as ordinary
    LoRAs: alone, sum and fit+distill"""
    clips: int = 36
    """Clips of each concept, a multiple of 12; as many of old words are added"""
    steps: int = 400
    """Training steps of each LoRA"""
    rank: int = 8
    """Rank of the ordinary LoRAs; slices, and the LoRA of all sets, get the rank with which
    they have as many parameters"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of clips and training"""
    keep: int = 48
    """Clips of old words that the merger is given (--keep)"""
    reconcile: tuple[str, ...] = ()
    """Settings of the merger other than its own: KEY=VALUE of `reconcile` of `hvtrain merge`"""
    joint: tuple[int, ...] = (150, 400, 2400)
    """Steps of one LoRA for all sets: few, one slice's training (about as many samples as
    distill sees of six), all slices' trainings"""
    ways: tuple[str, ...] = ()
    """Names of the ways to try; none: all"""
    rows: tuple[str, ...] = ()
    """Rows of each: alone, sum, fit and so on as the table names them; none: all"""
    only_show: bool = False
    """Print the table of what there is, and make nothing"""


@dataclass(frozen=True)
class Way:
    """How LoRAs are trained, and how they become one."""

    name: str
    cut: Cut | None  # None: ordinary LoRAs
    rows: tuple[str, ...]
    words: tuple[str, ...] = tuple(CONCEPTS)

    @property
    def folder(self) -> str:
        return slug(self.name) if len(self.words) == len(CONCEPTS) else "words"


BASE, JOINT = "base model", "one LoRA of all sets"
WAYS = (
    Way("LORAID contiguous", Cut(n=6, granularity="module", order="contiguous"), (ALONE, "sum", *RECONCILED)),
    Way(
        "LORAID interleaved", Cut(n=6, granularity="module", order="interleaved"), (ALONE, "sum", *RECONCILED)
    ),
    Way("LORAID rows", Cut(n=6, granularity="rows", order="interleaved"), (ALONE, "sum", *RECONCILED)),
    Way("ordinary LoRA", None, (ALONE, *POLICIES, *RECONCILED, SEVENTH_ALONE, ADDED)),
)


def ways_of(recipe: Recipe) -> tuple[Way, ...]:
    if recipe.words == len(CONCEPTS):
        return WAYS
    words = first(recipe.words)
    return (Way(f"{len(words)} ordinary LoRAs", None, (ALONE, "sum", BEST), words),)


def run(recipe: Recipe) -> None:
    check(recipe)
    done = [list(Seed(recipe, seed).rows()) for seed in recipe.seeds]
    print(markdown(done))


def check(recipe: Recipe) -> None:
    """What would be left out without a word. Raises ConfigError."""
    if not recipe.output:
        raise ConfigError("output is not set; give the directory of everything")
    if recipe.clips < 1 or recipe.clips % len(PLACES):
        raise ConfigError(f"clips: {recipe.clips}: expected a multiple of {len(PLACES)}")
    there = list(Seed(recipe, 0).makers())
    for key, names, known in (
        ("ways", recipe.ways, {way for way, _ in there}), ("rows", recipe.rows, {how for _, how in there})
    ):
        for name in names:
            if name not in known:
                raise ConfigError(f"{key}: there is no '{name}'; {suggest(name, known)}")


@dataclass(frozen=True)
class Seed:
    """All that is made with one seed, below a folder of its own."""

    recipe: Recipe
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output) / f"seed-{self.seed}"

    def makers(self) -> dict[tuple[str, str], Callable[[], Row]]:
        """Of every row, by way and name, in the table's order."""
        makers: dict[tuple[str, str], Callable[[], Row]] = {(BASE, ""): self._base}
        for way in ways_of(self.recipe):
            makers |= {(way.name, how): partial(self._row, way, how) for how in way.rows}
        if self.recipe.words == len(CONCEPTS):
            makers |= {(JOINT, f"{steps} steps"): partial(self._joint, steps) for steps in self.recipe.joint}
        return makers

    def rows(self) -> list[Row]:
        """Those that are asked for."""
        found = [
            self._kept_row(way, how, make)
            for (way, how), make in self.makers().items()
            if way in (self.recipe.ways or (way,)) and how in (self.recipe.rows or (how,))
        ]
        return [row for row in found if row is not None]

    def _kept_row(self, way: str, how: str, make: Callable[[], Row]) -> Row | None:
        """As it was made before, or now."""
        path = self.folder / "rows" / f"{slug(f'{way} {how}')}.json"
        row = read_row(path)
        if row is None and not self.recipe.only_show:
            row = make()
            row.save(path)
            print(f"seed {self.seed}: {row}", flush=True)
        return row

    def _base(self) -> Row:
        n = self.recipe.words
        folder = Path(self.recipe.output) / ("base" if n == len(CONCEPTS) else f"base-{n}")
        return Row(BASE, "", score(folder, asset(DIT), (), first(n)), None)  # the same for every seed

    def _row(self, way: Way, how: str) -> Row:
        place = self.folder / way.folder
        plan = _plan(way, place)
        words = list(way.words) if how != SEVENTH_ALONE else [SEVENTH]
        files = [self._lora(place, plan, word) for word in words]
        if how in (ALONE, SEVENTH_ALONE):
            return _alone(way.name, how, place, dict(zip(words, files)))
        merged = place / (
            f"merged-{slug(how)}" + (f"-{len(words)}" if way.words != WAYS[-1].words else "") + ".safetensors"
        )
        if how == ADDED:
            six = place / f"merged-{slug(BEST)}.safetensors"
            self._merged(six, files, BEST)
            self._merged(merged, [six, self._lora(place, plan, SEVENTH)], ADDED)
            words = [*words, SEVENTH]
        else:
            self._merged(merged, files, how)
        dit, loras = (asset(DIT), [merged]) if as_lora(how) else (str(merged), [])
        return Row(way.name, how, score(merged.with_suffix(""), dit, loras, words), _seconds(merged))

    def _joint(self, steps: int) -> Row:
        place = self.folder / slug(JOINT)
        sets = [self._shards(word) for word in CONCEPTS]
        path = self._train(place / f"{steps}", sets, steps=steps, rank=self.recipe.rank * len(CONCEPTS))
        return Row(
            JOINT, f"{steps} steps", score(place / f"score-{steps}", asset(DIT), [path]), _seconds(path)
        )

    # --- files ----------------------------------------------------------------------------------------------

    def _shards(self, word: str) -> Path:
        """`word`'s clips; "": old words', for the merger alone."""
        made = (
            drawings(word, self.recipe.clips, seed=self.seed)
            if word else old_clips(self.recipe.keep, seed=self.seed)
        )
        return _encoded(self.folder / "data" / (word or "old"), made)

    def _lora(self, place: Path, plan: SlicePlan | None, word: str) -> Path:
        words = [*CONCEPTS, SEVENTH] if self.recipe.words == len(CONCEPTS) else list(WORDS)
        number = words.index(word) + 1
        rank = self.recipe.rank if plan is None else equal_rank(plan, self.recipe.rank)
        slot = (
            ["adapter.type=loraid", f"adapter.plan={place / 'plan.json'}", f"adapter.loraid={number}"]
            if plan else []
        )
        return self._train(
            place / f"{number:02d}", [self._shards(word)], *slot, steps=self.recipe.steps, rank=rank
        )

    def _train(self, output: Path, sets: Sequence[Path], *more: str, steps: int, rank: int) -> Path:
        path = output / f"{output.name}.safetensors"
        if not path.exists():
            cfg = load(TrainConfig, CONFIGS / "lora.yaml", [
                f"data.shards=[{', '.join(map(str, sets))}]", f"run.output_dir={output}",
                f"run.name='{output.name}'", f"run.steps={steps}", f"run.seed={self.seed}",
                f"adapter.rank={rank}", f"adapter.alpha={rank}", "zero.engine=torch",
                "zero.offload_optimizer=none", "preview.every_steps=0", "run.log_every=50", *more,
            ])
            _timed(path, partial(train.run, cfg))
        return path

    def _merged(self, output: Path, files: Sequence[Path], how: str) -> None:
        """A reconciled one is made of what the trainings left in calibration/, and
        an earlier merge in its own."""
        if output.exists():
            return
        cfg = MergeConfig(
            dit=asset(DIT), output=str(output), lora=tuple(LoraFileConfig(str(p)) for p in files)
        )
        if how in POLICIES:
            return _timed(output, partial(merge.run, replace(cfg, on_overlap=how)))
        way = BEST if how == ADDED else how.removesuffix(NO_DATA)
        given = load(MergeConfig, None, [
            f"reconcile.how={way}", f"reconcile.own_states={how.endswith(NO_DATA)}",
            "reconcile.allow_lost=true", "reconcile.batch_size=12",
            *(f"reconcile.{pair}" for pair in self.recipe.reconcile),
            *([] if how == ADDED else [f"reconcile.keep={self._shards('')}"]),
        ])
        cfg = replace(cfg, reconcile=given.reconcile, target="lora" if as_lora(how) else "model")
        _timed(output, partial(merge.run, cfg))


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").lower()


def as_lora(how: str) -> bool:
    """Written as one LoRA: another can be added to it."""
    return how in (BEST, ADDED)


def drawings(word: str, n: int, *, seed: int) -> list[Drawing]:
    """`n` clips of the word and as many of old ones."""
    if word in WORDS:
        return clips_of(word, n, seed=seed)
    every = PLACES * (n // len(PLACES))
    made = [Drawing(SEVENTH_COLOR, "circle", m, b, seed * 1000 + i, word) for i, (m, b) in enumerate(every)]
    return made + training_clips(n, seed=seed * 100 + 49)


def _alone(way: str, how: str, place: Path, files: dict[str, Path]) -> Row:
    """Each LoRA asked for its own word and, unless they are very many, for old ones."""
    old = len(files) <= len(CONCEPTS)
    found = {
        word: score(place / f"alone-{word}", asset(DIT), [path], [word], old=old) for word,
        path in files.items()
    }
    scores = {word: found[word][word] for word in files}
    if old:
        scores[OLD] = sum(own[OLD] for own in found.values()) / len(found)
    seconds = [s for s in map(_seconds, files.values()) if s is not None]
    return Row(way, how, scores, sum(seconds) / len(seconds) if seconds else None, alone=True)


def _timed(output: Path, make: Callable[[], object]) -> None:
    """`output` made, and beside it the CPU seconds that it took since it was last started."""
    began = time.process_time()
    make()
    output.with_suffix(".seconds.json").write_text(json.dumps(time.process_time() - began))


def _seconds(output: Path) -> float | None:
    """None: it was killed between the two."""
    note = output.with_suffix(".seconds.json")
    return float(json.loads(note.read_text())) if note.exists() else None


def equal_rank(plan: SlicePlan, rank: int) -> int:
    """The rank with which all slices together have the parameters of as many ordinary
    LoRAs of `rank`, rounded down."""
    shapes = dict(_layers())
    whole = sum(out + width for out, width in shapes.values())
    sliced = sum(slot.end - slot.begin + shapes[slot.module][1] for s in plan.slices for slot in s.slots)
    return rank * plan.n * whole // sliced


def _layers() -> list[tuple[str, tuple[int, int]]]:
    from hvtrain.models.load import identify, whole_model
    from hvtrain.slices.run import target_shapes

    found = identify(asset(DIT))
    return list(target_shapes(whole_model(found), found.spec).items())


def _encoded(folder: Path, made: Sequence[Drawing]) -> Path:
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
        save_plan(plan_for(way.cut, dit=DIT, model=None, flavor=None), path)
    return load_plan(path)


def score(
    folder: Path, dit: str, loras: Sequence[Path], words: Sequence[str] = tuple(CONCEPTS), *, old: bool = True
) -> dict[str, float]:
    """Share of videos that show the concept of each word; and of old prompts whose
    colour and motion are right."""
    note = folder / "score.json"
    if note.exists():
        return json.loads(note.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    wanted = asked([w for w in words if w in WORDS], old=old)
    wanted += [Drawing(SEVENTH_COLOR, "circle", m, b, 0, SEVENTH) for m, b in PLACES if SEVENTH in words]
    prompts = folder / "prompts.txt"
    prompts.write_text(prompt_lines(wanted))
    cfg = load(GenerateConfig, CONFIGS / "generate.yaml", [f"prompt_file={prompts}", f"output={folder}"])
    files = generate.run(
        replace(cfg, model=replace(cfg.model, dit=dit), lora=tuple(SampledLora(str(p)) for p in loras))
    )
    scores = shares(wanted, files)
    note.write_text(json.dumps(scores))
    return scores


def main(argv: list[str]) -> None:
    run(load(Recipe, argv[0], argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
