"""Optimizers and learning-rate schedules: one decorated function each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from hvtrain.config import OptimConfig
from hvtrain.errors import ConfigError
from hvtrain.registry import Registry

Schedule = Callable[[int], float]
OPTIMIZERS: Registry[Callable[..., torch.optim.Optimizer]] = Registry("optimizer")
SCHEDULES: Registry[Callable[[float, float], float]] = Registry("schedule")


@OPTIMIZERS.add("adamw")
def adamw(groups: list[dict], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Decoupled weight decay. arXiv 1711.05101"""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


@OPTIMIZERS.add("adam")
def adam(groups: list[dict], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Weight decay as part of the gradient. arXiv 1412.6980"""
    return torch.optim.Adam(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


@SCHEDULES.add("constant")
def constant(x: float, floor: float) -> float:
    return 1.0


@SCHEDULES.add("linear")
def linear(x: float, floor: float) -> float:
    return 1 - (1 - floor) * x


@SCHEDULES.add("cosine")
def cosine(x: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x))


def build_optimizer(
    params: Mapping[str, nn.Parameter], cfg: OptimConfig, ratios: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the named parameters. Weight decay acts on matrices, not on biases and norms. `ratios`: the rates of
    single parameters, as multiples of the common one."""
    check_optimizer(cfg)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in params.items():
        groups.setdefault((p.ndim >= 2, (ratios or {}).get(name, 1.0)), []).append(p)
    order = sorted(groups, key=lambda key: (key[1] != 1.0, not key[0]))  # the common rate is the one that is logged
    return OPTIMIZERS[cfg.name](
        [{"params": groups[key], "weight_decay": cfg.weight_decay * key[0], "lr": cfg.lr * key[1]} for key in order], cfg
    )


def check_optimizer(cfg: OptimConfig) -> None:
    OPTIMIZERS.find(cfg.name, key="optim.name")
    SCHEDULES.find(cfg.schedule, key="optim.schedule")


def build_schedule(cfg: OptimConfig, *, total_steps: int) -> Schedule:
    """Step (from 0) -> factor of the learning rate: a linear warm-up, then the named curve to the last step."""
    check_optimizer(cfg)
    if cfg.warmup_steps < 0 or cfg.warmup_steps > total_steps:
        raise ConfigError(f"optim.warmup_steps is {cfg.warmup_steps}: expected 0 to the run's {total_steps} steps")
    curve, rest = SCHEDULES[cfg.schedule], max(1, total_steps - cfg.warmup_steps)

    def factor(step: int) -> float:
        if step < cfg.warmup_steps:
            return (step + 1) / cfg.warmup_steps
        return curve(min(1.0, (step - cfg.warmup_steps) / rest), cfg.min_lr_ratio)

    return factor
