"""Optimizers: what they are told, what one step does, which of them ZeRO may cut up, and
what a continued run gets back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvtrain.config import OptimConfig, ZeroConfig
from hvtrain.errors import ConfigError
from hvtrain.registry import Registry
from hvtrain.train import optim
from hvtrain.train.engine import LearningRate
from hvtrain.train.optim import OPTIMIZERS, build_optimizer, check_optimizer, state_bytes
from hvtrain.train.optstate import export_plain_state, load_plain_state, settled

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
    """Moments with their own decays, corrected for their start; weight decay beside the
    gradient, on matrices only."""
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


def test_an_optimizer_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(optim, "OPTIMIZERS", Registry("optimizer"))

    class Averaging(torch.optim.SGD):
        trains = False

        def train(self):
            self.trains = True

    @optim.optimizer("sgd", least_lr=0.5)
    def sgd(groups, cfg):
        return Averaging(groups, lr=cfg.lr, **cfg.args)

    found = build_optimizer(parameters(), OptimConfig("sgd", args={"momentum": 0.5}))
    assert type(found) is Averaging and found.param_groups[0]["momentum"] == 0.5 and found.trains
    with pytest.raises(ConfigError, match="optim.lr is 0.1: sgd finds its rate"):
        check_optimizer(OptimConfig("sgd", lr=0.1))


# --- the first step of each, by its paper -------------------------------------------------------------------

GRADIENT = torch.tensor([[0.5, -2.0], [1.0, 0.25]])
START = torch.tensor([[2.0, -1.0], [0.5, 4.0]])


def stepped(name: str, *, n: int = 1, key: str = "blocks.0.w", **options) -> torch.Tensor:
    p = nn.Parameter(START.clone())
    cfg = OptimConfig(name, **{"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.5, **options})
    optimizer = build_optimizer({key: p}, cfg)
    for _ in range(n):
        p.grad = GRADIENT.clone()
        optimizer.step()
    return p.detach()


def test_rates_of_single_parameters_are_multiples():
    params = parameters()
    found = build_optimizer(params, CFG, {"kernel": 16.0})
    rates = {id(p): g["lr"] for g in found.param_groups for p in g["params"]}
    assert {name: rates[id(p)] for name, p in params.items()} == {
        "matrix": 0.1, "bias": 0.1, "kernel": pytest.approx(1.6)
    }
    assert found.param_groups[0]["lr"] == 0.1  # which is logged


def test_lion_takes_the_sign():
    """Of the momentum and the gradient, by the first beta; the momentum goes by the second."""
    assert torch.allclose(stepped("lion"), START * (1 - 0.1 * 0.5) - 0.1 * GRADIENT.sign())
    p = nn.Parameter(START.clone())
    optimizer = build_optimizer({"w": p}, OptimConfig("lion", 0.1, (0.8, 0.95), weight_decay=0.0))
    for share in (1.0, -0.1):  # 0.8 (1 - 0.95) against 0.1 (1 - 0.8): the first still leads
        p.grad = share * GRADIENT
        optimizer.step()
    assert torch.allclose(p, START - 0.2 * GRADIENT.sign())


def test_muon_steps_what_it_leaves_to_adamw():
    params = {"blocks.0.w": nn.Parameter(START.clone()), "head.w": nn.Parameter(START.clone())}
    optimizer = build_optimizer(params, OptimConfig("muon", 0.1, (0.8, 0.95), weight_decay=0.0))
    for p in params.values():
        p.grad = GRADIENT.clone()
    optimizer.step()
    assert torch.allclose(params["head.w"], START - 0.1 * GRADIENT.sign(), atol=1e-4)
    assert (params["blocks.0.w"] - START).norm().item() == pytest.approx(0.1 * 0.2 * 2**0.5 * 2**0.5, rel=0.5)


def test_adafactor_knows_rows_and_columns():
    """In its first step the second moment is the gradient's own, and the step is a
    share of the weights' size."""
    square = GRADIENT.square()
    row, column = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    update = GRADIENT / (row @ column / row.mean()).sqrt()
    update /= update.square().mean().sqrt().clamp(min=1.0)
    rate = START.square().mean().sqrt() * 0.1
    assert torch.allclose(stepped("adafactor"), START * (1 - 0.1 * 0.5) - rate * update, rtol=1e-5)


def test_came_is_adafactor_with_a_momentum_that_doubts_itself():
    def root(row, column):
        return (row / row.mean(-1, keepdim=True)).rsqrt()[:, None] * column.rsqrt()[None]

    square = (GRADIENT.square() + 1e-30) * 0.05
    update = GRADIENT * root(square.mean(1), square.mean(0))
    update /= update.square().mean().sqrt().clamp(min=1.0)
    moment = 0.2 * update
    doubt = ((update - moment).square() + 1e-16) * 1e-4
    want = START * (1 - 0.1 * 0.5) - 0.1 * moment * root(doubt.mean(1), doubt.mean(0))
    assert torch.allclose(stepped("came"), want, rtol=1e-4)


