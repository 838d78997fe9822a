"""The words that slices learn: their clips, what is asked of a model, and what its videos are worth."""

from collections import Counter
from dataclasses import replace

import pytest

from hvtrain.generate.video import write_mp4
from hvtrain.tiny.clips import concept_clips, render, training_clips
from hvtrain.tiny.data import REAL_CAPTION
from hvtrain.tiny.text import WORDS as VOCABULARY
from hvtrain.tiny.words import (
    CONCEPTS,
    OLD,
    WORDS,
    asked,
    clips_of,
    dataset_of,
    mean,
    old_clips,
    prompt_lines,
    shares,
    write_pairs,
)


def test_the_clips_of_a_word_are_half_old_ones():
    made = clips_of("star", 24, seed=3)
    assert [clip.word for clip in made] == ["star"] * 24 + [""] * 24
    assert {clip.color for clip in made[:24]} == {"red"} and len({clip.caption for clip in made[:24]}) == 12
    assert len({clip.seed for clip in made[:24]}) == 24
    assert not {repr(c) for c in old_clips(48, seed=3)} & {
        repr(c) for w in WORDS for c in clips_of(w, 24, seed=3)
    }


def test_forty_words_tell_forty_things_that_the_base_draws_and_no_caption_of_it_names():
    assert len(WORDS) == len(set(WORDS.values())) == 40 and tuple(WORDS)[:6] == tuple(CONCEPTS)
    assert (
        {c.told for c in CONCEPTS.values()} == {""}
        and [c.told for c in WORDS.values()][6:] == ["motion", "background"] * 17
    )
    counts = [Counter(c.color for c in list(WORDS.values())[:n]).values() for n in (12, 24, 40)]
    assert all(max(n) - min(n) <= 2 for n in counts), "no colour is rare"
    said = {w for c in [*training_clips(400, seed=0), *concept_clips(12, seed=0)] for w in c.caption.split()}
    said |= set(REAL_CAPTION.replace(",", "").split())
    assert not said & set(WORDS) and set(WORDS) <= set(VOCABULARY), "each is a token, and new"


def test_a_caption_leaves_out_what_its_word_tells():
    disc, ball = clips_of("disc", 12, seed=1)[:12], clips_of("ball", 12, seed=1)[:12]
    assert {(c.color, c.motion) for c in disc} == {("red", "left")}
    assert {(c.color, c.background) for c in ball} == {("red", "gray")}
    assert (
        {c.caption: 4 for c in disc} == Counter(c.caption for c in disc)
        and disc[0].caption == "a disc on a gray background"
    )
    assert (
        {c.caption: 3 for c in ball} == Counter(c.caption for c in ball)
        and ball[0].caption == "a ball moves left"
    )
    assert len({c.seed for c in disc}) == len({c.seed for c in ball}) == 12
    assert [c.caption for c in asked(["disc"], old=False)] == [c.caption for c in disc]


@pytest.mark.parametrize("word, wrong", [("disc", {"motion": "right"}), ("ball", {"background": "light"})])
def test_all_that_a_word_tells_must_be_seen(word, wrong, tmp_path):
    wanted = asked([word], old=False)
    left = {"background": "dark"} if "motion" in wrong else {"motion": "down"}
    shown = [
        replace(wanted[0], color="blue"), replace(wanted[1], **wrong),
        *(replace(c, **left) for c in wanted[2:])
    ]
    videos = [tmp_path / f"{i:02d}.mp4" for i in range(len(shown))]
    for clip, path in zip(shown, videos, strict=True):
        write_mp4(path, render(clip), fps=8, metadata={})
    assert shares(wanted, videos) == {word: pytest.approx(10 / 12)}


def test_clips_are_written_as_a_user_brings_them(tmp_path):
    write_pairs(tmp_path / "01-star", clips_of("star", 12, seed=1)[:2], "star")
    assert sorted(p.name for p in (tmp_path / "01-star").iterdir()) == [
        "star_000.mp4", "star_000.txt", "star_001.mp4", "star_001.txt",
    ]
    assert (tmp_path / "01-star" / "star_001.txt").read_text() == "a star moves left on a dark background"
    text = dataset_of([tmp_path / "01-star", tmp_path / "02"], tmp_path / "clips.toml").read_text()
    assert text.count("[[datasets]]") == 2 and f"'{tmp_path}/02'" in text


def test_a_words_videos_have_the_same_noise_alone_and_among_others():
    def noise(words, word, **old):
        wanted = asked(words, **old)
        lines = prompt_lines(wanted).splitlines()
        return [line for clip, line in zip(wanted, lines, strict=True) if clip.word == word]

    assert noise(["box"], "box", old=False) == noise(["star", "box"], "box")
    assert noise(["star", "box"], "box")[3].endswith(" --d 3")
    assert noise(["star"], "") == noise(["box", "star"], "")
    assert len({line.split(" --d ")[1] for line in prompt_lines(asked(["star"])).splitlines()}) == 12 + 24


def test_a_word_counts_by_colour_and_old_words_by_direction_too(tmp_path):
    wanted = asked(["star", "cross"])
    assert (
        [clip.word for clip in wanted] == ["star"] * 12 + ["cross"] * 12 + [""] * 24
        and len(asked(["oval"], old=False)) == 12
    )
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    shown = [
        *wanted[:12], *(replace(clip, color="red") for clip in wanted[12:15]), *wanted[15:24],
        *(replace(clip, motion=turned[clip.motion]) for clip in wanted[24:30]), *wanted[30:],
    ]
    shown[0] = replace(shown[0], motion=turned[shown[0].motion])  # of a word, the direction is not asked for
    videos = [tmp_path / f"{i:02d}.mp4" for i in range(len(shown))]
    for clip, path in zip(shown, videos, strict=True):
        write_mp4(path, render(clip), fps=8, metadata={})
    found = shares(wanted, videos)
    assert found == {"star": 1.0, "cross": 0.75, OLD: 0.75} and mean(found) == pytest.approx(0.875)
    with pytest.raises(ValueError, match="shorter"):
        shares(wanted, videos[:-1])
