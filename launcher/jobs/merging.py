"""The merge that ends a sliced run: what it is asked for, and what it will need of the slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hvtrain.config.model import BOTH
from hvtrain.errors import ConfigError
from launcher.jobs import waves

if TYPE_CHECKING:
    from hvtrain.config import MergeConfig, ModelConfig, TrainConfig
    from launcher.jobs.slices import Slices

OWN = "reconcile."  # keys that are the merge's, not the trainings'
_HOW = f"{OWN}how="
WAYS = ("fit", "distill", "fit+distill", "none")


@dataclass(frozen=True)
class MergeAsked:
    """The options of `hvtrain slices run` that are its merge's."""

    kind: str  # lora, model or none
    how: str | None  # to reconcile; None: by itself
    keep: Sequence[str]
    own: Sequence[str]  # reconcile.KEY=value
    data: Path  # with keep/, perhaps


def arguments(run: Path, wanted: Slices, asked: MergeAsked, dit: str | None) -> tuple[str, ...]:
    """Of `hvtrain merge`; none: nothing is merged. Raises ConfigError."""
    kind = asked.kind
    if kind not in ("lora", "model", "none"):
        raise ConfigError(f"--merge-as {kind}: expected lora, model or none")
    how = _reconciling(wanted, asked)
    if kind == "none":
        return ()
    if not dit:
        raise ConfigError("model.dit: the slices need the weights they adapt; give the DiT's file")
    which = (
        ("--plan", wanted.plan, "--slices", str(run))
        if wanted.plan else tuple(waves.loras(run, wanted, wanted.waves))
    )
    return (
        "--dit", dit, *which, "--as", kind, "--output", str(run / "merge" / f"merged-{kind}.safetensors"),
        *how, *asked.own
    )


def _reconciling(wanted: Slices, asked: MergeAsked) -> tuple[str, ...]:
    """How they become one; added up, they would lose most of what they learnt."""
    if asked.kind == "none":
        if asked.how or asked.keep or asked.own:
            raise ConfigError("--merge-as none: nothing is merged; leave --reconcile and --keep away")
        return ()
    how = asked.how or ("none" if wanted.plan and wanted.waves > 1 else "fit+distill")
    if how not in WAYS:
        raise ConfigError(f"--reconcile {how}: expected {', '.join(WAYS)}")
    if how == "none":
        if asked.keep or asked.own:
            given = "--keep" if asked.keep else asked.own[0]
            raise ConfigError(f"{given} is for a merge that reconciles, and this one adds the slices up")
        return ("--on-overlap", "sum")
    _check_own(asked.own)
    left = asked.data / "keep"
    keep = asked.keep or ([str(left.resolve())] if (left / "manifest.json").is_file() else [])
    return ("--reconcile", how, *(item for place in keep for item in ("--keep", place)))


def _check_own(own: Sequence[str]) -> None:
    from hvtrain.config.rules.merge import check_merge_values

    for key, option in (("how", "--reconcile"), ("keep", "--keep")):
        if any(item.startswith(f"{OWN}{key}=") for item in own):
            raise ConfigError(f"{OWN}{key} is an option of `hvtrain slices run`: give {option}")
    check_merge_values(_config(own))


def _config(own: Sequence[str]) -> MergeConfig:
    from hvtrain import config

    return config.load(config.MergeConfig, None, list(own))


def own_of(merge: Sequence[str]) -> list[str]:
    """Its keys reconcile.KEY=value."""
    return [word for word in merge if word.startswith(OWN)]


def trained(model: ModelConfig) -> str | None:
    """The file that the slices adapt: of several experts, the trained one's."""
    if model.experts in (None, BOTH):
        return model.dit
    from hvtrain.train.setup import part_of  # torch

    return model.file(part_of(model))


def set_again(wanted: Slices, own: Sequence[str]) -> Slices:
    """With other settings of the merge: the same keys are replaced. Raises ConfigError."""
    if odd := [item for item in own if not item.startswith(OWN) or "=" not in item]:
        raise ConfigError(
            f"{odd[0]}: expected {OWN}KEY=value, for the merge; the slices are trained as they were begun"
        )
    if "--reconcile" not in wanted.merge:
        raise ConfigError(f"{own[0]} is for a merge that reconciles, and this one does not")
    words, rest = list(wanted.merge), [item for item in own if not item.startswith(_HOW)]
    for how in (item.removeprefix(_HOW) for item in own if item.startswith(_HOW)):
        if how not in WAYS[:-1]:
            raise ConfigError(f"{_HOW}{how}: expected {', '.join(WAYS[:-1])}")
        words[words.index("--reconcile") + 1] = how
    _check_own(rest)
    keys = tuple(f"{item.partition('=')[0]}=" for item in rest)
    return replace(wanted, merge=(*(word for word in words if not word.startswith(keys)), *rest))


def check(cfg: TrainConfig, wanted: Slices) -> None:
    """What the merge will need of a slice that is trained so, weeks later. Raises ConfigError."""
    if not wanted.merge:
        return
    if cfg.model.experts == BOTH:
        raise ConfigError(
            "model.experts is both, and a merge is into one expert: give --merge-as none, and afterwards "
            "`hvtrain merge --expert NAME` for each"
        )
    reconciled, kind = "--reconcile" in wanted.merge, wanted.merge[wanted.merge.index("--as") + 1]
    if reconciled and cfg.model.experts:
        sampled = [
            place for before, place in pairwise(wanted.merge) if before == "--keep" and Path(place).is_file()
        ]
        if sampled or _config(own_of(wanted.merge)).reconcile.own_states:
            raise ConfigError(
                f"{f'--keep {sampled[0]}' if sampled else 'reconcile.own_states'}: clips of captions are "
                "sampled by all experts together, and this run has one; give shard sets"
            )
    if reconciled and cfg.data.calibration == 0:
        raise ConfigError(
            "data.calibration is 0: the merge reconciles the slices by samples that their trainings leave; "
            "give more, or --reconcile none, to add the slices up"
        )
    whole = not reconciled and kind == "model" and wanted.waves == 1  # waves lie upon LoRAs
    if cfg.adapter.type == "loraid" and cfg.adapter.slice_type == "dora" and not whole:
        raise ConfigError(
            "adapter.slice_type is dora, and DoRAs can only be added up into a model: give --reconcile none "
            "and --merge-as model, and no --waves"
        )