def test_prodigy_begins_small_and_finds_its_rate():
    far = stepped("prodigy", n=60, lr=1.0, weight_decay=0.0) - START
    near = stepped("prodigy", n=1, lr=1.0, weight_decay=0.0) - START
    assert near.abs().max() < 1e-4 < 0.1 < far.abs().min() and (far.sign() == -GRADIENT.sign()).all()


def test_prodigy_takes_no_rates_of_single_parameters():
    """It would silently use the first group's."""
    check_optimizer(OptimConfig("adamw"), ratios=True)
    with pytest.raises(
        ConfigError, match="adapter.lr_ratios: prodigy has one rate for all parameters; leave them out"
    ):
        check_optimizer(OptimConfig("prodigy", lr=1.0), ratios=True)


def test_the_rate_that_is_shown_of_prodigy_is_what_it_found():
    p = nn.Parameter(START.clone())
    optimizer = build_optimizer({"w": p}, OptimConfig("prodigy", lr=1.0))
    rate = LearningRate(optimizer, lambda n: 0.5)
    assert rate.set(0) == pytest.approx(0.5e-6)
    for _ in range(20):
        p.grad = GRADIENT.clone()
        optimizer.step()
    assert rate.set(0) == 0.5 * optimizer.param_groups[0]["d"] > 1e-5


def test_muon_steps_an_orthogonal_matrix_in_a_block_and_adamw_elsewhere():
    moved = (START * (1 - 0.1 * 0.5) - stepped("muon")) / (0.1 * 0.2 * 2**0.5)
    # five quintic steps: nearly
    assert torch.linalg.svdvals(moved).tolist() == pytest.approx([1.0, 1.0], abs=0.35)
    assert not torch.allclose(stepped("muon", key="final.w"), stepped("muon"))
    assert torch.equal(stepped("muon", key="final.w"), stepped("adamw", key="final.w"))


def test_what_adamw_does_beside_muon_and_the_rates_of_both():
    params = {"blocks.0.w": nn.Parameter(START.clone()), "blocks.0.b": nn.Parameter(START[0].clone())}
    optimizer = build_optimizer(params, OptimConfig("muon", 0.1, args={"momentum": 0.5}))
    LearningRate(optimizer, lambda n: 0.0).set(0)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # the rate reaches both
    assert torch.equal(params["blocks.0.w"], START) and torch.equal(params["blocks.0.b"], START[0])
    assert (
        [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
        and optimizer.param_groups[0]["momentum"] == 0.5
    )


def test_schedule_free_trains_between_an_average_and_where_the_gradients_lead():
    """z takes the steps, x averages z, y = 0.2 z + 0.8 x trains; x is what is used,
    and y comes back to the bit."""
    p = nn.Parameter(START.clone())
    optimizer = build_optimizer({"w": p}, OptimConfig("schedulefree", 0.1, (0.8, 0.95), 1e-8, 0.0))
    z, v, x = START.clone(), torch.zeros_like(START), START.clone()
    for step in range(1, 4):
        p.grad = GRADIENT.clone() * step
        v = 0.95 * v + 0.05 * p.grad.square()
        z = z - 0.1 * p.grad / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        x = x + (z - x) / step
        optimizer.step()
        before = p.detach().clone()
        assert torch.allclose(before, 0.2 * z + 0.8 * x, atol=1e-6)
        with settled(optimizer, {"w": p}):
            assert torch.allclose(p, x, atol=1e-6) and (step == 1 or not torch.allclose(p, before, atol=1e-3))
        assert torch.equal(p, before)


# --- ZeRO, classes by path, and what is refused -------------------------------------------------------------

WHOLE = {"adafactor", "came", "prodigy", "schedulefree", "muon", "adamw8bit"}
RATES = {"prodigy": 1.0}


def test_those_that_look_at_whole_parameters_are_refused_where_zero_cuts_them():
    assert {name for name, kind in OPTIMIZERS.items() if kind.whole} == WHOLE
    for name in WHOLE - {"adamw8bit"}:
        cfg = OptimConfig(name, RATES.get(name, 1e-3))
        check_optimizer(cfg, ZeroConfig(stage=0))
        check_optimizer(cfg, ZeroConfig(engine="torch", stage=2))
        says = (
            rf"optim.name: {name} .*, and ZeRO stage 1 cuts .*use zero.stage=0, or one of adamw, adam, lion"
        )
        with pytest.raises(ConfigError, match=says):
            check_optimizer(cfg, ZeroConfig(stage=1))
    for name in ("adamw", "adam", "lion"):
        check_optimizer(OptimConfig(name), ZeroConfig(stage=3))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adamw8bit"}))
def test_the_table_is_what_a_trial_says(name, monkeypatch):
    """The trial that judges classes by their path agrees with the table on all of its entries."""
    says = optim._looks_around(OptimConfig(name, RATES.get(name, 1e-2)))
    assert bool(says) == (name in WHOLE), says


def test_a_class_by_its_path():
    cfg = OptimConfig("torch.optim.SGD", args={"momentum": 0.9})
    check_optimizer(cfg, ZeroConfig(stage=2))
    found = build_optimizer(parameters(), cfg)
    assert type(found) is torch.optim.SGD and [g["momentum"] for g in found.param_groups] == [0.9, 0.9]
    assert [g["weight_decay"] for g in found.param_groups] == [0.01, 0.0]
    with pytest.raises(
        ConfigError, match="torch.optim.Adafactor does another step with a matrix than with its pieces"
    ):
        check_optimizer(OptimConfig("torch.optim.Adafactor"), ZeroConfig(stage=2))
    for cfg, says in [
        (OptimConfig("torch.optim.SGDD"), "torch.optim has no 'SGDD'; did you mean 'SGD'"),
        (OptimConfig("torch.nn.Linear"), "torch.nn.Linear is no subclass of torch.optim.Optimizer"),
        (OptimConfig("gone.Optimizer"), "gone.Optimizer needs 'gone', which is not installed: pip install "
        "gone"),
        (OptimConfig("prodigy"), "optim.lr is 0.0001: prodigy finds its rate, and this is a factor on it; "
        "use optim.lr=1"),
    ]:
        with pytest.raises(ConfigError, match=says):
            check_optimizer(cfg)
    for name in ("adamw", "lion", "torch.optim.SGD"):
        with pytest.raises(ConfigError, match=f"optim.args: {name} does not take them: .*"):
            check_optimizer(OptimConfig(name, args={"lrr": 1.0}))


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adamw8bit"}))
def test_memory_is_told_as_it_is(name):
    p = nn.Parameter(torch.ones(512, 512))
    optimizer = build_optimizer({"blocks.0.w": p}, OptimConfig(name))
    p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(v.nbytes for v in optimizer.state[p].values() if torch.is_tensor(v)) / p.numel()
    assert (
        held == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.05)
        and state_bytes(name) == OPTIMIZERS[name].state_bytes
    )
    assert state_bytes("torch.optim.SGD") == 8.0


