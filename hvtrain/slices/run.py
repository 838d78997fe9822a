"""`hvtrain slices plan`: from a model (file or flavor) to plan.json and plan.png."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import asset
from hvtrain.errors import ConfigError
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.load import identify, whole_model
from hvtrain.models.spec import ModelSpec
from hvtrain.slices import picture
from hvtrain.slices.plan import FILE, Cut, SlicePlan, make_plan, save_plan
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.outputs import writing


def target_shapes(model: DiT, spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """[out, in] of the model's LoRA targets, in its order."""
    shapes = linear_shapes(model)
    return {name: shapes[name] for name in spec.lora_targets(model)}


def plan_for(cut: Cut, *, dit: str | None, model: str | None, flavor: str | None) -> SlicePlan:
    """By a model file (then the plan knows its weights), or by architecture and flavor."""
    if (dit is None) == (model is None):
        raise ConfigError("give either --dit FILE, or --model NAME [--flavor NAME]")
    if dit is not None:
        found = identify(asset(dit), flavor=flavor)
        shapes = target_shapes(whole_model(found), found.spec)
        base = fingerprint(found.weights)
        return make_plan(shapes, cut, model=found.spec.name, flavor=found.flavor.name, base=base)
    spec = find(str(model))
    kind = spec.flavor(flavor) if flavor else next(iter(spec.flavors.values()))
    with torch.device("meta"):
        shapes = target_shapes(spec.build(kind.arch), spec)
    return make_plan(shapes, cut, model=spec.name, flavor=kind.name)


def run(cut: Cut, output: str, *, dit: str | None, model: str | None, flavor: str | None) -> Iterator[str]:
    plan = plan_for(cut, dit=dit, model=model, flavor=flavor)
    folder = Path(output)
    if (folder / FILE).exists():
        raise ConfigError(
            f"{folder / FILE} exists; slices may already be trained by it: choose another directory"
        )
    with writing(folder / FILE):
        picture.draw(plan, folder / "plan.png")
        save_plan(plan, folder / FILE)
    yield from picture.lines(plan)
    yield f"{folder / FILE} and plan.png, plan {plan.hash[:12]}"
