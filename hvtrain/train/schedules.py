"""Learning-rate schedules: one decorated function each, and the warm-up before them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hvtrain.config import OptimConfig
from hvtrain.errors import ConfigError
from hvtrain.registry import Registry

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class At:
    """A place after the warm-up."""

    step: int  # 0: the first with the whole rate
    share: float  # of the way to the last step, 0 to 1
    warmup: int  # steps there were


SCHEDULES: Registry[Callable[[At, OptimConfig], float]] = Registry("schedule")


@SCHEDULES.add("constant")
def constant(at: At, cfg: OptimConfig) -> float:
    return 1.0


@SCHEDULES.add("linear")
def linear(at: At, cfg: OptimConfig) -> float:
    return _between(1 - at.share, cfg)


@SCHEDULES.add("cosine")
def cosine(at: At, cfg: OptimConfig) -> float:
    """cfg.cycles times from 1 down, each beginning with the whole rate again; 0.5
    ends half way. arXiv 1608.03983"""
    inside = 1.0 if at.share >= 1 and cfg.cycles % 1 == 0 else at.share * cfg.cycles % 1
    return _between(0.5 * (1 + math.cos(math.pi * inside)), cfg)


@SCHEDULES.add("polynomial")
def polynomial(at: At, cfg: OptimConfig) -> float:
    return _between((1 - at.share) ** cfg.power, cfg)


@SCHEDULES.add("inverse_sqrt")
def inverse_sqrt(at: At, cfg: OptimConfig) -> float:
    """sqrt(t / (t + step)), t = optim.timescale, else the warm-up's length: half after
    3 t steps. arXiv 1706.03762"""
    scale = cfg.timescale or max(1, at.warmup)
    return max(cfg.min_lr_ratio, math.sqrt(scale / (scale + at.step)))


@SCHEDULES.add("rex")
def rex(at: At, cfg: OptimConfig) -> float:
    """Reflected exponential, z / (a + b z) of the share z that is left: high for long,
    then down. arXiv 2107.04197"""
    left, (a, b) = 1 - at.share, cfg.rex
    return _between(left / (a + b * left), cfg)


@SCHEDULES.add("wsd")
def wsd(at: At, cfg: OptimConfig) -> float:
    """Warm-up, stable, decay: the last cfg.decay_share of the way goes down in a line. arXiv 2404.06395"""
    return _between(min(1.0, (1 - at.share) / cfg.decay_share), cfg)


def _between(height: float, cfg: OptimConfig) -> float:
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * height


def build_schedule(cfg: OptimConfig, *, total_steps: int) -> Schedule:
    """Step (from 0) -> factor of the learning rate: a linear warm-up, then the
    named curve to the last step."""
    curve = check_schedule(cfg)
    warmup = cfg.warmup_steps or round(cfg.warmup_share * total_steps)
    if not 0 <= warmup <= total_steps:
        raise ConfigError(f"optim.warmup_steps is {warmup}: expected 0 to the run's {total_steps} steps")
    rest = max(1, total_steps - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return curve(At(step - warmup, min(1.0, (step - warmup) / rest), warmup), cfg)

    return factor


def check_schedule(cfg: OptimConfig) -> Callable[[At, OptimConfig], float]:
    """The named curve. Raises ConfigError for a number that it cannot take."""
    curve = SCHEDULES.find(cfg.schedule, key="optim.schedule")
    if cfg.warmup_steps and cfg.warmup_share:
        raise ConfigError("optim: give either optim.warmup_steps or optim.warmup_share")
    positive = {
        "cycles": cfg.cycles, "power": cfg.power, "timescale": cfg.timescale or 1, "rex[0]": cfg.rex[0]
    }
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"optim.{key} is {value}, expected more than 0")
    shares = {"warmup_share": cfg.warmup_share, "min_lr_ratio": cfg.min_lr_ratio, "rex[1]": cfg.rex[1]}
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"optim.{key} is {value}, expected 0 to 1")
    if not 0 < cfg.decay_share <= 1:
        raise ConfigError(f"optim.decay_share is {cfg.decay_share}, expected more than 0, at most 1")
    return curve
