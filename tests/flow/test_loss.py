"""What an error is and what it counts, by the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hvtrain.errors import ConfigError
from hvtrain.flow.loss import HUBER_SCHEDULES, LOSSES, WEIGHTINGS, Measure

SIGMA = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("name, formula", [
    ("none", lambda s: 1.0), ("sigma_sqrt", lambda s: s**-2),
    ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s * s))),
    ("min_snr", lambda s: min(((1 - s) / s) ** 2, 5.0) * s * s),
])  # fmt: skip
def test_weightings(name, formula):
    found = Measure(weighting=name).weight(SIGMA)
    assert found.tolist() == pytest.approx([formula(s) for s in SIGMA.tolist()])
    ends = Measure(weighting=name).weight(torch.tensor([0.0, 1.0]))
    assert torch.isfinite(ends).all() and (ends >= 0).all()
    if name == "sigma_sqrt":
        assert ends.tolist() == pytest.approx([1e6, 1.0])  # does not grow below 1/1000


def test_cosmap_is_a_density_and_gamma_is_where_the_ratio_is_cut():
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert Measure(weighting="cosmap").weight(grid).mean().item() == pytest.approx(1.0, abs=1e-6)
    crossing = 1 / (1 + math.sqrt(3.0))  # SNR 3
    here, lower = (
        Measure(weighting="min_snr", snr_gamma=3.0).weight(torch.tensor([crossing, crossing / 2])).tolist()
    )
    assert (
        here == pytest.approx((1 - crossing) ** 2, rel=1e-5)
        and lower == pytest.approx(3 * crossing**2 / 4, rel=1e-5)
    )


def test_losses_against_pytorch_and_their_formulas():
    error = torch.tensor([[-3.0, -0.2, 0.0, 0.05, 0.7, 20.0]], dtype=torch.float64)
    c = torch.tensor([[0.3]], dtype=torch.float64)
    zero = torch.zeros_like(error)
    torch.testing.assert_close(LOSSES["mse"](error, c), error**2)
    torch.testing.assert_close(
        LOSSES["huber"](error, c), 2 * F.huber_loss(error, zero, delta=0.3, reduction="none")
    )
    smooth = LOSSES["pseudo_huber"](error, c)
    assert smooth.flatten().tolist() == pytest.approx(
        [2 * 0.3 * (math.sqrt(e * e + 0.09) - 0.3) for e in error[0].tolist()]
    )
    small = torch.tensor([[1e-4]], dtype=torch.float64)
    for loss in LOSSES.values():
        assert loss(small, c).item() == pytest.approx(1e-8, rel=1e-3)  # one scale for all


@pytest.mark.parametrize("name, formula", [
    ("constant", lambda s: 0.1), ("exponential", lambda s: math.exp(math.log(0.1) * s)),
    ("snr", lambda s: 0.9 / (1 + s / (1 - s)) ** 2 + 0.1),
])  # fmt: skip
def test_schedules_of_c(name, formula):
    assert HUBER_SCHEDULES[name](SIGMA, 0.1).tolist() == pytest.approx([formula(s) for s in SIGMA.tolist()])
    ends = HUBER_SCHEDULES[name](torch.tensor([0.0, 1.0]), 0.1).tolist()
    assert ends == pytest.approx([0.1 if name == "constant" else 1.0, 0.1])


def test_a_sample_s_loss_is_weighed_scheduled_and_masked_by_its_own_sigma():
    velocity = torch.tensor([[2.0, 0.1], [2.0, 0.1]]).view(2, 1, 1, 1, 2).bfloat16()
    wanted, sigma = torch.zeros(2, 1, 1, 1, 2), torch.tensor([0.25, 0.75])
    measure = Measure("pseudo_huber", 0.1, "exponential", "sigma_sqrt")

    def one(e: float, s: float) -> float:
        c = 0.1**s
        return 2 * c * (math.sqrt(e * e + c * c) - c) / s**2

    small = velocity[0].flatten()[1].item()
    found = measure(velocity, wanted, sigma)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(
        [(one(2.0, s) + one(small, s)) / 2 for s in (0.25, 0.75)], rel=1e-5
    )
    mask = torch.tensor([1.0, 0.25]).view(1, 1, 1, 1, 2).expand(2, 1, 1, 1, 2)
    assert measure(velocity, wanted, sigma, mask).tolist() == pytest.approx(
        [(one(2.0, s) + 0.25 * one(small, s)) / 1.25 for s in (0.25, 0.75)], rel=1e-5
    )
    assert measure(velocity, wanted, sigma, 0.1 * mask).tolist() == pytest.approx(
        measure(velocity, wanted, sigma, mask).tolist()
    )
    assert measure(velocity, wanted, sigma, 0 * mask).tolist() == [0.0, 0.0]


def test_gradients_are_finite_where_nothing_is_wrong():
    for loss in LOSSES:
        for weighting in WEIGHTINGS:
            velocity = torch.zeros(2, 3, requires_grad=True)
            Measure(loss, weighting=weighting)(
                velocity, torch.zeros(2, 3), torch.tensor([0.0, 1.0])
            ).sum().backward()
            assert velocity.grad is not None and not velocity.grad.any(), (loss, weighting)


@pytest.mark.parametrize("options, says", [
    ({"loss": "l2"}, "flow.loss: no loss 'l2'"), ({"weighting": "minsnr"}, "did you mean 'min_snr'"),
    ({"huber_schedule": "cosine"}, "flow.huber_schedule: no schedule 'cosine'"),
    ({"huber_c": 0.0}, "flow.huber_c 0.0"),
])  # fmt: skip
def test_refusals(options, says):
    with pytest.raises(ConfigError, match=says):
        Measure(**options)
