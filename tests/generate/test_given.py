"""What a request gives beside its prompt: images, a video, guidance of each expert,
prompts as YAML. Values and words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvtrain.errors import ConfigError, DataError
from hvtrain.generate.requests import Request, lacks, prompt_jobs, read_prompts, single_job
from hvtrain.models import find
from hvtrain.models.spec import Flavor


def flavor(model: str, name: str) -> Flavor:
    return find(model).flavor(name)


TEXT = flavor("hunyuan-video", "t2v")
IMAGE = flavor("wan", "i2v-14b-480p")
BOTH_ENDS = flavor("wan", "flf2v-14b")
EITHER = flavor("wan", "ti2v-5b")
EXPERTS = flavor("wan", "t2v-a14b")
LARGER = flavor("hunyuan-video-15", "sr-720p")
DISTILLED = flavor("hunyuan-video-15", "i2v-480p-step-distilled")


def refused(words: str, of: Flavor, **given: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Request.of(of, **given)
    assert str(caught.value) == words


def test_a_prompt_is_empty_where_none_is_given() -> None:
    assert Request.of(TEXT).prompt == ""


def test_what_a_flavor_does_not_take_is_refused_in_words() -> None:
    refused(
        "image is a.png, but 't2v' takes none: leave it out, or take a flavor of image to video (`hvtrain "
        "models`)",
        TEXT, image="a.png"
    )
    refused(
        "end_image is b.png, but 'i2v-14b-480p' takes none: leave it out, or take a flavor of image to video "
        "" "(`hvtrain models`)",
        IMAGE, image="a.png", end_image="b.png"
    )
    refused(
        "video is a.mp4, but 't2v' enlarges none: leave it out, or take a flavor of super-resolution "
        "(`hvtrain models`)",
        TEXT, video="a.mp4"
    )
    refused(
        "guidance is 3, but this 't2v-a14b' embeds no guidance: leave guidance null", EXPERTS, guidance=3.0
    )
    refused(
        "cfg_scale is 2, but 'i2v-480p-step-distilled' is distilled to be sampled without it: leave it out",
        DISTILLED, cfg_scale=2.0
    )
    with pytest.raises(ConfigError, match="^solver: no solver 'eulr'; did you mean 'euler'"):
        Request.of(TEXT, solver="eulr")


def test_what_a_flavor_takes_it_has() -> None:
    both = Request.of(BOTH_ENDS, image="a.png", end_image="b.png")
    assert both.images == both.files == {"image": "a.png", "end_image": "b.png"}
    large = Request.of(LARGER, video="a.mp4")
    assert (large.images, large.files) == ({}, {"video": "a.mp4"})


@pytest.mark.parametrize(("of", "given", "missing"), [
    (TEXT, {}, []), (IMAGE, {}, ["image"]), (IMAGE, {"image": "a.png"}, []),
    (BOTH_ENDS, {}, ["image", "end_image"]), (BOTH_ENDS, {"end_image": "b.png"}, ["image"]), (EITHER, {}, []),
    (LARGER, {}, ["video"]), (LARGER, {"video": "a.mp4"}, []),
])  # fmt: skip
def test_what_is_lacking(of: Flavor, given: dict, missing: list[str]) -> None:
    assert lacks(Request.of(of, **given), of) == missing


def test_what_is_lacking_or_not_there_is_said(tmp_path: Path) -> None:
    there = tmp_path / "a.png"
    there.touch()
    for of, given, words in (
        (IMAGE, {}, "image: 'i2v-14b-480p' is told by an image; give image=FILE, or --i FILE in a line of a "
        "prompt file"),
        (LARGER, {}, "video: 'sr-720p' enlarges a video; give video=FILE, or --v FILE in a line of a prompt "
        "file"),
        (IMAGE, {"image": "gone.png"}, "image: gone.png does not exist"),
    ):
        with pytest.raises(ConfigError) as caught:
            single_job(of, given, prompt="a cat", output="x.mp4")
        assert str(caught.value) == words
    assert single_job(
        IMAGE, {"image": str(there)}, prompt="a cat", output="x.mp4"
    ).request.image == str(there)


def test_guidance_of_each_expert() -> None:
    """By name, else the one for all, else each one's own."""
    own = {
        e.name: EXPERTS.defaults.cfg_scale if e.cfg_scale is None else e.cfg_scale for e in EXPERTS.experts
    }
    assert own == {"high": 4.0, "low": 3.0}
    for given, want in (
        ({}, own), ({"cfg_scale": 2.0}, {"high": 2.0, "low": 2.0}),
        ({"expert_cfg_scale": {"low": 1.5}}, {"high": 4.0, "low": 1.5}),
        ({"cfg_scale": 2.0, "expert_cfg_scale": {"high": 5.0}}, {"high": 5.0, "low": 2.0}),
    ):
        request = Request.of(EXPERTS, **given)
        assert request.expert_cfg_scale == want
        assert {e.name: request.scale(e) for e in EXPERTS.experts} == want
    alone = Request.of(TEXT, cfg_scale=2.0)
    assert (alone.expert_cfg_scale, alone.scale(None), alone.guided) == ({}, 2.0, True)
    ones = Request.of(EXPERTS, cfg_scale=1.0)
    assert not ones.guided and Request.of(EXPERTS, cfg_scale=1.0, expert_cfg_scale={"low": 2.0}).guided
    refused(
        "expert_cfg_scale: 't2v-a14b' has no expert 'hihg'; did you mean 'high'?", EXPERTS,
        expert_cfg_scale={"hihg": 2.0}
    )
    refused(
        "expert_cfg_scale: 't2v' has no expert 'low'; it has one model for all noise levels: give cfg_scale",
        TEXT, expert_cfg_scale={"low": 2.0}
    )


