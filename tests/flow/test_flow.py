"""Noise levels, the loss and the sigma schedule."""

import pytest
import torch

from hvtrain.config import FlowConfig
from hvtrain.errors import ConfigError
from hvtrain.flow.loss import add_noise, squared_error, target
from hvtrain.flow.schedule import sigmas
from hvtrain.flow.timesteps import SAMPLERS, quantile_function, stratified
from hvtrain.models import find

FLAVOR, SHAPE = find("hunyuan-video").flavor(None), (1, 16, 5, 60, 104)
GRID = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_a_quantile_function(name):
    sigma = quantile_function(name, FlowConfig(shift=7.0), FLAVOR)(GRID, SHAPE)
    assert (sigma.diff() >= 0).all() and sigma.min() >= 0 and sigma.max() <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_truncation_keeps_the_shape(name):
    whole = quantile_function(name, FlowConfig(shift=7.0), FLAVOR)(GRID, SHAPE)
    cut = quantile_function(name, FlowConfig(shift=7.0, min_sigma=0.4, max_sigma=0.9), FLAVOR)(GRID, SHAPE)
    assert cut.min() >= 0.4 and cut.max() <= 0.9
    inside = whole[(whole > 0.4) & (whole < 0.9)]
    assert abs(inside.median() - cut.median()) < 0.01 and abs(inside.std() - cut.std()) < 0.01


def test_shift_moves_towards_noise():
    median = quantile_function("shift", FlowConfig(shift=7.0))(torch.tensor([0.5], dtype=torch.float64))
    assert median.item() == pytest.approx(7 * 0.5 / (1 + 6 * 0.5))


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'uniform'"):
        quantile_function("unifrom", FlowConfig())
    with pytest.raises(ConfigError, match="min < max"):
        quantile_function("shift", FlowConfig(min_sigma=0.9, max_sigma=0.1))


def test_strata_do_not_depend_on_the_cut():
    """12 numbers of one step, as one part or as six: the same numbers, one in each twelfth."""
    whole = stratified(12, seed=1, step=5, part=0, n_parts=1)
    parts = torch.cat([stratified(2, seed=1, step=5, part=p, n_parts=6) for p in range(6)])
    assert torch.equal(whole, parts)
    assert sorted((whole * 12).long().tolist()) == list(range(12))
    assert not torch.equal(whole, stratified(12, seed=1, step=6, part=0, n_parts=1))


@pytest.mark.parametrize("steps", [1, 20, 50])
def test_schedule_equals_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=7.0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    ours = sigmas(steps, shift=7.0)
    assert torch.allclose(theirs.sigmas.double(), ours, atol=1e-6)
    assert ours[0] == 1 and ours[-1] == 0


def test_perfect_velocity_has_no_loss_and_the_mask_counts():
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=g), torch.randn(2, 3, 4, 2, 2, generator=g)
    assert torch.equal(squared_error(target(x0, noise), noise - x0), torch.zeros(2))
    assert torch.allclose(add_noise(x0, noise, torch.tensor([0.0, 1.0]))[1], noise[1])
    wrong = target(x0, noise).clone()
    wrong[:, :, 0] += 100
    mask = torch.ones(2, 1, 4, 1, 1)
    mask[:, :, 0] = 0
    assert squared_error(wrong, noise - x0, mask).max() < 1e-6 < squared_error(wrong, noise - x0).min()