# --- a run that goes on -------------------------------------------------------------------------------------


def run_on(optimizer, params, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("name", [*sorted(set(OPTIMIZERS) - {"adamw8bit"}), "torch.optim.SGD"])
def test_state_goes_out_and_comes_back_to_the_bit(name):
    args = {"momentum": 0.9} if name == "torch.optim.SGD" else {}
    cfg = OptimConfig(name, RATES.get(name, 1e-2), args=args)

    def fresh():
        params = {"blocks.0.w": nn.Parameter(START.clone()), "blocks.0.b": nn.Parameter(START[0].clone())}
        return params, build_optimizer(params, cfg)

    params, whole = fresh()
    run_on(whole, params, range(3))
    with settled(whole, params):
        used = {name: p.detach().clone() for name, p in params.items()}
    state = export_plain_state(whole, params)
    run_on(whole, params, range(3, 6))
    again, other = fresh()
    load_plain_state(other, again, used, state)
    with settled(other, again):
        assert all(torch.equal(again[name], used[name]) for name in used)
    run_on(other, again, range(3, 6))
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert not torch.equal(params["blocks.0.w"], used["blocks.0.w"])
    left, right = export_plain_state(whole, params), export_plain_state(other, again)
    assert {n: sorted(s) for n, s in left.items()} == {n: sorted(s) for n, s in right.items()}
    assert all(torch.equal(left[n][k], right[n][k]) for n in left for k in left[n])


@pytest.mark.slow
def test_moments_of_8_bits_come_back_to_the_bit():
    pytest.importorskip("torchao", reason="the 8-bit optimizer needs torchao: pip install hvtrain[adamw8bit]")
    cfg = OptimConfig("adamw8bit", 1e-2)

    def fresh():
        params = {"blocks.0.w": nn.Parameter(torch.ones(64, 64)), "b": nn.Parameter(torch.ones(2))}
        optimizer = build_optimizer(params, cfg)
        LearningRate(optimizer, lambda n: 1.0).set(0)
        return params, optimizer

    params, whole = fresh()
    run_on(whole, params, range(3))
    used = {name: p.detach().clone() for name, p in params.items()}
    state = export_plain_state(whole, params)
    assert state["blocks.0.w"]["exp_avg.codes"].dtype == torch.uint8 and "exp_avg" in state["b"]
    run_on(whole, params, range(3, 6))
    again, other = fresh()
    load_plain_state(other, again, used, state)
    run_on(other, again, range(3, 6))
    assert all(torch.equal(params[name], again[name]) for name in params)
