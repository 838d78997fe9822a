"""What a generation will do: all that can be known, and refused, before any weights are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvtrain.adapters.files import LoraFile
from hvtrain.adapters.lora import linear_shapes
from hvtrain.config import GenerateConfig, asset
from hvtrain.errors import ConfigError
from hvtrain.generate.loras import open_loras
from hvtrain.generate.requests import Job, batches, plan_jobs
from hvtrain.models.base import Flavor, ModelSpec
from hvtrain.models.load import check, identify
from hvtrain.parallel.context import ParallelContext, check_heads


@dataclass(frozen=True)
class Plan:
    """All that can be known, and refused, before any weights are read."""

    spec: ModelSpec
    flavor: Flavor
    jobs: list[list[Job]]  # batches, all of them; this rank's group takes every dp-th
    loras: list[tuple[LoraFile, float]]
    layers: dict[str, tuple[int, int]]  # [out, in] of every Linear


def make_plan(cfg: GenerateConfig, ctx: ParallelContext) -> Plan:
    """Reads the header of the DiT and the LoRA files."""
    found = identify(asset(str(cfg.model.dit)), model=cfg.model.name, flavor=cfg.model.flavor)
    spec, flavor = found.spec, found.flavor
    if foreign := [field.name for field in flavor.cond if field.column != "text"]:
        raise ConfigError(
            f"model.flavor: '{flavor.name}' also needs {', '.join(foreign)}, and generate takes only a prompt: "
            "choose a text-to-video flavor (`hvtrain models`)"
        )
    check_heads(flavor.arch.heads_num, ctx.ulysses)
    jobs = plan_jobs(cfg, flavor)
    if len(jobs) < ctx.dp:
        raise ConfigError(
            f"parallel: {len(jobs)} video(s) for {ctx.dp} data-parallel groups of processes; let the processes share "
            f"a video with parallel.ulysses={ctx.world} or parallel.ring={ctx.world}"
        )
    with torch.device("meta"):
        model = spec.build(found.arch)
    held = {name: source.shape(found.weights.shapes) for name, source in found.sources.items()}
    check(found.path, {name: tuple(t.shape) for name, t in model.state_dict().items()}, held)
    layers = linear_shapes(model)
    loras = open_loras(cfg, layers, spec, quiet=not ctx.is_main)
    size = min(cfg.batch_size, -(-len(jobs) // ctx.dp))  # no group without work
    return Plan(spec, flavor, batches(jobs, size), loras, layers)
