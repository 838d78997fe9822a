"""`distill`: what a step draws, who is asked about it, and what that is good for."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.merge import run as merge
from hvtrain.merge.distill import A_SLICE, Draw
from hvtrain.merge.states import NoisyClip, Task
from tests.merge.test_reconcile import config, place, report  # noqa: F401 - a fixture


def task(name, teacher, *, sampled=False, n=4):
    noise = torch.Generator().manual_seed(len(name))
    states = [
        NoisyClip(
            torch.randn(2, 1, 3, 3, generator=noise), torch.full((2, 1, 3, 3), float(i)), (i + 1) / 8, {},
            torch.zeros(2, 1, 3, 3), told=1.0, sampled=sampled
        )
        for i in range(n)
    ]
    return Task(name, teacher, 1.0, states, [])


def test_a_step_noises_its_clips_anew():
    """At the levels that its set has, with noise of variance 1; not those that a LoRA sampled."""
    tasks = [task("a", 0), task("b", 1, sampled=True), task("keep", None)]
    draw = Draw(tasks, 3, new_noise=True)
    steps = [draw(step) for step in range(200)]
    assert {len(step) for step in steps} == {A_SLICE * 2}
    noises, pairs = [], set()
    for own, clip, _ in (drawn for step in steps for drawn in step):
        if own.name == "b":
            assert any(clip is state for state in own.states)
            continue
        noises.append((clip.x - (1 - clip.sigma) * clip.clean) / clip.sigma)
        pairs.add((own.name, clip.clean.mean().item(), clip.sigma))
        assert not clip.taught.numel(), "a teacher said this of other noise"
    assert len(pairs) == 2 * 4 * 4, "every clip at every level"
    assert len({noise[0, 0, 0, 0].item() for noise in noises}) == len(noises)
    noise = torch.stack(noises)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert all(torch.equal(a.x, b.x) for (_, a, _), (_, b, _) in zip(steps[7], draw(7), strict=True))
    old = replace(draw, new_noise=False)
    assert all(any(clip is state for state in own.states) for step in range(20) for own, clip, _ in old(step))


def test_one_lora_asked_about_new_noise_stays_what_it_is(place, tmp_path):  # noqa: F811
    """It is its own teacher: any other's velocity, or its own of other noise, would move it."""
    merge.run(config(place, tmp_path / "m.safetensors", 1, how="distill", target="lora", new_noise=True))
    before, after = load_file(place / "1" / "lora.safetensors"), load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_new_noise_serves_on_clips_that_were_held_out(place, tmp_path):  # noqa: F811
    """Few noisy clips are learnt by heart."""
    away = {}
    for new in (True, False):
        out = tmp_path / f"{new}.safetensors"
        merge.run(config(place, out, 1, 2, how="distill", states=3, steps=120, new_noise=new))
        away[new] = sum(report(out)["fidelity"].values()) / 2
    assert away[True] < 0.8 * away[False], away


def test_errors_count_by_the_root_of_what_a_lora_changes():
    weak, strong, keep = task("weak", 0), task("strong", 1), task("keep", None)
    for state in strong.states:
        state.told = 4.0
    draw = Draw([weak, strong, keep], 3, new_noise=False)
    assert draw.scales == pytest.approx({"weak": 2.5**0.5, "strong": 0.625**0.5, "keep": 1.0})
    drawn = {own.name: counts for step in range(20) for own, _, counts in draw(step)}
    assert drawn == draw.scales
