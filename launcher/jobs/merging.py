"""The merge that ends a sliced run: what it is asked for, and what it will need of the slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hvtrain.errors import ConfigError
from launcher.jobs import waves

if TYPE_CHECKING:
    from hvtrain.config import TrainConfig
    from launcher.jobs.slices import Slices

OWN = "reconcile."  # keys that are the merge's, not the trainings'
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
    from hvtrain import config
    from hvtrain.config.rules.merge import check_merge_values

    check_merge_values(config.load(config.MergeConfig, None, list(own)))


def set_again(wanted: Slices, own: Sequence[str]) -> Slices:
    """With other settings of the merge: the same keys are replaced. Raises ConfigError."""
    if odd := [item for item in own if not item.startswith(OWN) or "=" not in item]:
        raise ConfigError(
            f"{odd[0]}: expected {OWN}KEY=value, for the merge; the slices are trained as they were begun"
        )
    if "--reconcile" not in wanted.merge:
        raise ConfigError(f"{own[0]} is for a merge that reconciles, and this one does not")
    _check_own(own)
    keys = tuple(f"{item.partition('=')[0]}=" for item in own)
    kept = tuple(word for word in wanted.merge if not word.startswith(keys))
    return replace(wanted, merge=(*kept, *own))


def check(cfg: TrainConfig, wanted: Slices) -> None:
    """What the merge will need of a slice that is trained so, weeks later. Raises ConfigError."""
    if not wanted.merge:
        return
    reconciled, kind = "--reconcile" in wanted.merge, wanted.merge[wanted.merge.index("--as") + 1]
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
