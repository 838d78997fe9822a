"""hvtrain encode with the models that ship: once, again, after changes, after a kill."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from hvtrain.config import EncodeConfig, asset, load
from hvtrain.encode import run as encode
from hvtrain.errors import DataError
from hvtrain.tiny.data import ClipsRecipe, write_clips
from shards import open_set
from shards.verify import verify

CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "encode.yaml"


def run(dataset, output, *more):
    encode.run(
        load(EncodeConfig, CONFIG, [f"dataset={dataset}", f"output={output}", "samples_per_tar=2", *more])
    )
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
    assert (
        "latents: 0 encoded, 0 copied, 6 kept; text: 0 encoded, 0 copied, 6 kept" in capsys.readouterr().out
    )

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
    while (
        not list((tmp_path / "out").glob("latents/*.tar")) and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert same(whole, contents(run(dataset, tmp_path / "out"))) and list(verify(tmp_path / "out")) == []
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_what_a_stopped_run_wrote_is_found_in_other_tars_and_no_tar_is_left_over(
    tmp_path, capsys, monkeypatch
):
    """Stopped between the columns there is no manifest: only the journal knows the tars."""
    dataset = write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=10, seed=3))
    out = tmp_path / "out"

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hvtrain.encode.columns.open_text", stopped)
        run(dataset, out)
    assert len(list(out.glob("latents/*.tar"))) == 5 and not (out / "manifest.json").exists()
    for name in (".mp4", ".txt"):  # a new first clip: every sample moves to another tar
        (tmp_path / f"clips/a{name}").write_bytes((tmp_path / f"clips/clip_00004{name}").read_bytes())
    found = run(dataset, out)
    assert "latents: 1 encoded, 10 copied, 0 kept; text: 11 encoded" in capsys.readouterr().out
    named = {tar.path for chunk in found.manifest.chunks for tar in chunk.tars.values()}
    assert {str(p.relative_to(out)) for p in out.glob("*/*.tar")} == named and list(verify(out)) == []


def test_other_bytes_of_the_same_length_are_encoded_again(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    for name, grey in (("a", 40), ("b", 200)):
        Image.new("RGB", (64, 64), (grey,) * 3).save(tmp_path / f"clips/{name}.bmp")  # always 12,342 bytes
        (tmp_path / f"clips/{name}.txt").write_text(name)
    dataset = tmp_path / "d.toml"
    dataset.write_text("[general]\nresolution = 64\n[[datasets]]\nimage_directory = 'clips'\n")
    first = contents(run(dataset, tmp_path / "out", "columns=[latents]"))
    (tmp_path / "clips/a.bmp").write_bytes((tmp_path / "clips/b.bmp").read_bytes())
    again = contents(run(dataset, tmp_path / "out", "columns=[latents]"))
    assert "latents: 1 encoded, 0 copied, 1 kept" in capsys.readouterr().out
    (a, b) = sorted(first)
    assert (
        not torch.equal(first[a]["latents"], again[a]["latents"])
        and torch.equal(first[b]["latents"], again[b]["latents"])
    )


def test_a_rerun_with_nothing_to_do_loads_no_model_and_says_so(dataset, tmp_path, capsys, monkeypatch):
    import dataclasses
    import shutil

    from hvtrain.models import find

    vae = shutil.copytree(Path(asset("tiny:vae.safetensors")).parent, tmp_path / "assets") / "vae.safetensors"
    out, spec = tmp_path / "out", find("hunyuan-video")
    first = contents(run(dataset, out, f"model.vae={vae}"))
    capsys.readouterr()

    def loads(*arguments, **options):
        raise AssertionError("a model is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(encode, "find", lambda name: dataclasses.replace(spec, open_vae=loads, open_text=loads))
        assert same(first, contents(run(dataset, out, f"model.vae={vae}")))
        assert "6 samples; nothing to do, all of it was there; latents: 0 encoded" in capsys.readouterr().out
        # One caption more: text is encoded, the VAE stays where it is.
        (tmp_path / "clips/clip_00001.txt").write_text("another caption")
        patch.setattr(encode, "find", lambda name: dataclasses.replace(spec, open_vae=loads))
        run(dataset, out, f"model.vae={vae}")
        assert "6 samples; latents: 0 encoded, 0 copied, 6 kept; text: 1 encoded" in capsys.readouterr().out
        # A file that was touched may be another one: it is looked into.
        os.utime(vae, ns=(0, 0))
        with pytest.raises(AssertionError, match="a model is loaded"):
            run(dataset, out, f"model.vae={vae}")
    run(dataset, out, f"model.vae={vae}")
    assert "nothing to do" in capsys.readouterr().out  # it was the same
    for lost in (out / "empty_text.safetensors", next(out.glob("text/*.tar"))):
        lost.unlink()
        run(dataset, out, f"model.vae={vae}")
        assert list(verify(out)) == [] and lost.exists()
    for change, says in (
        ("seed=1", "latents: 6 encoded, 0 copied, 0 kept; text: 0 enc"), ("dtype=float32", "text: 6 encoded")
    ):
        capsys.readouterr()
        run(dataset, out, f"model.vae={vae}", change)  # what is remembered holds for these settings only
        assert says in capsys.readouterr().out


def test_progress_in_a_log_names_the_clip_and_leaves_out_what_was_there(tmp_path, capsys, monkeypatch):
    from hvtrain.encode import progress
    from hvtrain.encode.samples import Picture, PlannedSample

    now = iter(range(0, 1000, 10))  # seconds: every look at the clock is 10 later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    sample = PlannedSample("k", Picture(Path("a clip\n.mp4"), "", (0,), (10, 10)), ("c",))
    meter = progress.Meter(tmp_path, rank=0, world=1, samples=4, cost=4 * sample.cost)
    meter.column = "latents"
    meter.advance(sample, False)  # nothing was encoded yet: no rate, no line
    meter.advance(sample, True)
    meter.advance(sample, True)
    assert capsys.readouterr().out.splitlines() == [
        # one of three in 40 s: two more in 80 s
        r"2 of 4 (samples x columns) done, at latents, a clip\n.mp4, about 80 s left",
        r"3 of 4 (samples x columns) done, at latents, a clip\n.mp4, about 30 s left",
    ]


class _Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of what goes from one device to another."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != out.device:
            self.dtypes.append((args[0].dtype, out.dtype))
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pixels_go_to_the_vae_as_numbers_from_minus_one_to_one_and_to_its_device_as_bytes(device, tmp_path):
    import types

    from hvtrain.encode.encoders import Latents, PixelEncoder
    from hvtrain.encode.samples import Picture, PlannedSample

    Image.new("RGB", (64, 48), (0, 51, 255)).save(tmp_path / "a.png")
    seen = []

    def see(video, *, generator):
        seen.append(video)
        return torch.zeros(len(generator), 16, 1, 6, 8)

    vae = types.SimpleNamespace(device=torch.device(device), dtype=torch.float32, encode=see)
    sample = PlannedSample("k", Picture(tmp_path / "a.png", "", (0,), (64, 48)), ("c",))
    with _Copies() as copies:
        list(PixelEncoder(lambda s: (s.clip,), Latents(vae, "latents", torch.float32, 0), 1, 1)([sample]))
    (video,) = seen
    assert video.shape == (1, 3, 1, 48, 64) and video.dtype == torch.float32
    if device == "meta":
        assert copies.dtypes == [(torch.uint8, torch.uint8)]
    else:
        expected = torch.tensor([-1.0, -0.6, 1.0]).view(1, 3, 1, 1, 1).expand_as(video)
        torch.testing.assert_close(video, expected)


def test_refusals(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    with pytest.raises(DataError, match=r"holds other files \('photo.jpg'\)"):
        run(dataset, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        run(dataset, tmp_path / "file")


def reasons(output):
    path = output / "rejected.jsonl"
    return [json.loads(line)["reason"] for line in path.read_text().splitlines()] if path.exists() else []


def test_what_cannot_be_used_is_listed_and_strict_stops(dataset, tmp_path, capsys):
    clips, out = tmp_path / "clips", tmp_path / "out"
    (clips / "clip_00000.mp4").write_bytes(b"junk")
    (clips / "clip_00001.txt").unlink()
    short = dataset.read_text() + f"[[datasets]]\nvideo_directory = '{clips}'\ntarget_frames = [33]\n"
    dataset.write_text(short)
    assert len(run(dataset, out)) == 4 and list(verify(out)) == []
    found = reasons(out)
    assert sum("clip_00000.mp4: cannot be decoded" in r for r in found) == 2
    assert sum("clip_00001.mp4: has no caption" in r for r in found) == 2
    assert sum("9 frames, target_frames asks for 33" in r for r in found) == 4
    assert "8 not usable" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"clip_0000[01].*\(strict"):
        run(dataset, tmp_path / "strict", "strict=true")
    assert not (tmp_path / "strict/manifest.json").exists()


def test_a_clip_that_ends_early_is_rejected_while_encoding_and_not_tried_again(
    dataset, tmp_path, capsys, monkeypatch
):
    """The container promises more frames than can be decoded: only the decoder finds out."""
    from hvtrain.encode import encoders

    real, tried = encoders.read_windows, []

    def cut_off(path, windows, *, size):
        tried.append(path.name)
        if path.name == "clip_00003.mp4":
            raise DataError(f"{path}: only 3 of the 9 frames can be decoded")
        return real(path, windows, size=size)

    monkeypatch.setattr(encoders, "read_windows", cut_off)
    out = tmp_path / "out"
    assert len(run(dataset, out)) == 5 and list(verify(out)) == [] and tried.count("clip_00003.mp4") == 1
    (reason,) = reasons(out)
    assert "only 3 of the 9 frames" in reason
    tried.clear()
    assert len(run(dataset, out)) == 5 and not tried and len(reasons(out)) == 1
    assert (
        "latents: 0 encoded, 0 copied, 5 kept; text: 0 encoded, 0 copied, 5 kept" in capsys.readouterr().out
    )
    monkeypatch.setattr(encoders, "read_windows", real)
    # mended
    (tmp_path / "clips/clip_00003.mp4").write_bytes((tmp_path / "clips/clip_00001.mp4").read_bytes())
    assert len(run(dataset, out)) == 6 and reasons(out) == []


def test_a_nan_latent_is_rejected_also_from_the_text_column(dataset, tmp_path, monkeypatch):
    from hvtrain.models.video_vae import VideoVae

    real, calls = VideoVae.encode, itertools.count()

    def poisoned(self, video, **options):
        latents = real(self, video, **options)
        if next(calls) % 2:
            latents[0, 0, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(VideoVae, "encode", poisoned)
    found = run(dataset, tmp_path / "out")
    assert len(found) == 3 and len(reasons(tmp_path / "out")) == 3 and list(verify(tmp_path / "out")) == []
    assert all("NaN or infinite latents" in r for r in reasons(tmp_path / "out"))


def test_two_ranks_share_the_work_and_make_the_same_set(dataset, tmp_path):
    one = contents(run(dataset, tmp_path / "one"))
    command = [sys.executable, "-m", "launcher.cli", "launch", "--nproc", "2", "encode", str(CONFIG),
               f"dataset={dataset}", f"output={tmp_path / 'two'}", "samples_per_tar=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and "6 samples; latents: 6 encoded" in done.stdout
    assert same(one, contents(open_set(tmp_path / "two")))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert manifests[0] == manifests[1]


def test_what_was_encoded_before_is_known_again():
    """Digests and names of tars as every version so far made them: else all would be encoded anew."""
    from hvtrain.encode.columns import kind_of
    from hvtrain.encode.samples import Picture, PlannedChunk, PlannedSample
    from hvtrain.models import find

    spec = find("hunyuan-video")
    s = PlannedSample("k", Picture(Path("/a/b.mp4"), "1/2", (0, 1, 2), (64, 48)), ("cap", "two"),
                      controls=(Picture(Path("/a/c.mp4"), "3/4", (0,), (64, 48)),))
    kinds = [kind_of(c, spec, spec.flavor("t2v")) for c in ("latents", "image", "control", "text")]
    assert [(kind.digest(s, "enc")[:16], kind.tar_name(PlannedChunk((s,)), "enc")) for kind in kinds] == [
        ("6ca8b097daaf6d5f", "latents/3x48x64-6543cd173e06e6ce.tar"),
        ("6852787288c574e7", "image/3x48x64-f2036094d0c17bac.tar"),
        ("2c83349837cedcb4", "control/3x48x64-fec26479ddc862e6.tar"),
        ("1a2a9b5a27c946b8", "text/3x48x64-2a67bec05dd3d30c.tar"),
    ]
    assert s.state == "k/d967d67329ca5793/6cb594bfdbaedd37/9c2e646884ab11ae"
    assert [kind.fields[0].name for kind in kinds] == ["latents", "image_latents", "control_latents", "text"]
