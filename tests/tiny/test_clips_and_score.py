"""The scorer reads the truth off every clip that the renderer draws."""

import numpy as np
import pytest

from hvtrain.tiny import clips
from hvtrain.tiny.score import look


def test_split_is_disjoint_and_balanced():
    train, held = clips.combinations()
    assert len(held) == clips.N_HELD_OUT and len(train) == 48 and not set(train) & set(held)
    for part in (train, held):
        for axis, names in enumerate((clips.COLORS, clips.SHAPES, clips.MOTIONS)):
            assert {c[axis] for c in part} == set(names)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_scorer_reads_every_training_clip(size):
    for clip in clips.training_clips(144, seed=5):
        seen = look(clips.render(clip, height=size[0], width=size[1]))
        assert (seen.color, seen.motion, seen.hollow, seen.background) == (
            clip.color, clip.motion, False, clip.background
        ), clip


def test_scorer_knows_the_concept():
    for clip in clips.concept_clips(24, seed=5):
        seen = look(clips.render(clip))
        assert seen.is_concept and seen.motion == clip.motion, clip


def test_scorer_is_not_fooled():
    still = np.repeat(clips.render(clips.training_clips(1, seed=0)[0])[:1], 9, axis=0)
    assert look(still).motion is None
    noise = np.full((9, 64, 64, 3), 128, np.uint8)
    assert (
        look(noise).color is None and look(noise).background == "gray"
        and look(noise // 3).background == "dark"
    )
    backwards = clips.render(clips.Drawing("red", "circle", "left", "gray"))[::-1]
    assert look(backwards).motion == "right"
    assert not look(clips.render(clips.Drawing("yellow", "circle", "left", "dark"))).is_concept


def test_rendering_is_a_function_of_the_clip():
    clip = clips.Drawing("red", "square", "up", "light", seed=3)
    assert (clips.render(clip) == clips.render(clip)).all()
    assert (clips.render(clip) != clips.render(clips.Drawing("red", "square", "up", "light", seed=4))).any()
