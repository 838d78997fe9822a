"""All of a run that can be known, and refused, before any weights are read: from headers, names and the shards' manifests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from hvtrain.adapters.lora import linear_shapes
from hvtrain.config import AdapterConfig, TrainConfig, asset
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.flow.timesteps import quantile_function
from hvtrain.generate.requests import Request
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.kernels import pick_kernel
from hvtrain.models.load import identify, whole_model
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.context import ParallelContext, check_heads
from hvtrain.parallel.recompute import pick_policy
from hvtrain.slices.plan import SlicePlan
from hvtrain.train import checkpoint
from hvtrain.train.encoders import check_encoders
from hvtrain.train.engine import check_engine
from hvtrain.train.optim import build_schedule, check_optimizer
from hvtrain.train.rundir import claim
from hvtrain.train.runlock import RunLock
from hvtrain.train.setup import (
    check_lengths,
    engine_config,
    flow_of,
    identity,
    open_plan,
    open_shards,
    total_steps,
)
from hvtrain.weights.containers import fingerprint
from shards import ShardError, ShardSet

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    cfg: TrainConfig  # with the flavor's own values where the config leaves them to it
    spec: ModelSpec
    flavor: Flavor
    fingerprint: str  # of the weights that training starts from
    plan: SlicePlan | None  # of a LORAID slice
    sets: list[ShardSet]
    held_out: list[ShardSet]
    steps: int  # of the whole run


def prepare(cfg: TrainConfig, ctx: ParallelContext) -> Prepared:
    """Raises what any rank has to say, on all ranks alike. Collective."""
    return on_all(ctx, lambda: _prepare(cfg, ctx))


def on_all(ctx: ParallelContext, work: Callable[[], T]) -> T:
    """`work` on every rank; the first refusal of any (a file that one node lacks) is raised on all of them. Collective."""
    refusal, result = None, None
    try:
        result = work()
    except (HvtrainError, ShardError, OSError) as error:
        refusal = error
    said = [error for error in ctx.gather_objects(refusal) if error is not None]
    if refusal or said:
        raise refusal or said[0]
    return result  # type: ignore[return-value]


def take(cfg: TrainConfig, ctx: ParallelContext, prepared: Prepared) -> tuple[RunLock, Path | None]:
    """The run's directory, held by rank 0, and the checkpoint to continue from. Refusals are raised on all ranks alike.

    Raises ConfigError, CheckpointError and Busy. Collective.
    """
    lock, found = RunLock(cfg.run.output_dir), None

    def claimed() -> None:
        nonlocal lock, found
        if not ctx.is_main:
            return
        own = identity(cfg, prepared.fingerprint, prepared.plan, prepared.sets)
        lock = claim(cfg, own, ctx, say)
        try:
            found = checkpoint.newest_sound(Path(cfg.run.output_dir) / "checkpoints", say)
        except BaseException:
            lock.release()
            raise

    on_all(ctx, claimed)
    return lock, ctx.gather_objects(found)[0]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _prepare(cfg: TrainConfig, ctx: ParallelContext) -> Prepared:
    check_engine(engine_config(cfg))
    check_optimizer(cfg.optim)
    pick_policy(cfg.run.recompute)
    if cfg.parallel.kernel == xfuser_path.NAME:
        xfuser_path.refuse(ctx, training=True)
    else:
        dtype = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
        pick_kernel(cfg.parallel.kernel, device=ctx.device, dtype=dtype, training=True)
    model, spec, flavor, base = _outline(cfg)
    cfg = replace(cfg, flow=flow_of(cfg.flow, flavor))
    quantile_function(cfg.flow.timestep_sampling, cfg.flow)
    check_heads(flavor.n_heads, ctx.ulysses)
    plan = None
    if cfg.adapter.type != "none":
        plan = open_plan(model, spec, flavor, cfg, base) if cfg.adapter.type == "loraid" else None
        _check_rank(model, spec, cfg.adapter, plan)
    if cfg.preview.every_steps and flavor.beyond_text:
        raise ConfigError(
            f"preview.every_steps: '{flavor.name}' also needs {', '.join(flavor.beyond_text)}, and a preview has only a prompt; "
            "set it to 0"
        )
    for p in cfg.preview.prompts if cfg.preview.every_steps else ():
        Request.of(flavor, prompt=p.prompt, width=p.width, height=p.height, frames=p.frames, steps=p.steps)
    sets = open_shards(cfg.data.shards, flavor, key="data.shards")
    held_out = open_shards(cfg.eval.shards, flavor, key="eval.shards")
    if not cfg.data.allow_foreign:
        check_encoders({"data.shards": sets, "eval.shards": held_out}, flavor.columns, cfg.model, spec)
    steps = total_steps(cfg, sum(len(s) for s in sets), dp=ctx.dp)
    check_lengths(cfg, steps)
    build_schedule(cfg.optim, total_steps=steps)
    return Prepared(cfg, spec, flavor, base, plan, sets, held_out, steps)


def _outline(cfg: TrainConfig) -> tuple[DiT, ModelSpec, Flavor, str]:
    """The model on the meta device, and the fingerprint of its weights. Of a file only the header and samples are read."""
    if cfg.model.dit is None:
        spec = find(cfg.model.name)
        flavor = spec.flavor(cfg.model.flavor)
        with torch.device("meta"):
            return spec.build(flavor.arch), spec, flavor, "scratch"
    found = identify(asset(cfg.model.dit), model=cfg.model.name, flavor=cfg.model.flavor)
    return whole_model(found), found.spec, found.flavor, fingerprint(found.weights)


def _check_rank(model: DiT, spec: ModelSpec, a: AdapterConfig, plan: SlicePlan | None) -> None:
    """A pair of a higher rank than its layer says nothing more, and an absurd one fills the host's memory."""
    names = spec.lora_targets(model, include=a.include, exclude=a.exclude)
    if plan is not None:
        names = [s.module for s in plan.slice(a.loraid or 0).slots]
    shapes = linear_shapes(model)
    largest = max(names, key=lambda name: min(shapes[name]))
    bound, (n_out, n_in) = min(shapes[largest]), shapes[largest]
    if a.rank > bound:
        raise ConfigError(
            f"adapter.rank is {a.rank}, but a layer of {n_in} x {n_out} ('{largest}', the largest it adapts) has no more than "
            f"{bound}; expected 1 to {bound}, as a rule 8 to 128"
        )
