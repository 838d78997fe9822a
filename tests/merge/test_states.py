"""How far a merge is from its LoRAs: what counts, and how much."""

from types import SimpleNamespace

import pytest
import torch

from hvtrain.merge.states import NoisyClip, Task, fidelity


def state(told, away, *, size=4.0):
    """A noisy clip that the teacher changes by `told`, and from which the merge is `away`: mean squares."""
    taught = torch.full((2, 1, 2, 2), 1.0)
    return NoisyClip(taught + away**0.5, taught, 0.5, {}, taught, told, size)


def distances(*tasks, batch_size=3):
    clips = SimpleNamespace(
        input=lambda own: SimpleNamespace(loss_mask=None, velocity=torch.stack([s.x for s in own]))
    )
    return fidelity(clips, lambda jobs: [[inp.velocity] for inp, _ in jobs], tasks, "merge", batch_size)


def test_a_lora_is_as_far_as_where_it_changes_something():
    """Its drift on three clips of old words, all of it lost, is next to nothing of what it has learnt."""
    learnt, drift = [state(0.3, 0.006) for _ in range(3)], [state(0.02, 0.02) for _ in range(3)]
    (away,) = distances(Task("a", 0, 1.0, [], [*learnt, *drift])).values()
    assert away == pytest.approx((0.3 * 0.006 + 0.02 * 0.02) / (0.3 * 0.3 + 0.02 * 0.02)) and away < 0.025


def test_the_teacher_is_at_0_and_the_base_at_1():
    tolds = (0.5, 0.02, 0.1, 0.0)
    teacher, base = ([state(t, t * share) for t in tolds] for share in (0, 1))
    found = distances(Task("a", 0, 1.0, [], teacher), Task("b", 1, 1.0, [], base))
    assert found == {"a": 0.0, "b": pytest.approx(1.0)}


def test_of_old_words_every_clip_counts_alike():
    keep = Task("keep", None, 1.0, [], [state(0.0, 0.4, size=4.0), state(0.0, 0.0, size=12.0)])
    assert distances(keep)["keep"] == pytest.approx(0.4 / 16)
