"""`hvtrain demo --slices`: what it runs, in order, and when it says that a merge has forgotten."""

import numpy as np
import pytest

from hvtrain.tiny.words import CONCEPTS, OLD
from launcher import cli, demo, demo_slices

FULL = dict.fromkeys(CONCEPTS, 1.0)


@pytest.mark.parametrize(
    ("merged", "said"),
    [
        ({}, ()),
        ({"star": 11 / 12}, ()),  # 98.6 % of the mean
        ({"star": 11 / 12, "oval": 11 / 12}, ("the words' mean is 97%, expected 98% of the 100%",)),
        ({"heart": 10 / 12}, ("the words' mean is 97%", "heart is 83%, expected 91% of the 100% that it has "
        "alone")),
        ({OLD: 21 / 24}, ()),
        ({OLD: 20 / 24}, ("old words are 83%, expected no more than one video less than the base's 92%",)),
    ],
)
def test_what_is_forgotten_is_said(merged, said):
    found = demo_slices.forgotten(FULL, {**FULL, OLD: 23 / 24, **merged}, 22 / 24)
    assert len(found) == len(said) and all(line.startswith(start) for line, start in zip(found, said)), found


def test_a_word_is_held_to_what_its_lora_has_alone():
    weak = {**FULL, "oval": 0.5}
    assert demo_slices.forgotten(weak, {**FULL, "oval": 0.5, OLD: 1.0}, 1.0) == []
    (line,) = demo_slices.forgotten(weak, {**FULL, "oval": 5 / 12, OLD: 1.0}, 1.0)
    assert line.startswith("oval is 42%, expected 91% of the 50%")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The demo's commands are written down; `generate` leaves black videos."""
    ran = []
    monkeypatch.setattr(demo_slices, "hvtrain", lambda *words: ran.append(words))
    monkeypatch.setattr(demo_slices, "write_pairs", lambda folder, made, stem: folder.mkdir(parents=True))
    monkeypatch.setattr(demo_slices, "read_video", lambda path: np.zeros((9, 64, 64, 3), np.uint8))
    monkeypatch.setattr(demo_slices, "_sheet", lambda folder, words: None)
    return ran


@pytest.mark.parametrize(("summed", "reconciled", "code"), [(0.25, 1.0, 0), (0.25, 0.5, 1)])
def test_two_words_are_two_jobs_and_one_merge(
    tmp_path, monkeypatch, commands, capsys, summed, reconciled, code
):
    given = {"base": 1.0, "summed": summed, "reconciled": reconciled}

    def shares(wanted, videos):
        words = {clip.word or OLD for clip in wanted}
        folder = commands[-1][6].partition("=")[2].rpartition("/")[2]
        return dict.fromkeys(words, given.get(folder, 1.0))

    monkeypatch.setattr(demo_slices, "shares", shares)
    assert demo_slices.run(str(tmp_path / "demo"), 2) == code
    heads = [" ".join(words[:2]) if words[0] != "launch" else f"launch {words[3]}" for words in commands]
    assert heads == [
        "launch encode", "launch encode", "shards split", "slices run", "merge --dit",
        *["launch generate"] * 5,
    ]
    run, merge = commands[3], commands[4]
    assert "--plan" not in run and run[run.index("--keep") + 1] == f"{tmp_path}/demo/keep"
    assert [merge[i + 1] for i, word in enumerate(merge) if word == "--lora"] == [
        f"{tmp_path}/demo/run/0{i}" for i in (1, 2)
    ]
    assert [words[-1] for words in commands[6:8]] == [
        f"{tmp_path}/demo/run/0{i}/slice-0{i}.safetensors" for i in (1, 2)
    ]
    assert (tmp_path / "demo/alone/star/prompts.txt").read_text().count("\n") == 12
    whole = (tmp_path / "demo/reconciled/prompts.txt").read_text()
    assert whole.count("\n") == 48 and whole.startswith("a star moves left on a gray background --d 0\n")
    assert (tmp_path / "demo/base/prompts.txt").read_text() == "".join(whole.splitlines(keepends=True)[24:])
    assert (tmp_path / "demo/alone/cross/prompts.txt").read_text() == "".join(
        whole.splitlines(keepends=True)[12:24]
    )
    said = capsys.readouterr().out
    assert f"{'star':>14}        100%{summed:12.0%}{reconciled:12.0%}" in said
    assert ("NOT KEPT: the words' mean is 50%" in said) is bool(code)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--slices", "1"], "--slices 1: expected 2 to 6"),
        (["--slices", "7"], "--slices 7: expected 2 to 6"),
        (["--slices", "2", "--model", "wan"], "leave --model away"),
        (["--slices", "2", "--output", "tests"], "tests holds files that no demo wrote"),
    ],
)
def test_what_cannot_be_shown_is_refused(more, says, capsys, monkeypatch):
    monkeypatch.chdir(demo.CONFIGS.parents[1])
    assert cli.main(["demo", *more]) == 2
    assert says in capsys.readouterr().err


def test_a_model_without_a_tiny_copy_is_refused_by_its_option(tmp_path, capsys):
    assert cli.main(["demo", "--model", "nope", "--output", str(tmp_path / "out")]) == 2
    assert (
        "error: --model: no model 'nope'; choose one of: " in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )
