"""The nearest config that fits: one change after the other, the cheapest in time first, until the budget is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hvtrain.config import TrainConfig
from hvtrain.fit.estimate import Estimate, Subject, degrees, of_training, swap_for
from hvtrain.fit.trace import Shape

USABLE = 0.94  # of a GPU's memory; the rest is the CUDA context, the allocator's gaps and the kernels' own


@dataclass(frozen=True)
class Fit:
    """A config as overrides of the given one, and what it needs."""

    changes: tuple[str, ...]
    estimate: Estimate


def nearest(cfg: TrainConfig, about: Subject, shape: Shape, gpus: int, memory: int) -> Fit | None:
    """The first that fits into `memory` bytes a GPU, the given config itself included; None if nothing does."""
    changes: tuple[str, ...] = ()
    estimate = of_training(cfg, about, shape, gpus)
    if fits(estimate, memory):
        return Fit(changes, estimate)
    for change, changed in _ladder(cfg, about, gpus):
        changes = (*[c for c in changes if c.partition("=")[0] != change[0].partition("=")[0]], *change)
        cfg, estimate = changed, of_training(changed, about, shape, gpus)
        if fits(estimate, memory):
            return Fit(changes, estimate)
    if cfg.adapter.type == "none" or cfg.zero.stage == 3:
        return None
    blocks = swap_for(cfg, about, estimate.budget.total - int(USABLE * memory))
    if blocks is None:
        return None
    cfg = replace(cfg, run=replace(cfg.run, blocks_to_swap=blocks))
    return Fit((*changes, f"run.blocks_to_swap={blocks}"), of_training(cfg, about, shape, gpus))


def fits(estimate: Estimate, memory: int) -> bool:
    return estimate.budget.total <= USABLE * memory


def _ladder(cfg: TrainConfig, about: Subject, gpus: int) -> Iterator[tuple[tuple[str, ...], TrainConfig]]:
    """Each step keeps those before it."""
    policies: list[Literal["none", "selective", "full"]] = ["none", "selective", "full"]
    if cfg.run.recompute in policies:
        for policy in policies[policies.index(cfg.run.recompute) + 1 :]:
            cfg = replace(cfg, run=replace(cfg.run, recompute=policy))
            yield (f"run.recompute={policy}",), cfg
    whole = cfg.adapter.type == "none"
    if whole and gpus > 1 and cfg.zero.engine == "deepspeed" and cfg.zero.stage < 3:
        cfg = replace(cfg, zero=replace(cfg.zero, stage=3))
        yield ("zero.stage=3",), cfg
    own = cfg.parallel.ulysses * cfg.parallel.ring
    for size in [n for n in range(own + 1, gpus + 1) if gpus % n == 0]:
        ulysses, ring = degrees(about.flavor.n_heads, size)[0]
        cfg = replace(cfg, parallel=replace(cfg.parallel, ulysses=ulysses, ring=ring))
        yield (f"parallel.ulysses={ulysses}", f"parallel.ring={ring}"), cfg
    if whole and cfg.zero.engine == "deepspeed" and cfg.zero.stage > 0 and cfg.zero.offload_optimizer == "none":
        cfg = replace(cfg, zero=replace(cfg.zero, offload_optimizer="cpu"))
        yield ("zero.offload_optimizer=cpu",), cfg
    if cfg.run.recompute != "offload":
        cfg = replace(cfg, run=replace(cfg.run, recompute="offload"))
        yield ("run.recompute=offload",), cfg
    if whole and cfg.zero.stage == 3 and cfg.zero.offload_param == "none":
        cfg = replace(cfg, zero=replace(cfg.zero, offload_param="cpu"))
        yield ("zero.offload_param=cpu",), cfg
    if not whole and cfg.model.quantize == "none" and cfg.zero.stage < 3:
        cfg = replace(cfg, model=replace(cfg.model, quantize="fp8_scaled"))
        yield ("model.quantize=fp8_scaled",), cfg
