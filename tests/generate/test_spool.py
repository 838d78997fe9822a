"""Latents between sampling and decoding: found by the same request only, never half a file,
cleared when the video is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hvtrain.errors import DataError
from hvtrain.flow.solvers import State
from hvtrain.generate.spool import find, forget, hidden, keep, visible
from tests.generate.test_video import no_file_above

X = torch.arange(48.0).reshape(2, 2, 3, 4)


def write(output: Path, step: int = 3, identity: str = "me") -> None:
    keep(output, State(X.transpose(2, 3), step), identity=identity, parameters={"prompt": "a cat"})


def test_what_is_kept_is_found_by_its_owner_only(tmp_path: Path) -> None:
    output = tmp_path / "cat [1].mp4"
    assert find(output, "me") is None
    write(output)
    found = find(output, "me")
    assert (
        found is not None and torch.equal(found.x, X.transpose(2, 3)) and found.x.dtype == torch.float32
        and found.step == 3
    )
    assert find(output, "other") is None and find(tmp_path / "dog.mp4", "me") is None
    assert [p.name for p in tmp_path.iterdir()] == [".cat [1].mp4.safetensors"]
    with safe_open(str(hidden(output)), framework="pt") as file:  # readable by other tools
        assert "a cat" in file.metadata()["hvtrain.latents"]
    write(output, step=4)
    assert find(output, "me").step == 4 and find(output, "me").history == ()
    keep(output, State(X, 5, (X + 1, X + 2)), identity="me", parameters={})  # of a multistep solver
    assert [h[0, 0, 0, 0].item() for h in find(output, "me").history] == [1, 2]


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:20], lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"\xff" * 99]
)
def test_a_damaged_file_counts_as_none(damage, tmp_path: Path) -> None:
    output = tmp_path / "cat.mp4"
    write(output)
    hidden(output).write_bytes(damage(hidden(output).read_bytes()))
    assert find(output, "me") is None


def test_latents_go_when_the_video_is_there(tmp_path: Path) -> None:
    output, other = tmp_path / "c[a]t.mp4", tmp_path / "dog.mp4"
    write(output)
    write(other)
    left = [".c[a]t.mp4.123.tmp", "..c[a]t.mp4.safetensors.123.tmp"]  # of killed runs
    for name in [*left, ".dog.mp4.123.tmp", "c[a]t.mp4.123.tmp"]:
        (tmp_path / name).touch()
    forget(output, save=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".dog.mp4.123.tmp", ".dog.mp4.safetensors", "c[a]t.mp4.123.tmp"
    ]
    forget(output, save=False)
    forget(other, save=True)
    assert visible(other) == tmp_path / "dog.latents.safetensors" and find(other, "me").step == 3
    assert not hidden(other).exists() and not (tmp_path / ".dog.mp4.123.tmp").exists()
    forget(other, save=True)
    assert find(other, "me") is not None  # a second run does not take it away


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "cat.mp4"
    write(output, step=1)
    with (
        no_file_above(100),
        pytest.raises(DataError, match=r"the latents cannot be written .*make room and start again")
    ):
        write(output, step=2)
    assert find(output, "me").step == 1 and len(list(tmp_path.iterdir())) == 1
