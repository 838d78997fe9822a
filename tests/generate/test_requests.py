"""What to make: defaults of the flavor, prompt files, and requests that cannot be met."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hvtrain.config import GenerateConfig, SampledLora
from hvtrain.errors import ConfigError, DataError
from hvtrain.generate.requests import Job, Request, batches, read_prompts
from hvtrain.generate.run import jobs_of
from hvtrain.models import find
from hvtrain.models.spec import LatentGeometry

FLAVOR = find("hunyuan-video").flavor("t2v")
SKYREELS = find("hunyuan-video").flavor("skyreels-v1-t2v")


def test_what_is_not_given_is_the_flavors_own() -> None:
    r = Request.of(FLAVOR, prompt="a cat", width=640, height=368)
    assert (r.width, r.height, r.frames, r.fps, r.steps, r.shift, r.guidance) == (
        640, 368, 129, 24, 50, 7.0, 6.0
    )
    assert (r.cfg_scale, r.seed) == (1.0, 0)
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
        ({"steps": 10_001}, "steps is 10001, expected at most 10000"),
        ({"fps": 1001}, "fps is 1001, expected at most 1000"),
        ({"width": 10**400 + 1}, "expected a multiple of 16"),
        ({"width": 648}, "for example 656"),
        ({"width": 647}, "for example 640"),
        ({"shift": math.nan}, "shift is nan, expected a finite number"),
        ({"shift": math.inf}, "shift is inf"),
        ({"guidance": math.nan}, "guidance is nan, expected a finite number"),
        ({"guidance": -math.inf}, "guidance is -inf"),
        ({"cfg_scale": math.nan}, "cfg_scale is nan"),
        ({"negative_prompt": "a \udcff"}, "negative_prompt holds what is no text (surrogates not allowed at "
        "letter 2)"),
    ],
)
def test_impossible_sizes(size: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Request.of(FLAVOR, prompt="", **size)
    assert words in str(caught.value)


def test_the_smallest_that_is_possible() -> None:
    r = Request.of(FLAVOR, prompt="", width=16, height=16, frames=1, steps=1, fps=1, shift=0.5, guidance=0.0)
    assert (r.width, r.height, r.frames, r.steps, r.fps, r.shift, r.guidance) == (16, 16, 1, 1, 1, 0.5, 0.0)


def test_each_side_has_its_own_unit() -> None:
    """The VAE's stride times the patch of that side, whatever they are."""
    flavor = replace(FLAVOR, latent=LatentGeometry(16, stride_t=1, stride_h=1, stride_w=4, patch=(1, 1, 3)))
    r = Request.of(flavor, prompt="", width=12, height=1, frames=2)
    assert (r.width, r.height, r.frames) == (12, 1, 2)
    for size, words in (
        ({"width": 16}, "width is 16, expected a multiple of 12, for example 12"),
        ({"width": 0}, "width is 0, expected a multiple of 12, for example 12"),
        ({"height": 0}, "height is 0, expected a multiple of 1, for example 1"),
        ({"height": 1, "frames": 0}, "frames is 0, expected 1n + 1, for example 1 or 2"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(words)}$"):
            Request.of(flavor, prompt="", **{"width": 12, **size})


def test_the_largest_that_is_possible() -> None:
    r = Request.of(
        FLAVOR, prompt="", width=160_000, height=16, frames=1, steps=10_000, fps=1000, guidance=-1.0
    )
    assert (r.width, r.height, r.frames, r.steps, r.fps, r.guidance) == (160_000, 16, 1, 10_000, 1000, -1.0)


def test_a_prompt_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="prompt holds what is no text"):
        Request.of(FLAVOR, prompt="caf\udce9")


def test_a_single_prompt(tmp_path: Path) -> None:
    cfg = GenerateConfig(prompt="a cat", output=str(tmp_path / "cat.mp4"), seed=5, steps=10)
    (job,) = jobs_of(cfg, FLAVOR)
    assert job.output == tmp_path / "cat.mp4" and (job.request.seed, job.request.steps) == (5, 10)
    (nothing,) = jobs_of(GenerateConfig(prompt="", output="x.mp4"), FLAVOR)
    assert nothing.request.prompt == ""
    with pytest.raises(ConfigError, match="ends with .mp4"):
        jobs_of(GenerateConfig(prompt="a cat", output="folder"), FLAVOR)
    with pytest.raises(ConfigError, match="ends with .mp4"):
        jobs_of(GenerateConfig(prompt="a cat", output="cat.avi"), FLAVOR)


def test_one_frame_is_a_picture(tmp_path: Path) -> None:
    picture = {"prompt": "a cat", "output": "cat.png"}
    (job,) = jobs_of(GenerateConfig(**picture, frames=1), FLAVOR)
    assert job.output == Path("cat.png") and job.request.frames == 1
    with pytest.raises(
        ConfigError, match=r"output is cat.png, one picture, but frames is 129: give frames=1, or NAME.mp4"
    ):
        jobs_of(GenerateConfig(**picture), FLAVOR)
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --f 1\na dog --f 5\n")
    jobs = jobs_of(GenerateConfig(prompt_file=str(file), output="out"), FLAVOR)
    assert [str(job.output) for job in jobs] == ["out/0000.png", "out/0001.mp4"]


