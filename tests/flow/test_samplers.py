"""Every distribution of noise levels against its closed form, over 200,000 draws; what
depends on the latents; ranges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hvtrain.config import FlowConfig
from hvtrain.errors import ConfigError
from hvtrain.flow.timesteps import SAMPLERS, parameters, quantile_function, share_within, within
from hvtrain.models import find
from hvtrain.train.setup import flow_of

N = 200_000
FLAVOR, SHAPE = find("hunyuan-video").flavor(None), (2, 16, 5, 60, 104)  # 30 x 52 = 1560 image tokens a frame
U = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def phi(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(np.asarray(x))).numpy()


def logit(x: np.ndarray) -> np.ndarray:
    return np.log(x) - np.log1p(-x)


def shifted(x: np.ndarray, s: float, scale: float) -> np.ndarray:
    """P(s t / (1 + (s - 1) t) <= x) for t the sigmoid of a normal of this width."""
    return phi(logit(x / (s - (s - 1) * x)) / scale)


def log_snr(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    """P(sigmoid(-l / 2) <= x) for l normal."""
    return 1 - phi((-2 * logit(x) - mean) / std)


def sd3_mode(x: np.ndarray, s: float) -> np.ndarray:
    """P(1 - u - s (cos^2(pi u / 2) - 1 + u) <= x) for u uniform; the function falls from 1 to 0."""
    low, high = np.zeros_like(x), np.ones_like(x)
    for _ in range(50):
        u = (low + high) / 2
        above = 1 - u - s * (np.cos(np.pi * u / 2) ** 2 - 1 + u) > x
        low, high = np.where(above, u, low), np.where(above, high, u)
    return 1 - low


FLUX = math.exp(0.5 + 0.65 * (1560 - 256) / 3840)
QWEN = math.exp(0.5 + 0.4 * (1560 - 256) / 7936)
CASES = {
    "uniform": ({}, lambda x: x),
    "sigmoid": ({"sigmoid_scale": 1.5}, lambda x: phi(logit(x) / 1.5)),
    "logit_normal": ({"logit_mean": 0.7, "logit_std": 0.6}, lambda x: phi((logit(x) - 0.7) / 0.6)),
    "mode": ({"mode_scale": 1.29}, lambda x: sd3_mode(x, 1.29)),
    "shift": ({"shift": 7.0, "sigmoid_scale": 0.8}, lambda x: shifted(x, 7.0, 0.8)),
    "flux_shift": ({"sigmoid_scale": 1.2}, lambda x: shifted(x, FLUX, 1.2)),
    "qwen_shift": ({}, lambda x: shifted(x, QWEN, 1.0)),
    "logsnr": ({"logit_mean": -6.0, "logit_std": 2.0}, lambda x: log_snr(x, -6.0, 2.0)),
    "qinglong_flux": (
        {"logit_mean": -6.0, "logit_std": 2.0},
        lambda x: 0.79 * shifted(x, FLUX, 1.0) + 0.11 * log_snr(x, -6.0, 2.0) + 0.1 * log_snr(x, 5.36, 1.0),
    ),
    "qinglong_qwen": ({}, lambda x: 0.95 * shifted(x, QWEN, 1.0) + 0.05 * log_snr(x, 5.36, 1.0)),
    "sigma": ({}, lambda x: np.floor(1000 * x + 1e-9) / 1000),
}  # fmt: skip


def draws(name: str, **more) -> np.ndarray:
    settings = FlowConfig(name, **CASES[name][0], **more)
    return np.sort(quantile_function(name, settings, FLAVOR)(U, SHAPE).numpy())


def distance(found: np.ndarray, cdf) -> float:
    """Kolmogorov-Smirnov; of a discrete distribution only what lies at or below a value can be compared."""
    values, counts = np.unique(found, return_counts=True)
    inside = np.clip(values, 1e-12, 1 - 1e-12) if values[-1] < 1 else values
    with np.errstate(divide="ignore"):
        want = cdf(inside)
    have = np.cumsum(counts) / len(found)
    below = np.where(counts == 1, np.abs(want - (have - counts / len(found))), 0)
    return float(max(np.abs(want - have).max(), below.max()))


LIMIT = 1.63 / math.sqrt(N)  # what 1 of 100 samples of the right distribution exceeds


def test_every_sampler_has_its_case():
    assert set(CASES) == set(SAMPLERS)


@pytest.mark.parametrize("name", CASES)
def test_each_distribution_is_its_closed_form(name):
    cdf = CASES[name][1]
    assert distance(draws(name), cdf) < LIMIT
    assert distance(draws(name) ** 1.02, cdf) > LIMIT  # the test sees a small mistake


@pytest.mark.parametrize("name", CASES)
def test_a_range_keeps_the_shape_or_takes_all_of_it(name):
    cdf, low, high = CASES[name][1], 0.3, 0.8
    first, last = cdf(np.array([low, high]))
    cut = draws(name, min_sigma=low, max_sigma=high)
    assert low <= cut[0] < cut[-1] <= high
    assert distance(cut, lambda x: (cdf(x) - first) / (last - first)) < LIMIT + (
        0.002 if name == "sigma" else 0
    )
    squeezed = draws(name, min_sigma=low, max_sigma=high, range="squeeze")
    assert low <= squeezed[0] < squeezed[-1] <= high
    assert distance((squeezed - low) / (high - low), cdf) < LIMIT + (0.001 if name == "sigma" else 0)
    ends = quantile_function(name, FlowConfig(name, **CASES[name][0], min_sigma=low, max_sigma=high), FLAVOR)
    outermost = ends(torch.tensor([0.0, 1.0], dtype=torch.float64), SHAPE)
    assert low <= outermost[0] < low + 0.02 and high - 0.02 < outermost[1] <= high


@pytest.mark.parametrize("name", CASES)
def test_the_ends_are_finite_and_nothing_decreases(name):
    settings = FlowConfig(name, **CASES[name][0])
    u = torch.cat(
        [torch.tensor([0.0, 1e-12]), torch.linspace(0.0001, 0.9999, 4000), torch.tensor([1.0])]
    ).double()
    found = quantile_function(name, settings, FLAVOR)(u, SHAPE)
    assert (
        torch.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
        and (found.diff() >= -1e-12).all()
    )
    one = quantile_function(name, settings, FLAVOR)(u[2000:2001], SHAPE)
    # not a matter of what is drawn beside it
    assert one.item() == pytest.approx(found[2000].item(), abs=1e-12)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2 / (math.pi - 2)])
def test_mode_is_a_distribution_up_to_its_bounds(scale):
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    found = quantile_function("mode", FlowConfig("mode", mode_scale=scale))(u)
    assert (found.diff() >= -1e-12).all() and found[[0, -1]].tolist() == pytest.approx([0, 1])
    np.testing.assert_allclose(sd3_mode(found.numpy()[1:-1:50], scale), u.numpy()[1:-1:50], atol=2e-3)


def test_a_shift_by_the_resolution_sees_one_frame():
    """And the model's own patches: half of the tokens a frame are another shift, twice the frames are not."""
    half = torch.tensor([0.5], dtype=torch.float64)
    quantile = quantile_function("flux_shift", FlowConfig("flux_shift"), FLAVOR)
    for shape, tokens in (
        (SHAPE, 1560), ((16, 9, 60, 104), 1560), ((1, 16, 5, 32, 32), 256), ((1, 16, 1, 128, 128), 4096)
    ):
        s = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        assert quantile(half, shape).item() == pytest.approx(s / (1 + s))
    with pytest.raises(ValueError, match="'flux_shift' depends on the latents' shape"):
        quantile(half)


