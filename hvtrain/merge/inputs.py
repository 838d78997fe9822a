"""What goes into a merge: LoRA files, finished slice directories, or all slices of a plan; checked before
anything is read twice or written once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hvtrain.config import LoraFileConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.dialects import Shapes
from hvtrain.lorafiles.experts import number_of
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.lorafiles.metadata import EXPERT_KEY, LORA_FLAVOR_KEY, SUM_KEY, Under, base_loras
from hvtrain.lorafiles.runs import finished, lora_in
from hvtrain.models.load import Identified, identify
from hvtrain.models.spec import Expert, Flavor, ModelSpec
from hvtrain.slices.plan import SlicePlan, check_fits, load_plan

RATE_KEY, OPTIMIZER_KEY = "ss_learning_rate", "ss_optimizer"  # metadata
# those whose rates mean the same; others find their own, or are meant relative to something
_LIKE_ADAM = re.compile("^(?!.*(prodigy|dadapt|sgd)).*(adam|muon|schedulefree|came)", re.IGNORECASE)


@dataclass(frozen=True)
class Inputs:
    loras: list[tuple[LoraFile, float]]
    plan: SlicePlan | None
    missing: tuple[int, ...] = ()  # LORAIDs of the plan that are left out, by the user's leave
    any_base: bool = False  # the model need not be the one that they were trained on

    def built_on(self) -> list[tuple[int, ...]]:
        """Of each LoRA, the numbers of those that were merged into the model before its
        training: without them it does not do what it was trained to do. Raises ConfigError
        where one is not here as it was then."""
        found = []
        for lora, _ in self.loras:
            own: list[int] = []
            for one in base_loras(lora.path, lora.metadata) if not self.any_base else ():
                if (number := self._number_of(one)) is None:
                    raise ConfigError(
                        f"{lora.path}: was trained on top of {one.file}, times {one.multiplier:g}, "
                        "which as it was then is not among this merge's LoRAs; give it too (--lora, "
                        "--multiplier), or merge it into the model and say --any-base"
                    )
                own.append(number)
            found.append(tuple(own))
        return found

    def built_on_others(self) -> list[Under]:
        """What was merged into the model before and is not among these: their merge is on top of it too."""
        every = (one for lora, _ in self.loras for one in base_loras(lora.path, lora.metadata))
        return list(dict.fromkeys(one for one in every if self._number_of(one) is None))

    def notes(self) -> list[str]:
        """What is not wrong, and may not be meant."""
        return [] if self.any_base else [
            f"note: trained on top of {one.file}, times {one.multiplier:g}, which is not among these: give "
            "it too, unless the model has it already (--any-base)"
            for one in self.built_on_others()
        ]

    def _number_of(self, one: Under) -> int | None:
        here = [(lora.metadata.get(SUM_KEY), multiplier) for lora, multiplier in self.loras]
        wanted = (one.sum, one.multiplier)
        return here.index(wanted) if one.sum and wanted in here else None


@dataclass(frozen=True)
class PlanSlices:
    """All slices of a plan."""

    plan: Path
    folder: Path | None = None  # with the slices' runs; None: beside the plan
    allow_missing: bool = False


def open_inputs(
    entries: Sequence[LoraFileConfig], slices: PlanSlices | None, shapes: Shapes, spec: ModelSpec, *,
    base: str | None, expert: str | None = None, decomposed: bool = False,
) -> Inputs:
    """Read all LoRAs. `shapes`: [out, in] of the model's Linear layers; `base`: its fingerprint;
    None: any will do. `expert`: whose LoRAs, of a model of several. `decomposed`: also those that
    scale the weights' columns (DoRA)."""
    plan: SlicePlan | None = None
    missing: list[int] = []
    paths: list[tuple[Path, float]] = [(lora_in(entry.path, expert), entry.multiplier) for entry in entries]
    number = number_of(spec, expert, key="--expert")
    if slices is not None:
        plan = load_plan(slices.plan)
        # a plan is every expert's; each LoRA knows its own weights
        check_fits(
            plan, model=spec.name, shapes=shapes, base=base if expert is None else None, where=slices.plan
        )
        found, gaps = slices_of(plan, slices.folder or slices.plan.parent, expert)
        missing = list(gaps)
        if gaps and not slices.allow_missing:
            listed = "; ".join(f"LORAID {i}: {reason}" for i, reason in gaps.items())
            raise CheckpointError(
                f"{len(gaps)} of {plan.n} slices are not there: {listed}. Finish them, or --allow-missing"
            )
        paths += [(path, 1.0) for path in found.values()]
    if not paths:
        raise ConfigError(
            "lora: nothing to merge; give at least one LoRA file, or a plan with finished slices"
        )
    own = [
        read_lora(path, shapes, spec=spec, expert=number, decomposed=decomposed, foreign=True) for path,
        _ in paths
    ]
    loras = [(lora, multiplier) for lora, (_, multiplier) in zip(own, paths, strict=True)]
    _check_experts(own, expert)
    for lora, _ in loras:
        _check_base(lora, base)
    if plan is not None:
        for lora, _ in loras[len(entries) :]:
            check_slots(lora, plan)
    return Inputs(loras, plan, tuple(missing))


