"""What to make: defaults of the flavor, prompt files, and requests that cannot be met."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvtrain.config import GenerateConfig
from hvtrain.errors import ConfigError, DataError
from hvtrain.generate.requests import Job, Request, batches, plan_jobs, read_prompts
from hvtrain.models import find

FLAVOR = find("hunyuan-video").flavor("t2v")
SKYREELS = find("hunyuan-video").flavor("skyreels-v1-t2v")


def test_what_is_not_given_is_the_flavors_own() -> None:
    r = Request.of(FLAVOR, prompt="a cat", width=640, height=368)
    assert (r.width, r.height, r.frames, r.fps, r.steps, r.shift, r.guidance) == (640, 368, 129, 24, 50, 7.0, 6.0)
    assert r.cfg_scale == 1.0
    other = Request.of(SKYREELS, prompt="a cat")
    assert (other.guidance, other.cfg_scale, other.frames) == (1.0, 6.0, 97)
    assert "overexposed" in other.negative_prompt
    assert Request.of(SKYREELS, prompt="a cat", negative_prompt="").negative_prompt == ""


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"frames": 128}, "frames is 128, expected 4n + 1, for example 125 or 129"),
        ({"frames": 0}, "frames is 0, expected 4n + 1, for example 1 or 5"),
        ({"width": 650}, "width is 650, expected a multiple of 16, for example 656"),
        ({"height": 8}, "height is 8, expected a multiple of 16, for example 16"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0.0}, "shift is 0"),
        ({"fps": -1}, "fps is -1"),
    ],
)
def test_impossible_sizes(size: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Request.of(FLAVOR, prompt="", **size)
    assert words in str(caught.value)


def test_a_single_prompt(tmp_path: Path) -> None:
    cfg = GenerateConfig(prompt="a cat", output=str(tmp_path / "cat.mp4"), seed=5, steps=10)
    (job,) = plan_jobs(cfg, FLAVOR)
    assert job.output == tmp_path / "cat.mp4" and (job.request.seed, job.request.steps) == (5, 10)
    with pytest.raises(ConfigError, match="ends with .mp4"):
        plan_jobs(GenerateConfig(prompt="a cat", output="folder"), FLAVOR)


def test_a_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two videos\na cat\n\n  a dog -- running --w 320 --h 176 --d 99 --n blurry, dark --fs 3\n")
    jobs = plan_jobs(GenerateConfig(prompt_file=str(file), output=str(tmp_path / "out"), seed=7, width=640), FLAVOR)
    cat, dog = (job.request for job in jobs)
    assert [job.output.name for job in jobs] == ["0000.mp4", "0001.mp4"]
    assert (cat.prompt, cat.seed, cat.width, cat.shift) == ("a cat", 7, 640, 7.0)
    assert (dog.prompt, dog.seed, dog.width, dog.height) == ("a dog -- running", 99, 320, 176)
    assert (dog.negative_prompt, dog.shift) == ("blurry, dark", 3.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ("# only a comment\n", "holds no prompt"),
        ("a cat --q 3", ":1: no option '--q'"),
        ("a dog\na cat --w wide", ":2: --w is 'wide', expected a number (width)"),
    ],
)
def test_prompt_files_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_prompts(file))
    assert words in str(caught.value)


def test_a_line_that_asks_for_the_impossible_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\na cat --f 10\n")
    with pytest.raises(ConfigError) as caught:
        plan_jobs(GenerateConfig(prompt_file=str(file), output="out"), FLAVOR)
    assert "prompts.txt:2: frames is 10, expected 4n + 1" in str(caught.value)


def test_batches_hold_one_layout() -> None:
    sizes = [320, 320, 320, 640, 320]
    jobs = [Job(Request.of(FLAVOR, prompt=str(i), width=w), Path(f"{i}.mp4")) for i, w in enumerate(sizes)]
    assert [[job.request.prompt for job in batch] for batch in batches(jobs, 2)] == [["0", "1"], ["2"], ["3"], ["4"]]