@pytest.mark.parametrize("name", ["p.yaml", "p.YML", "p.json"])
def test_prompts_as_a_list(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text('[{"prompt": "a cat", "seed": 7, "frames": 5}, "a dog"]')
    assert list(read_prompts(path)) == [
        (
            f"{path}, prompt 1", {"prompt": "a cat", "seed": 7, "frames": 5}
        ), (f"{path}, prompt 2", {"prompt": "a dog"})]
    cat, dog = prompt_jobs(TEXT, {"seed": 3, "frames": 1}, prompt_file=str(path), output="out")
    assert [(j.request.prompt, j.request.seed, j.request.frames, str(j.output)) for j in (cat, dog)] == [
        ("a cat", 7, 5, "out/0000.mp4"), ("a dog", 4, 1, "out/0001.png")]


@pytest.mark.parametrize(("text", "words"), [
    ("prompt: a", "prompt_file: {path}: expected a list of prompts, as in `- {{prompt: a cat, seed: 7}}`"),
    ("[]", "prompt_file: {path}: expected a list of prompts"), ("- [", "prompt_file: {path}: not YAML: "),
    ("- a\n- {promt: b}", "{path}, prompt 2: unknown key 'promt'"),
])  # fmt: skip
def test_lists_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises((ConfigError, DataError), match=f"^{re.escape(words.format(path=path))}"):
        list(read_prompts(path))


def test_a_mistake_in_a_list_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("- a cat\n- {prompt: a dog, frames: 2}\n")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}, prompt 2: frames is 2, expected 4n"):
        prompt_jobs(TEXT, {}, prompt_file=str(path), output="out")
    with pytest.raises(DataError, match=r"^prompt_file: .*gone\.txt cannot be read: .*No such file"):
        list(read_prompts(tmp_path / "gone.txt"))
    path = tmp_path / "p.txt"
    path.write_text("# a comment\n\n")
    with pytest.raises(DataError, match=r"^prompt_file: .*p\.txt holds no prompt; write one on each line$"):
        list(read_prompts(path))
