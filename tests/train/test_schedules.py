"""Every schedule's values, and the warm-up before them."""

from __future__ import annotations

import math

import pytest

from hvtrain.config import OptimConfig
from hvtrain.errors import ConfigError
from hvtrain.registry import Registry
from hvtrain.train import schedules
from hvtrain.train.schedules import SCHEDULES, build_schedule

COSINE = [(1 + math.cos(math.pi * x / 4)) / 2 for x in range(5)]
VALUES = [
    ("constant", {"min_lr_ratio": 0.5}, [1, 1, 1, 1, 1]),
    ("linear", {}, [1, 0.75, 0.5, 0.25, 0]),
    ("linear", {"min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
    ("cosine", {}, COSINE),
    ("cosine", {"min_lr_ratio": 0.2}, [0.2 + 0.8 * x for x in COSINE]),
    ("cosine", {"cycles": 2.0}, [1, 0.5, 1, 0.5, 0]),
    ("cosine", {"cycles": 0.5}, [(1 + math.cos(math.pi * x / 8)) / 2 for x in range(5)]),
    ("polynomial", {"power": 2.0}, [1, 0.5625, 0.25, 0.0625, 0]),
    ("polynomial", {"power": 2.0, "min_lr_ratio": 0.5}, [1, 0.78125, 0.625, 0.53125, 0.5]),
    ("inverse_sqrt", {}, [1, math.sqrt(3 / 4), math.sqrt(3 / 5), math.sqrt(3 / 6), math.sqrt(3 / 7)]),
    (
        "inverse_sqrt", {"timescale": 1, "min_lr_ratio": 0.5},
        [1, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5, 0.5]
    ),
    ("rex", {}, [1, 0.75 / 0.775, 0.5 / 0.55, 0.25 / 0.325, 0]),
    (
        "rex", {"rex": (0.5, 0.5), "min_lr_ratio": 0.1},
        [1, 0.1 + 0.9 * 0.75 / 0.875, 0.1 + 0.9 * 0.5 / 0.75, 0.46, 0.1]
    ),
    ("wsd", {"decay_share": 0.5}, [1, 1, 1, 0.5, 0]),
    ("wsd", {"decay_share": 1.0, "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
]


@pytest.mark.parametrize("name, more, factors", VALUES)
def test_every_schedule_s_values(name, more, factors):
    """A warm-up of three steps that reaches the whole rate in its last, then the curve over the other
    four."""
    factor = build_schedule(OptimConfig(schedule=name, warmup_steps=3, **more), total_steps=7)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [factor(step) for step in range(3, 8)] == pytest.approx(factors)
    late = max(more.get("min_lr_ratio", 0), math.sqrt(3 / 100)) if name == "inverse_sqrt" else factors[-1]
    assert factor(100) == pytest.approx(late)  # a longer run than foretold stays at the end


def test_no_schedule_is_left_out():
    assert {name for name, _, _ in VALUES} == set(SCHEDULES)


def test_a_schedule_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(schedules, "SCHEDULES", Registry("schedule"))

    @schedules.SCHEDULES.add("halved")
    def halved(at, cfg):
        return 0.5

    assert build_schedule(OptimConfig(schedule="halved"), total_steps=4)(2) == 0.5


def test_the_warm_up_fits_into_the_run():
    assert build_schedule(OptimConfig(warmup_steps=4), total_steps=4)(4) == 1.0
    none = build_schedule(OptimConfig(schedule="linear", warmup_steps=0, min_lr_ratio=0.0), total_steps=2)
    assert [none(0), none(1), none(2)] == [1.0, 0.5, 0.0]
    last = build_schedule(OptimConfig(schedule="linear", warmup_steps=3, min_lr_ratio=0.0), total_steps=4)
    assert [last(3), last(4)] == [1.0, 0.0]
    for wrong in (-1, 5):
        with pytest.raises(
            ConfigError, match=f"optim.warmup_steps is {wrong}: expected 0 to the run's 4 steps"
        ):
            build_schedule(OptimConfig(warmup_steps=wrong), total_steps=4)


def test_a_warm_up_as_a_share():
    factor = build_schedule(OptimConfig(warmup_share=0.25), total_steps=8)
    assert [factor(step) for step in range(3)] == [0.5, 1.0, 1.0]
    with pytest.raises(ConfigError, match="^optim: give either optim.warmup_steps or optim.warmup_share$"):
        build_schedule(OptimConfig(warmup_share=0.5, warmup_steps=1), total_steps=4)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"schedule": "cosin"}, "optim.schedule: no schedule 'cosin'; did you mean 'cosine'"),
        ({"cycles": 0.0}, "optim.cycles is 0.0, expected more than 0"),
        ({"power": -1.0}, "optim.power is -1.0, expected more than 0"),
        ({"timescale": -5}, "optim.timescale is -5, expected more than 0"),
        ({"rex": (0.0, 0.5)}, r"optim.rex\[0\] is 0.0, expected more than 0"),
        ({"rex": (0.1, -0.5)}, r"optim.rex\[1\] is -0.5, expected 0 to 1"),
        ({"warmup_share": 1.5}, "optim.warmup_share is 1.5, expected 0 to 1"),
        ({"min_lr_ratio": -0.5}, "optim.min_lr_ratio is -0.5, expected 0 to 1"),
        ({"decay_share": 0.0}, "optim.decay_share is 0.0, expected more than 0, at most 1"),
        ({"decay_share": 1.5}, "optim.decay_share is 1.5, expected more than 0, at most 1"),
    ],
)
def test_numbers_that_make_no_curve(wrong, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        build_schedule(OptimConfig(**wrong), total_steps=4)


def test_the_ends_of_what_is_allowed():
    """0 and 1 are shares: a rate that never falls, one that falls all the way, a curve that is a line."""
    shares = OptimConfig(schedule="rex", min_lr_ratio=1.0, rex=(1.0, 0.0), decay_share=1.0)
    assert build_schedule(shares, total_steps=4)(3) == 1.0
    line = build_schedule(OptimConfig(schedule="rex", min_lr_ratio=0.0, rex=(1.0, 0.0)), total_steps=4)
    assert [line(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    warm = build_schedule(OptimConfig(warmup_share=1.0), total_steps=4)
    assert [warm(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
