"""hvtrain encode with the models that ship: once, again, after changes, after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hvtrain import encode
from hvtrain.config import EncodeConfig, load
from hvtrain.errors import DataError
from hvtrain.tiny.data import ClipsRecipe, write_clips
from shards import open_set
from shards.verify import verify

CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "encode.yaml"


@pytest.fixture
def dataset(tmp_path):
    return write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=6, seed=3))


def run(dataset, output):
    encode.run(load(EncodeConfig, CONFIG, [f"dataset={dataset}", f"output={output}", "samples_per_tar=2"]))
    return open_set(output)


def contents(found):
    return {s.key: {n: t.clone() for n, t in s.tensors.items()} for s in map(found.get, range(len(found)))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k])


def test_encode_again_and_after_changes(dataset, tmp_path, capsys):
    first = contents(run(dataset, tmp_path / "out"))
    assert list(verify(tmp_path / "out")) == [] and len(first) == 6
    assert {tuple(s["latents"].shape) for s in first.values()} == {(16, 3, 8, 8)}
    assert open_set(tmp_path / "out").empty_text["pooled"].shape == (64,)
    capsys.readouterr()
    assert same(first, contents(run(dataset, tmp_path / "out")))
    assert "latents: 0 encoded, 0 copied, 6 kept; text: 0 encoded, 0 copied, 6 kept" in capsys.readouterr().out

    (tmp_path / "clips/clip_00001.txt").write_text("another caption")
    changed = contents(run(dataset, tmp_path / "out"))
    assert "latents: 0 encoded, 0 copied, 6 kept; text: 1 encoded" in capsys.readouterr().out
    assert sum(not torch.equal(first[k]["pooled"], changed[k]["pooled"]) for k in first) == 1

    clip = tmp_path / "clips/clip_00002.mp4"
    clip.write_bytes((tmp_path / "clips/clip_00003.mp4").read_bytes())
    again = contents(run(dataset, tmp_path / "out"))
    assert "latents: 1 encoded" in capsys.readouterr().out
    assert sum(not torch.equal(again[k]["latents"], changed[k]["latents"]) for k in again) == 1

    clip.unlink()
    assert len(run(dataset, tmp_path / "out")) == 5 and list(verify(tmp_path / "out")) == []


def test_equal_stems_do_not_collide(tmp_path):
    for folder in ("a", "b"):
        write_clips(ClipsRecipe(output=str(tmp_path / folder), n=1, seed=ord(folder)))
    both = tmp_path / "both.toml"
    both.write_text("[general]\nresolution=[64,64]\n" + "".join(
        f"[[datasets]]\nvideo_directory='{tmp_path / f}'\ntarget_frames=[9]\n" for f in "ab"))
    assert len(set(run(both, tmp_path / "out").keys)) == 2


def test_a_killed_run_is_continued(dataset, tmp_path):
    whole = contents(run(dataset, tmp_path / "whole"))
    command = [sys.executable, "-m", "launcher.cli", "encode", str(CONFIG), f"dataset={dataset}",
               f"output={tmp_path / 'out'}", "samples_per_tar=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("latents/*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert same(whole, contents(run(dataset, tmp_path / "out"))) and list(verify(tmp_path / "out")) == []
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_refusals(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    with pytest.raises(DataError, match=r"holds other files \('photo.jpg'\)"):
        run(dataset, tmp_path / "mine")
    (tmp_path / "clips/clip_00000.mp4").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"clip_00000\.mp4: cannot be decoded"):
        run(dataset, tmp_path / "out")