def _check_experts(loras: Sequence[LoraFile], wanted: str | None) -> None:
    """Those of two experts have the same layers, and nothing to do with each other."""
    said = {lora.path: lora.metadata[EXPERT_KEY] for lora in loras if EXPERT_KEY in lora.metadata}
    first = wanted or next(iter(said.values()), None)
    for path, name in said.items():
        if name != first:
            what = f"--expert {wanted}" if wanted else f"{next(iter(said))} as '{first}'"
            raise CheckpointError(
                f"{path}: was trained as the expert '{name}', {what}; a merge is into one expert"
            )


def slices_of(plan: SlicePlan, folder: Path, expert: str | None = None) -> tuple[
    dict[int, Path], dict[int, str]
]:
    """LORAID -> LoRA file, and LORAID -> why there is none. Slice 3 is in folder/3,
    folder/03 or folder/slices/03."""
    found: dict[int, Path] = {}
    gaps: dict[int, str] = {}
    for s in plan.slices:
        names = [f"{s.loraid:0{width}d}" for width in (1, 2, 3, 4)]
        places = [folder / part / name for part in ("", "slices") for name in names]
        place = next((p for p in places if p.is_dir()), None)
        result = finished(place, expert) if place else f"no folder {folder / f'{s.loraid:02d}'}"
        if isinstance(result, str):
            gaps[s.loraid] = result
        else:
            found[s.loraid] = result
    return found, gaps


def check_slots(lora: LoraFile, plan: SlicePlan) -> None:
    """Prove from the tensors that a slice changes nothing outside its slots."""
    said = lora.metadata.get("ss_loraid", "")
    if lora.metadata.get("hvtrain.plan", plan.hash) != plan.hash:
        other = lora.metadata["hvtrain.plan"][:12]
        raise CheckpointError(f"{lora.path}: trained by another plan ({other}), this is {plan.hash[:12]}")
    if not said.isdecimal():
        raise CheckpointError(f"{lora.path}: does not say which slice it is (ss_loraid '{said}')")
    allowed = {slot.module: (slot.begin, slot.end) for slot in plan.slice(int(said)).slots}
    for module, pair in lora.pairs.items():
        rows = torch.nonzero(pair.up.ne(0).any(dim=1)).flatten()
        begin, end = allowed.get(module, (0, 0))
        if len(rows) and (rows[0] < begin or rows[-1] >= end):
            raise CheckpointError(
                f"{lora.path}: LORAID {said} changes rows {int(rows[0])} to {int(rows[-1])} of '{module}', "
                "it owns "
                + (f"{begin} to {end - 1}" if end else "none of that layer")
            )


def _check_base(lora: LoraFile, base: str | None) -> None:
    own = lora.metadata.get("hvtrain.base")
    if base is None or own in (None, "scratch", base):
        return
    raise CheckpointError(
        f"{lora.path}: trained on other weights ({own[:16]}) than this model's ({base[:16]}); give the model "
        "it was trained on, or --any-base if it is meant to go onto this one"
    )


def owners_note(loras: Sequence[tuple[LoraFile, float]]) -> str:
    """The LORAIDs of all inputs, for metadata."""
    ids = [i for lora, _ in loras for i in lora.metadata.get("ss_loraid", "").split(",") if i]
    return ",".join(dict.fromkeys(ids))


def as_trained(found: Identified, inputs: Inputs) -> Identified:
    """The model as the flavor that its LoRAs were trained as, which its file does not always tell: a model by
    image, taken for one by text, would be told nothing of the image. Not where the model is another than
    they were trained on (any_base). Raises ConfigError where they differ."""
    told = flavors_told(inputs)
    if inputs.any_base:
        return found
    if len(told) > 1:
        listed = ", ".join(f"{path} as '{name}'" for name, path in told.items())
        raise ConfigError(f"flavor: these were trained as different ones ({listed}); give flavor=NAME")
    name = next(iter(told), found.flavor.name)
    return found if name == found.flavor.name else identify(found.path, model=found.spec.name, flavor=name)


def flavors_told(inputs: Inputs) -> dict[str, Path]:
    """As which flavors they were trained, and one that says so of each."""
    return {lora.metadata[LORA_FLAVOR_KEY]: lora.path for lora, multiplier in inputs.loras
            if multiplier and LORA_FLAVOR_KEY in lora.metadata}  # fmt: skip


def expert_told(inputs: Inputs) -> str | None:
    """As which expert they were trained, if they say so."""
    return next((lora.metadata[EXPERT_KEY] for lora, _ in inputs.loras if EXPERT_KEY in lora.metadata), None)


def expert_of(flavor: Flavor, inputs: Inputs, name: str | None) -> Expert | None:
    """Which of several the model is: the one that is named, else the one that the LoRAs were trained as, if
    they say so. It is on its own noise levels only that they learnt something."""
    wanted = name or expert_told(inputs)
    return next((expert for expert in flavor.experts if expert.name == wanted), None)


def learning_rate(loras: Sequence[tuple[LoraFile, float]]) -> float | None:
    """The least of those that their trainings, and earlier merges of some of them, have noted; prodigy's 1, a
    lion's or an adafactor's are no rate for others."""
    found = []
    for lora, _ in loras:
        if not _LIKE_ADAM.search(lora.metadata.get(OPTIMIZER_KEY, "adam")):
            continue
        try:
            found.append(float(lora.metadata[RATE_KEY]))
        except (KeyError, ValueError):  # another tool's, which says nothing or says it in words
            continue
    return min((rate for rate in found if 0 < rate < math.inf), default=None)
