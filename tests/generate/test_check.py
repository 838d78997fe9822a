"""What is refused before weights are read, by value: memory, room on the disk,
folders, parts of other models."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hvtrain.config import ModelConfig, asset, build
from hvtrain.errors import CheckpointError, ConfigError, DataError, HvtrainError
from hvtrain.generate.check import check_memory, check_outputs, check_parts, least_bytes, on_main
from hvtrain.generate.conditions import check_conds
from hvtrain.generate.requests import Job, Request
from hvtrain.models import find
from hvtrain.parallel.context import ParallelContext
from tests.generate.models import random_cond, spec_and_flavor

FLAVOR = find("hunyuan-video").flavor("t2v")
LAYERS = {f"blocks.{i}": (9216, 3072) for i in range(3)} | {"head": (64, 12288)}
Usage = namedtuple("Usage", "total used free")


def job(path: Path | str = "cat.mp4", **changes: int) -> Job:
    return Job(
        Request.of(FLAVOR, prompt="", **{"width": 1280, "height": 720, "frames": 129, **changes}), Path(path)
    )


def test_the_least_that_a_step_needs() -> None:
    """118,800 image tokens of 3072 values: five such tensors of a share, or one of the
    whole where the share is small."""
    one = 118_800 * 3072
    assert least_bytes([job()], FLAVOR, LAYERS, sp=1, n_bytes=2) == 5 * one * 2
    assert least_bytes([job()] * 3, FLAVOR, LAYERS, sp=1, n_bytes=2) == 3 * 5 * one * 2
    assert least_bytes([job()], FLAVOR, LAYERS, sp=1, n_bytes=4) == 5 * one * 4
    # from two ranks on, the decoded video is the larger: 129 x 720 x 1280 x 3 values, twice, in float32
    assert least_bytes([job()], FLAVOR, LAYERS, sp=2, n_bytes=2) == 129 * 720 * 1280 * 24
    assert least_bytes([job()], FLAVOR, {"a": (8, 8192)}, sp=8, n_bytes=4) == 118_800 * 8192 * 4


def test_what_fits_nowhere_is_refused_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = ParallelContext()
    with pytest.raises(ConfigError) as caught:
        check_memory(
            [[job()], [job("big.mp4", width=160_000, height=160_000, frames=1)]], FLAVOR, LAYERS, n_bytes=2,
            ctx=ctx
        )
    said = str(caught.value)
    assert (
        "big.mp4: 160000 x 160000 x 1 frames are 100,000,000 image tokens" in said
        and "at least 2,861.0 GiB" in said
    )
    assert said.count("\n") == 0 and "parallel.ulysses" in said
    need = 118_800 * 3072 * 5 * 2
    monkeypatch.setattr(ParallelContext, "memory_bytes", need)
    check_memory([[job()]], FLAVOR, LAYERS, n_bytes=2, ctx=ctx)
    with pytest.raises(ConfigError, match=r"\(2 together\)"):
        check_memory([[job()] * 2], FLAVOR, LAYERS, n_bytes=2, ctx=ctx)
    monkeypatch.setattr(ParallelContext, "memory_bytes", need - 1)
    with pytest.raises(ConfigError, match="3.4 GiB"):
        check_memory([[job()]], FLAVOR, LAYERS, n_bytes=2, ctx=ctx)


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 latents of 16 x 33 x 90 x 160 for as many as lie there at a time, and a hundredth
    of the pixels of each video."""
    latents, video = 16 * 33 * 90 * 160 * 4, 129 * 720 * 1280 * 3 // 100
    jobs = [job(tmp_path / f"{i}.mp4") for i in range(3)]

    def room(free: int, **how: object) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
        check_outputs(
            jobs, FLAVOR, **{"n_sampled": 3, "decode": "each", "size": 1, "ctx": ParallelContext(), **how}
        )

    for how, n in (
        ({}, 1), ({"size": 2}, 2), ({"decode": "last"}, 3), ({"n_sampled": 0}, 0), ({"size": 8}, 3)
    ):
        need = 3 * video + n * latents
        room(need, **how)
        with pytest.raises(
            DataError, match=r"has [\d.]+ MiB free; the latents and 3 file\(s\) need at least [\d.]+ MiB"
        ):
            room(need - 1, **how)
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    cases = {
        tmp_path / "file" / "a.mp4": "file",
        tmp_path / "folder.mp4": "folder.mp4 is a directory",
        Path("/proc/never/a.mp4"): "/proc/never cannot be written",
        Path("/proc/a.mp4"): "/proc",
    }
    for path, words in cases.items():
        with pytest.raises(DataError, match="output: ") as caught:
            check_outputs([job(path)], FLAVOR, n_sampled=1, decode="each", size=1, ctx=ParallelContext())
        assert words in str(caught.value)
    new = tmp_path / "new" / "below"
    check_outputs([job(new / "a.mp4")], FLAVOR, n_sampled=1, decode="each", size=1, ctx=ParallelContext())
    assert new.is_dir() and not list(new.iterdir())


