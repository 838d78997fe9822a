"""The sampler: solver and guidance against closed forms, and the same latents however the work is spread."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hvtrain.errors import ConfigError
from hvtrain.flow.guidance import classifier_free
from hvtrain.flow.solvers import State
from hvtrain.generate.requests import Request
from hvtrain.generate.sample import sample_latents
from hvtrain.models.conditions import stack
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, start
from tests.generate.models import SIZE, random_cond, random_dit, spec_and_flavor
from tests.parallel.ranks import run_ranks


def test_classifier_free_guidance() -> None:
    x, sigma = torch.zeros(1, 2), torch.ones(1)
    guided = classifier_free(lambda x, s: x + 3, lambda x, s: x + 1, 6.0)
    assert torch.equal(guided(x, sigma), torch.full((1, 2), 1 + 6.0 * 2))


def sample(ulysses: int = 1, ring: int = 1, **changes) -> torch.Tensor:
    """What one rank ends with: two videos of ragged prompts, true guidance, 45 tokens."""
    ctx = start(ulysses, ring, device="cpu")
    spec, flavor = spec_and_flavor()
    model = random_dit()
    parallelize(model, ctx, training=False)
    request = Request.of(flavor, prompt="", steps=4, cfg_scale=2.0, **SIZE)
    options = {"seeds": [3, 4], "uncond": random_cond(2, 2, seed=6), **changes}
    cond = options.pop("cond", random_cond(7, 4))
    return sample_latents(lambda sigma: model, spec, flavor, cond, request=request, ctx=ctx, **options)


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return sample()


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)], ids=["ulysses", "ring"])
def test_sequence_parallel_sampling_equals_one_process(degrees: tuple[int, int], alone: torch.Tensor) -> None:
    results = run_ranks(2, sample, *degrees)
    assert alone.std() > 0.3  # a video of zeros would agree too
    for latents in results:
        assert (latents - alone).abs().max() < 1e-4
    assert torch.equal(*results)


def test_text_and_negative_prompt_and_seed_matter(alone: torch.Tensor) -> None:
    assert (sample(cond=random_cond(7, 4, seed=8)) - alone).abs().max() > 0.1
    assert (sample(uncond=random_cond(2, 2, seed=9)) - alone).abs().max() > 0.1
    other = sample(seeds=[3, 5])
    assert (other[0] - alone[0]).abs().max() < 1e-4
    assert (other[1] - alone[1]).abs().max() > 0.1


def test_a_video_does_not_depend_on_its_batch(alone: torch.Tensor) -> None:
    cond, negative = random_cond(7, 4), random_cond(2, 2, seed=6)
    short = {name: value[1:] for name, value in cond.items()} | {"text": cond["text"][1:, :4]}
    single = sample(seeds=[4], cond=short, uncond={name: value[1:] for name, value in negative.items()})
    assert (single[0] - alone[1]).abs().max() < 1e-4


def test_stack_pads_with_zeros() -> None:
    a, b = random_cond(3), random_cond(5, seed=1)
    both = stack([a, b], spec_and_flavor()[1].cond)
    assert both["text"].shape[:2] == (2, 5) and both["text_len"].tolist() == [3, 5]
    assert torch.equal(both["text"][0, :3], a["text"][0]) and not both["text"][0, 3:].any()


def test_guidance_without_a_negative_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="cfg_scale"):
        sample(uncond=None)


def test_seeds_and_prompts_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        sample(seeds=[1])


def test_noise_is_a_function_of_the_seed_alone() -> None:
    ctx = ParallelContext()
    spec, flavor = spec_and_flavor()
    request = Request.of(flavor, prompt="", steps=1, seed=11, **SIZE)

    def still(inp) -> torch.Tensor:
        return torch.zeros_like(inp.x)

    a = sample_latents(lambda sigma: still, spec, flavor, random_cond(3), request=request, ctx=ctx)
    assert a.shape == (1, 16, 3, 6, 10) and a.dtype == torch.float32
    assert abs(a.mean()) < 0.1 and abs(a.std() - 1) < 0.05
    assert a.flatten()[0].item() == pytest.approx(FIRST_NOISE_OF_SEED_11, abs=1e-6)


def drift(inp) -> torch.Tensor:
    """A velocity that is the noise level itself: what is added to the noise is
    then a sum over the schedule."""
    return (inp.t / 1000).view(-1, 1, 1, 1, 1).expand_as(inp.x)


def test_the_sigmas_are_those_of_the_request() -> None:
    """With shift s the k-th of n sigmas is s e / (1 + (s - 1) e), e = 1 - k / n."""
    spec, flavor = spec_and_flavor()
    for shift in (1.0, 5.0):
        request = Request.of(flavor, prompt="", steps=4, shift=shift, cfg_scale=1.0, **SIZE)
        options = {"request": request, "ctx": ParallelContext(), "seeds": [11]}
        end = sample_latents(lambda sigma: drift, spec, flavor, random_cond(3), **options)
        even = [1, 0.75, 0.5, 0.25, 0]
        levels = [shift * e / (1 + (shift - 1) * e) for e in even]
        added = sum((there - here) * here for here, there in pairwise(levels))
        noise = sample_latents(lambda sigma: torch_zeros, spec, flavor, random_cond(3), **options)
        assert (end - noise).mean().item() == pytest.approx(added, abs=1e-4)
        assert (end - noise).std().item() < 1e-5


def torch_zeros(inp) -> torch.Tensor:
    return torch.zeros_like(inp.x)


def test_text_lengths_stay_on_the_cpu() -> None:
    """They are read as numbers in every forward, which would wait for all the GPU's work; of
    "meta" they cannot be read."""
    spec, flavor = spec_and_flavor()
    seen = []

    def model(inp):
        seen.append((inp.lengths["text"], inp.cond["text"].device.type, inp.cond["pooled"].device.type))
        return inp.x

    request = Request.of(flavor, prompt="", steps=2, cfg_scale=2.0, **SIZE)
    end = sample_latents(
        lambda sigma: model, spec, flavor, random_cond(3), request=request,
        ctx=ParallelContext(device=torch.device("meta")), uncond=random_cond(2),
    )
    assert end.is_meta and seen == [((n,), "meta", "meta") for n in (2, 3, 2, 3)]


def test_a_sampling_goes_on_from_any_step(alone: torch.Tensor) -> None:
    """Bit for bit, and `on_step` is told of every step with what it has made."""
    seen: list[State] = []
    whole = sample(on_step=seen.append)
    assert torch.equal(whole, alone) and [s.step for s in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1].x, whole) and not torch.equal(seen[1].x, seen[2].x)
    later: list[State] = []
    rest = sample(begin=seen[1], on_step=later.append)
    assert torch.equal(rest, whole) and [s.step for s in later] == [3, 4]


FIRST_NOISE_OF_SEED_11 = -0.7473927736282349  # a change of this number changes the video of every seed
