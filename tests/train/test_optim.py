"""Optimizers and schedules: what they are told, what one step does, and every curve's values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvtrain.config import OptimConfig
from hvtrain.errors import ConfigError
from hvtrain.registry import Registry
from hvtrain.train import optim
from hvtrain.train.optim import build_optimizer, build_schedule

CFG = OptimConfig(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5)


def parameters() -> dict[str, nn.Parameter]:
    values = {"matrix": [[2.0, -1.0]], "bias": [3.0], "kernel": [[[0.5]]]}
    return {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_optimizer_is_told_what_the_config_says(name, kind):
    params = parameters()
    found = build_optimizer(params, OptimConfig(name, 0.1, (0.8, 0.95), 1e-3, 0.5))
    assert type(found) is kind
    groups = [{k: g[k] for k in ("lr", "betas", "eps", "weight_decay")} for g in found.param_groups]
    told = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}
    assert groups == [{**told, "weight_decay": 0.5}, {**told, "weight_decay": 0.0}]
    assert [[id(p) for p in g["params"]] for g in found.param_groups] == [
        [id(params["matrix"]), id(params["kernel"])], [id(params["bias"])],
    ]  # fmt: skip
    assert all(g["fused"] for g in found.param_groups)


def test_two_steps_of_adamw_by_hand():
    """Moments with their own decays, corrected for their start; weight decay beside the gradient, on matrices only."""
    params = parameters()
    optimizer = build_optimizer(params, CFG)
    want = {name: p.detach().double().clone() for name, p in params.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in want.items()} for _ in range(2))
    for step, grad in enumerate((0.5, -2.0), start=1):
        for name, p in params.items():
            p.grad = torch.full_like(p, grad)
            decay = 0.0 if name == "bias" else 0.5
            m[name] = 0.8 * m[name] + 0.2 * grad
            v[name] = 0.95 * v[name] + 0.05 * grad**2
            first, second = m[name] / (1 - 0.8**step), v[name] / (1 - 0.95**step)
            want[name] = want[name] * (1 - 0.1 * decay) - 0.1 * first / (second.sqrt() + 1e-3)
        optimizer.step()
    for name, p in params.items():
        assert p.flatten().tolist() == pytest.approx(want[name].flatten().tolist(), rel=1e-5), name


def test_weight_decay_moves_matrices_and_nothing_else():
    params = parameters()
    optimizer = build_optimizer(params, CFG)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {name: p.flatten().tolist() for name, p in params.items()}
    assert shrunk["matrix"] == pytest.approx([1.9, -0.95]) and shrunk["kernel"] == pytest.approx([0.475])
    assert shrunk["bias"] == [3.0]


def test_no_empty_group_and_no_unknown_name():
    params = parameters()
    assert len(build_optimizer({"bias": params["bias"]}, CFG).param_groups) == 1
    assert len(build_optimizer({"matrix": params["matrix"]}, CFG).param_groups) == 1
    with pytest.raises(ConfigError, match=r"optim.name: no optimizer 'adamww'; did you mean 'adamw'"):
        build_optimizer(params, OptimConfig("adamww"))
    with pytest.raises(ConfigError, match=r"optim.schedule: no schedule 'cosin'; did you mean 'cosine'"):
        build_schedule(OptimConfig(schedule="cosin"), total_steps=4)


def test_an_optimizer_and_a_schedule_are_one_decorated_function_each(monkeypatch):
    monkeypatch.setattr(optim, "OPTIMIZERS", Registry("optimizer"))
    monkeypatch.setattr(optim, "SCHEDULES", Registry("schedule"))

    @optim.OPTIMIZERS.add("sgd")
    def sgd(groups, cfg):
        return torch.optim.SGD(groups, lr=cfg.lr)

    @optim.SCHEDULES.add("halved")
    def halved(x, floor):
        return 0.5

    cfg = OptimConfig("sgd", schedule="halved", warmup_steps=0)
    assert type(build_optimizer(parameters(), cfg)) is torch.optim.SGD
    assert build_schedule(cfg, total_steps=4)(2) == 0.5


@pytest.mark.parametrize(
    "name, floor, factors",
    [
        ("constant", 0.5, [1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0.2, [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * x / 4)) / 2 for x in range(5)]),
        ("cosine", 0.2, [0.2 + 0.8 * (1 + math.cos(math.pi * x / 4)) / 2 for x in range(5)]),
    ],
)
def test_every_schedule_s_values(name, floor, factors):
    """A warm-up of three steps that reaches the whole rate in its last, then the curve over the other four."""
    factor = build_schedule(OptimConfig(schedule=name, min_lr_ratio=floor, warmup_steps=3), total_steps=7)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [factor(step) for step in range(3, 8)] == pytest.approx(factors)
    assert factor(100) == pytest.approx(factors[-1])  # a longer run than foretold stays at the end


def test_the_warm_up_fits_into_the_run():
    assert build_schedule(OptimConfig(warmup_steps=4), total_steps=4)(4) == 1.0
    none = build_schedule(OptimConfig(schedule="linear", warmup_steps=0, min_lr_ratio=0.0), total_steps=2)
    assert [none(0), none(1), none(2)] == [1.0, 0.5, 0.0]
    last = build_schedule(OptimConfig(schedule="linear", warmup_steps=3, min_lr_ratio=0.0), total_steps=4)
    assert [last(3), last(4)] == [1.0, 0.0]
    for wrong in (-1, 5):
        with pytest.raises(ConfigError, match=f"optim.warmup_steps is {wrong}: expected 0 to the run's 4 steps"):
            build_schedule(OptimConfig(warmup_steps=wrong), total_steps=4)