OWN = {"dit": "tiny:dit.safetensors", "vae": "tiny:vae.safetensors", "llm": "tiny:llm", "clip": "tiny:clip"}


def parts(**changes: str) -> dict[str, str]:
    spec, flavor = spec_and_flavor()
    return check_parts(build(ModelConfig, {**OWN, "dtype": "float32", **changes}, where="test"), spec, flavor)


def test_parts_are_known_by_their_headers(tmp_path: Path) -> None:
    found = parts()
    assert set(found) == {"vae", "text"} and all(len(value) == 64 for value in found.values())
    assert parts(vae=asset("tiny:vae.safetensors")) == found
    whole = Path(asset("tiny:vae.safetensors")).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    for changes, words in (
        ({"vae": "tiny:dit.safetensors"}, "it looks like a video DiT"),
        ({"vae": str(tmp_path / "cut.safetensors")}, "cut.safetensors"),
        ({"llm": "tiny:clip"}, "not a Llama"),
        ({"clip": "tiny:llm"}, "not a CLIP"),
        ({"vae": "nowhere.safetensors"}, "nowhere.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=words):
            parts(**changes)


def test_a_vae_of_other_latents() -> None:
    spec, flavor = spec_and_flavor()
    from dataclasses import replace

    model = build(ModelConfig, OWN, where="test")
    for latent in (replace(flavor.latent, channels=8), replace(flavor.latent, stride_t=8)):
        with pytest.raises(CheckpointError, match="16 channels, 4 x 8 x 8 smaller"):
            check_parts(model, spec, replace(flavor, latent=latent))


def test_text_encoders_of_another_model() -> None:
    spec, flavor = spec_and_flavor()
    cond = random_cond(5)
    check_conds([cond], spec, flavor)
    with pytest.raises(CheckpointError, match="make 'pooled' of shape .* belong to another model"):
        check_conds([cond, {**cond, "pooled": torch.zeros(1, 7)}], spec, flavor)
    with pytest.raises(CheckpointError, match="make 'text'"):
        check_conds([{**cond, "text": cond["text"][0]}], spec, flavor)


def test_a_mistake_that_the_first_process_finds_is_everyones() -> None:
    class Second(ParallelContext):
        def gather_objects(self, value: object) -> list:
            return [first, value]

    def fail() -> str:
        raise ConfigError("no")

    assert on_main(ParallelContext(), lambda: "yes") == "yes"
    with pytest.raises(HvtrainError, match="no"):
        on_main(ParallelContext(), fail)
    first: tuple = ("theirs", None)
    assert on_main(Second(world=2, rank=1), fail) == "theirs"
    first = (None, ConfigError("their mistake"))
    with pytest.raises(ConfigError, match="their mistake"):
        on_main(Second(world=2, rank=1), fail)
