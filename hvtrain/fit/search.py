"""The nearest config that fits: one change after the other, the cheapest in time
first, until the budget is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hvtrain.fit.estimate import Candidate, Estimate, Training, degrees, of_training, swap_for
from hvtrain.fit.trace import Shape

USABLE = 0.94  # of a GPU's memory; the rest is the CUDA context, the allocator's gaps and the kernels' own


@dataclass(frozen=True)
class Fit:
    """A config as overrides of the given one, and what it needs."""

    changes: tuple[str, ...]
    estimate: Estimate


def nearest(cfg: Training, about: Candidate, shape: Shape, gpus: int, memory: int) -> Fit | None:
    """The first that fits into `memory` bytes a GPU, the given config itself
    included; None if nothing does."""
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
    change, cfg = _change(cfg, "run", blocks_to_swap=blocks)
    return Fit((*changes, *change), of_training(cfg, about, shape, gpus))


def fits(estimate: Estimate, memory: int) -> bool:
    return estimate.budget.total <= USABLE * memory


def _change(cfg: Training, section: str, **values: Any) -> tuple[tuple[str, ...], Training]:
    """As overrides, and made."""
    changed = replace(getattr(cfg, section), **values)
    return (
        tuple(f"{section}.{key}={value}" for key, value in values.items()), replace(cfg, **{section: changed})
    )


def _ladder(cfg: Training, about: Candidate, gpus: int) -> Iterator[tuple[tuple[str, ...], Training]]:
    """Each step keeps those before it."""

    def step(section: str, **values: Any) -> tuple[tuple[str, ...], Training]:
        nonlocal cfg
        change, cfg = _change(cfg, section, **values)
        return change, cfg

    policies = ["none", "selective", "full"]
    if cfg.run.recompute in policies:
        for policy in policies[policies.index(cfg.run.recompute) + 1 :]:
            yield step("run", recompute=policy)
    whole, sharded = cfg.adapter.type == "none", cfg.zero.engine == "deepspeed"
    if whole and gpus > 1 and sharded and cfg.zero.stage < 3:
        yield step("zero", stage=3)
    own = cfg.parallel.ulysses * cfg.parallel.ring
    for size in [n for n in range(own + 1, gpus + 1) if gpus % n == 0]:
        for ulysses, ring in degrees(about.flavor.n_heads, size, cfg.sparse)[:1]:
            yield step("parallel", ulysses=ulysses, ring=ring)
    if whole and sharded and cfg.zero.stage > 0 and cfg.zero.offload_optimizer == "none":
        yield step("zero", offload_optimizer="cpu")
    if cfg.run.recompute != "offload":
        yield step("run", recompute="offload")
    if whole and cfg.zero.stage == 3 and cfg.zero.offload_param == "none":
        yield step("zero", offload_param="cpu")
    if not whole and cfg.model.quantize == "none" and cfg.zero.stage < 3:
        yield step("model", quantize="fp8_scaled")