def test_a_model_may_say_how_its_shift_follows_resolution_and_frames():
    line = ((1000, 0.5), (9000, 2.5))
    flavor, half = replace(FLAVOR, shift_by_tokens=line), torch.tensor([0.5], dtype=torch.float64)
    flow = flow_of(FlowConfig(), flavor)
    assert flow.shift is None
    quantile = quantile_function("shift", flow, flavor)
    for shape, tokens in ((SHAPE, 5 * 1560), ((16, 1, 60, 104), 1560)):
        s = math.exp(0.5 + 2 * (tokens - 1000) / 8000)
        assert quantile(half, shape).item() == pytest.approx(s / (1 + s))
    # the user's word is the last
    own = quantile_function("shift", flow_of(FlowConfig(shift=3.0), flavor), flavor)
    assert own(half, SHAPE).item() == pytest.approx(0.75)
    assert flow_of(FlowConfig(), FLAVOR).shift == 7.0


def test_two_parts_of_a_distribution_are_the_whole():
    """What two experts that share the noise levels draw, each from its own part."""
    whole = quantile_function("shift", FlowConfig(shift=5.0))
    low, high = within(whole, 0.0, 0.875), within(whole, 0.875, 1.0)
    share = share_within(whole, 0.0, 0.875)
    assert share == pytest.approx(shifted(np.array([0.875]), 5.0, 1.0).item(), abs=1e-9)
    assert share_within(whole, 0.875, 1.0) == pytest.approx(1 - share) and share_within(whole, 0.0, 1.0) == 1
    n = round(N * share)
    both = np.sort(torch.cat([low(U[:n]), high(U[n:])]).numpy())
    assert distance(both, lambda x: shifted(x, 5.0, 1.0)) < LIMIT
    assert low(U).max() <= 0.875 <= high(U).min()
    with pytest.raises(ConfigError, match="has nothing between flow.min_sigma 0.0 and flow.max_sigma 1e-09"):
        within(whole, 0.0, 1e-9)(U[:1])
    by_shape = within(quantile_function("flux_shift", FlowConfig("flux_shift"), FLAVOR), 0.3, 0.6)
    assert not torch.equal(by_shape(U[:9], SHAPE), by_shape(U[:9], (1, 16, 5, 32, 32)))


def test_a_parameter_that_the_distribution_does_not_take_is_refused():
    assert parameters("qinglong_flux") == ["sigmoid_scale", "logit_mean", "logit_std", "frame_tokens"]
    for flow, says in (
        (FlowConfig("uniform", sigmoid_scale=2.0), "flow.sigmoid_scale is 2, but flow.timestep_sampling "
        "uniform takes nothing"),
        (FlowConfig("flux_shift", shift=3.0), "flow.shift is 3, but .* flux_shift takes flow.sigmoid_scale: "
        "leave flow.shift"),
        (FlowConfig("shift", logit_mean=1.0), "takes flow.shift, flow.sigmoid_scale: leave flow.logit_mean "
        "away"),
        (FlowConfig("sigma", mode_scale=1.0), "flow.mode_scale is 1, but"),
        (
            FlowConfig(raw_guidance=True),
            "flow.raw_guidance is for a guidance of your own: give flow.guidance"
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            flow_of(flow, FLAVOR)
    assert flow_of(FlowConfig("flux_shift"), FLAVOR).shift is None
