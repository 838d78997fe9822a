"""Noise levels, guidance, solvers and the sigma schedule: values from the formulas."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from hvtrain.config import FlowConfig
from hvtrain.errors import ConfigError
from hvtrain.flow import timesteps
from hvtrain.flow.guidance import classifier_free
from hvtrain.flow.loss import add_noise, squared_error, target
from hvtrain.flow.schedule import sigmas
from hvtrain.flow.solvers import SOLVERS, solve
from hvtrain.flow.timesteps import quantile_function, stratified
from hvtrain.registry import Registry
from hvtrain.rng import generator

U = (0.02, 0.3, 0.5, 0.9)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def normal(u: float) -> float:
    return NormalDist().inv_cdf(u)


@pytest.mark.parametrize(
    "settings, formula",
    [
        (FlowConfig("uniform"), lambda u: u),
        (FlowConfig("sigmoid", sigmoid_scale=1.5), lambda u: logistic(1.5 * normal(u))),
        (
            FlowConfig("logit_normal", logit_mean=0.7, logit_std=0.6),
            lambda u: logistic(0.7 + 0.6 * normal(u))
        ),
        (FlowConfig("shift", shift=5.0, sigmoid_scale=0.8),
         lambda u: 5 * logistic(0.8 * normal(u)) / (1 + 4 * logistic(0.8 * normal(u)))),
    ],
    ids=lambda x: getattr(x, "timestep_sampling", ""),
)  # fmt: skip
def test_each_distribution_is_its_formula(settings, formula):
    found = quantile_function(settings.timestep_sampling, settings)(torch.tensor(U, dtype=torch.float64))
    assert found.tolist() == pytest.approx([formula(u) for u in U], rel=1e-9)
    ends = quantile_function(settings.timestep_sampling, settings)(
        torch.tensor([0.0, 1.0], dtype=torch.float64)
    )
    # finite where the normal is not
    assert ends.tolist() == pytest.approx([formula(1e-7), formula(1 - 1e-7)], abs=2e-7)


def test_the_levels_of_a_discrete_schedule_are_each_as_often():
    """From 1/1000, without 0, to 1."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = quantile_function("sigma", FlowConfig("sigma"))(u)
    assert (found * 1000).round().tolist() == list(range(1, 1001))


@pytest.mark.parametrize(
    "name, low, high", [("uniform", 0.2, 1.0), ("uniform", 0.0, 0.7), ("sigmoid", 0.3, 0.8)]
)
def test_a_cut_distribution_is_the_whole_one_between_its_ends(name, low, high):
    settings = FlowConfig(name, min_sigma=low, max_sigma=high, sigmoid_scale=1.5)
    found = quantile_function(name, settings)(torch.tensor([0.0, *U, 1.0], dtype=torch.float64))

    def share(sigma: float) -> float:  # of the whole distribution that lies below sigma
        return sigma if name == "uniform" else NormalDist().cdf(math.log(sigma / (1 - sigma)) / 1.5)

    parts = [(share(s) - share(low)) / (share(high) - share(low)) for s in found.tolist()[1:-1]]
    assert parts == pytest.approx(U, abs=1e-9)
    assert (
        found[[0, -1]].tolist() == pytest.approx([low, high], abs=1e-9) and low <= found.min()
        and found.max() <= high
    )


def test_the_whole_distribution_is_not_cut_and_an_empty_one_is_refused():
    whole = torch.tensor([0.0, 1e-30, 0.5, 1.0], dtype=torch.float64)
    assert torch.equal(
        quantile_function("uniform", FlowConfig("uniform", min_sigma=0.0, max_sigma=1.0))(whole), whole
    )
    narrow = FlowConfig("logit_normal", logit_mean=-9.0, logit_std=0.1, min_sigma=0.9, max_sigma=0.95)
    with pytest.raises(
        ConfigError, match=r"'logit_normal' has nothing between flow.min_sigma 0.9 and flow.max_sigma 0.95"
    ):
        quantile_function("logit_normal", narrow)
    for low, high in ((-0.1, 1.0), (0.5, 0.5), (0.0, 1.1)):
        with pytest.raises(
            ConfigError, match=f"flow.min_sigma {low} and flow.max_sigma {high}: expected 0 <= min < max <= 1"
        ):
            quantile_function("uniform", FlowConfig("uniform", min_sigma=low, max_sigma=high))
    with pytest.raises(
        ConfigError, match=r"flow.timestep_sampling: no distribution 'unifrom'; did you mean 'uniform'"
    ):
        quantile_function("unifrom", FlowConfig())


def test_a_distribution_is_one_decorated_function(monkeypatch):
    """Also one that gives many u the same sigma: cut at that sigma, none of them is lost."""
    monkeypatch.setattr(timesteps, "SAMPLERS", Registry("distribution"))

    @timesteps.SAMPLERS.add("steep")
    def steep(u: torch.Tensor, *, logit_mean: float) -> torch.Tensor:
        return u.clamp(logit_mean, 0.9)

    u = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    found = quantile_function("steep", FlowConfig("steep", logit_mean=0.5, min_sigma=0.5, max_sigma=1.0))(u)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.75, 0.9], abs=1e-9)