def test_a_file_in_a_directory_is_named_by_what_makes_it(tmp_path: Path) -> None:
    def name(**changes: object) -> str:
        cfg = GenerateConfig(
            **{"prompt": "A cat: walks,\nslowly!", "output": f"{tmp_path}/", "frames": 5, **changes}
        )
        (job,) = jobs_of(cfg, FLAVOR)
        assert job.output.parent == tmp_path
        return job.output.name

    lora = (SampledLora("l.safetensors", 0.5),)
    names = [
        name(), name(seed=1), name(guidance=2.0), name(lora=lora), name(prompt="a cat walks slowly"),
        name(frames=1)
    ]
    names.append(name(lora=(replace(lora[0], multiplier=0.6),)))
    names += [name(slices="s"), name(slices="s", loraid=(1,)), name(slices="s", lora_multiplier=(0.5,))]
    assert len(set(names)) == len(names) and name() == names[0]
    assert re.fullmatch(r"a-cat-walks-slowly-[0-9a-f]{8}\.mp4", names[0]) and names[5].endswith(".png")
    assert name(output=str(tmp_path)) == names[0]  # it exists
    (job,) = jobs_of(GenerateConfig(prompt="a cat", output="not/there/"), FLAVOR)  # it will
    assert job.output.parent == Path("not/there") and job.output.name.startswith("a-cat-")
    assert (
        name(prompt="猫").startswith("video-")
        and len(name(prompt="word " * 99)) == len("word-" * 8) + len("12345678.mp4")
    )


def test_a_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "# two videos\na cat\n\n  a dog -- running --w 320 --h 176 --d 99 --n blurry, dark --fs 3\n"
    )
    jobs = jobs_of(
        GenerateConfig(prompt_file=str(file), output=str(tmp_path / "out"), seed=7, width=640), FLAVOR
    )
    cat, dog = (job.request for job in jobs)
    assert [job.output.name for job in jobs] == ["0000.mp4", "0001.mp4"]
    assert (cat.prompt, cat.seed, cat.width, cat.shift) == ("a cat", 7, 640, 7.0)
    assert (dog.prompt, dog.seed, dog.width, dog.height) == ("a dog -- running", 99, 320, 176)
    assert (dog.negative_prompt, dog.shift) == ("blurry, dark", 3.0)


def test_a_prompt_file_is_utf_8_also_as_windows_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# a comment\r\n猫\r\n".encode())
    assert list(read_prompts(file)) == [(f"{file}:2", {"prompt": "猫"})]
    file.write_bytes("café".encode("latin-1"))
    causes = {
        file: "'utf-8' codec can't decode byte 0xe9", tmp_path / "none.txt": "No such file",
        tmp_path: "directory"
    }
    for path, why in causes.items():
        with pytest.raises(DataError, match=f"^prompt_file: {path} cannot be read: .*{why}"):
            list(read_prompts(path))


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
        jobs_of(GenerateConfig(prompt_file=str(file), output="out"), FLAVOR)
    assert "prompts.txt:2: frames is 10, expected 4n + 1" in str(caught.value)


def test_every_option_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    line = "a --w 320 --h 176 --f 5 --s 7 --d 3 --g 2.5 --l 4 --fs 3.5 --ss unipc --n not\tthis --n nor this"
    file.write_text(f"# a comment --w 8\nfirst\n\n{line}\n   # no prompt\nthird--w 5\n")
    cfg = GenerateConfig(prompt_file=str(file), output="out", seed=7, fps=12, height=160, steps=2)
    first, second, third = (job.request for job in jobs_of(cfg, FLAVOR))
    assert second == Request(
        prompt="a", width=320, height=176, frames=5, fps=12, steps=7, seed=3, solver="unipc", shift=3.5,
        guidance=2.5, cfg_scale=4.0, negative_prompt="nor this", expert_cfg_scale={},
    )
    assert (first.seed, third.seed) == (7, 9)  # a line's own place counts, also after one with --d
    assert (third.prompt, third.width, third.height, third.steps) == ("third--w 5", 1280, 160, 2)


def test_numbers_that_are_none_are_named_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    for option, words in (
        ("--g nan", "guidance is nan"), ("--fs inf", "shift is inf"), ("--l -inf", "cfg_scale is -inf")
    ):
        file.write_text(f"a dog\na cat {option}\n")
        with pytest.raises(ConfigError) as caught:
            jobs_of(GenerateConfig(prompt_file=str(file), output="out"), FLAVOR)
        assert f"prompts.txt:2: {words}" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 640}, {"height": 320}, {"frames": 5}, {"steps": 3}, {"shift": 2.0}, {"guidance": 2.0},
        {"cfg_scale": 2.0}
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_is_not_sampled_together(change: dict) -> None:
    a = Request.of(FLAVOR, prompt="a", width=320, height=160, frames=9)
    jobs = [Job(a, Path("a.mp4")), Job(replace(a, **change), Path("b.mp4"))]
    assert [len(batch) for batch in batches(jobs, 8)] == [1, 1]


def test_prompt_seed_and_rate_may_differ_in_a_batch() -> None:
    a = Request.of(FLAVOR, prompt="a", seed=1, fps=8)
    b = Request.of(FLAVOR, prompt="b", seed=2, fps=24, negative_prompt="c")
    assert [len(batch) for batch in batches([Job(r, Path("x")) for r in (a, b)], 8)] == [2]


def test_batches_hold_one_layout() -> None:
    sizes = [320, 320, 320, 640, 320]
    jobs = [Job(Request.of(FLAVOR, prompt=str(i), width=w), Path(f"{i}.mp4")) for i, w in enumerate(sizes)]
    assert [[job.request.prompt for job in batch] for batch in batches(jobs, 2)] == [
        ["0", "1"], ["2"], ["3"], ["4"]
    ]