@pytest.mark.parametrize("name", ["sigmoid", "logit_normal", "shift"])
def test_no_sigma_lies_above_the_cut(name):
    """By a rounding error either: at 1, a sigma above the largest would be another step of the model."""
    cuts = [
        FlowConfig(name, shift=7.0, sigmoid_scale=1.5, min_sigma=0.01, max_sigma=n / 20) for n in range(1, 21)
    ]
    ends = [quantile_function(name, cut) for cut in cuts]
    assert all(f(torch.ones(1, dtype=torch.float64)).item() <= n / 20 for n, f in enumerate(ends, start=1))


def test_strata_and_the_places_inside_them_are_drawn_anew_in_every_step_and_run():
    """Apart from each other: which stratum a sample gets, and where inside it its sigma lies."""
    draws = [
        stratified(8, seed=seed, step=step, part=0, n_parts=1) * 8 for seed, step in ((1, 5), (1, 6), (2, 5))
    ]
    orders = [x.floor().tolist() for x in draws]
    inside = [[x.frac()[x.argsort()].tolist()] for x in draws]
    for different in (orders, inside):
        assert different[0] != different[1] != different[2] != different[0]
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_a_part_takes_its_share_of_the_strata():
    """Number i of the step is (stratum i of the shuffle + a number in (0, 1)) / how many there are."""
    order = torch.randperm(6, generator=generator(3, step=4, stream="strata"))
    inside = torch.rand(6, generator=generator(3, step=4, stream="timestep"), dtype=torch.float64)
    want = (order + inside) / 6
    for part in range(3):
        found = stratified(2, seed=3, step=4, part=part, n_parts=3)
        assert found.dtype == torch.float64 and torch.equal(found, want[2 * part : 2 * part + 2])


def test_noise_target_and_masked_mean():
    x0, noise = torch.full((2, 1, 2, 1, 1), 3.0), torch.full((2, 1, 2, 1, 1), 7.0)
    noised = add_noise(x0, noise, torch.tensor([0.25, 1.0], dtype=torch.float64))
    assert noised.dtype == torch.float32 and noised.flatten(1).tolist() == [[4.0, 4.0], [7.0, 7.0]]
    assert (target(x0, noise) == 4).all()
    velocity = torch.tensor([[1.0, 3.0, 5.0], [0.0, 2.0, 0.0]]).view(2, 1, 3, 1, 1).expand(2, 2, 3, 1, 1)
    wanted = torch.zeros(2, 2, 3, 1, 1)
    assert squared_error(velocity, wanted).tolist() == pytest.approx([35 / 3, 4 / 3])
    # The mean is over what the mask leaves, not over all: frames 1 and 2, and frame 1 alone.
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]).view(2, 1, 3, 1, 1)
    assert squared_error(velocity, wanted, mask).tolist() == pytest.approx([(9 + 25) / 2, 4.0])
    # nothing to learn, not 0 / 0
    assert squared_error(velocity, wanted, torch.zeros_like(mask)).tolist() == [0.0, 0.0]
    # one channel: the second sample has one element
    one = squared_error(velocity[:, :1], wanted[:, :1], mask.double())
    assert one.tolist() == pytest.approx([(9 + 25) / 2, 4.0]) and one.dtype == torch.float32


def test_the_error_is_taken_in_float32():
    velocity, wanted = torch.full((1, 4), 1.0, dtype=torch.bfloat16), torch.full((1, 4), 1.0009765625)
    assert squared_error(velocity, wanted).item() == pytest.approx(0.0009765625**2)
    assert squared_error(wanted, velocity).dtype == torch.float32


def test_the_schedule_s_values():
    assert sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigmas(4, shift=3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-15)
    assert sigmas(2).dtype == torch.float64


def test_euler_steps_along_the_velocity_at_each_sigma():
    """dx = velocity times the change of sigma, and the velocity sees the state and sigma
    [B] of the step's beginning."""
    seen = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append((x.flatten().tolist(), sigma.tolist(), sigma.dtype))
        return (2 * x).bfloat16()

    x = solve(
        SOLVERS["euler"], velocity, torch.tensor([[1.0], [3.0]]),
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    )
    assert x.flatten().tolist() == [0.0, 0.0] and x.dtype == torch.float32
    assert seen == [([1.0, 3.0], [1.0, 1.0], torch.float32), ([0.0, 0.0], [0.5, 0.5], torch.float32)]
    assert solve(
        SOLVERS["euler"], lambda x, s: torch.ones_like(x), torch.zeros(1, 1), sigmas(4)
    ).item() == -1.0


def test_guidance_goes_through_the_conditional_velocity():
    guided = classifier_free(lambda x, s: (x + s).bfloat16(), lambda x, s: -2 * x * s, 3.0)
    assert guided(torch.tensor([1.0]), torch.tensor([0.5])).tolist() == [-1 + 3 * (1.5 + 1)]
    assert guided(torch.tensor([1.0]), torch.tensor([0.5])).dtype == torch.float32
