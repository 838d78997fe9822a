"""What a killed, stopped or failed generation has done is kept: each video when it is
sampled, and nothing twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hvtrain import config, stopping
from hvtrain.config import GenerateConfig
from hvtrain.errors import DataError
from hvtrain.generate import run as generate
from hvtrain.generate import sample, write
from hvtrain.generate.spool import visible
from hvtrain.generate.stop import Stopped
from hvtrain.generate.video import read_metadata
from hvtrain.models.load import save_dit
from hvtrain.parallel.context import ParallelContext, start
from tests.generate.models import random_dit, spec_and_flavor, write_dit
from tests.parallel.ranks import run_ranks
from tests.wait import wait_for

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red circle moves left", "a blue square", "a ring")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dit(tmp_path_factory.mktemp("resume") / "dit.safetensors")


def overrides(dit: Path, output: Path, **changes: object) -> list[str]:
    """Three prompts, of 27 image tokens."""
    prompts = output.with_suffix(".txt")
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n")
    values = {
        "model.dit": dit, "model.vae": "tiny:vae.safetensors", "model.llm": "tiny:llm",
        "model.clip": "tiny:clip", "model.dtype": "float32", "model.vae_dtype": "float32",
        "precision": "fp32", "prompt_file": prompts, "output": output, "steps": 4, "width": 48, "height": 48,
        "frames": 9, **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def make(dit: Path, output: Path, ctx: ParallelContext | None = None, **changes: object) -> list[Path]:
    """As typed, but that each file also says which frames the encoder was given."""
    real = write.write_video

    def say_frames(path: Path, frames: np.ndarray, *, fps: float, metadata: dict) -> None:
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        real(path, frames, fps=fps, metadata={**metadata, "frames_digest": digest})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "write_video", say_frames)
        return generate.run(config.load(GenerateConfig, None, overrides(dit, output, **changes)), ctx)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, dict]:
    """Parameters and frames of each file; one that is no video fails."""
    return {path.name: read_metadata(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole_folder(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run makes that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert [path.name for path in make(dit, output)] == ["0000.mp4", "0001.mp4", "0002.mp4"]
    return output


@pytest.fixture
def whole(whole_folder: Path) -> dict[str, dict]:
    found = contents(whole_folder)
    assert len({video["frames_digest"] for video in found.values()}) == 3
    return found


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the DiT was opened")

    monkeypatch.setattr(sample, "open_dit", refuse)


def at_keep(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path, int], None]) -> None:
    """Call act(output, step) when a video's latents have been written."""
    keep = sample.keep

    def keep_and_act(output: Path, kept, **about: object) -> None:
        keep(output, kept, **about)
        act(output, kept.step)

    monkeypatch.setattr(sample, "keep", keep_and_act)


@pytest.mark.parametrize("decode", ["each", "last"])
def test_videos_appear_when_they_are_sampled(
    dit: Path, whole: dict, decode: str, tmp_path: Path, monkeypatch
) -> None:
    output, seen = tmp_path / "out", []
    wanted = {"each": [0, 1, 2], "last": [0, 0, 0]}[decode]

    def videos() -> int:
        return len(list(output.glob("*.mp4")))

    def note(path: Path, step: int) -> None:
        # a thread writes them: while the sampling stands still here, too
        wait_for(lambda: videos() >= wanted[len(seen)])
        seen.append((path.name, step, videos()))

    at_keep(monkeypatch, note)
    make(dit, output, decode=decode)
    assert seen == [(f"{i:04d}.mp4", 4, n) for i, n in enumerate(wanted)]
    assert contents(output) == whole  # nothing else is left there


def test_a_second_run_makes_only_what_is_missing_or_was_asked_for_anew(
    dit: Path, whole: dict, whole_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    output = Path(shutil.copytree(whole_folder, tmp_path / "out"))
    (output / "0001.mp4").unlink()
    with monkeypatch.context() as patch:
        sampled: list[str] = []
        at_keep(patch, lambda path, step: sampled.append(path.name))
        assert len(make(dit, output)) == 3 and sampled == ["0001.mp4"]
        assert (
            "2 of 3 are there already, made with these parameters: 0000.mp4, 0002.mp4"
            in capsys.readouterr().out
        )
        assert contents(output) == whole
        (output.with_suffix(".txt")).write_text(f"{PROMPTS[0]}\n{PROMPTS[1]} --d 77\n{PROMPTS[2]}\n")
        make(dit, output)
        assert sampled == ["0001.mp4"] * 2
        assert "0001.mp4: made with other parameters, and replaced" in capsys.readouterr().out
    assert read_metadata(output / "0001.mp4")["seed"] == 77
    monkeypatch.setattr(sample, "open_dit", None)
    make(dit, output)
    assert "3 of 3 are there already" in capsys.readouterr().out
    assert contents(output) == {**whole, "0001.mp4": read_metadata(output / "0001.mp4")}


def test_the_same_file_of_another_model_is_not_the_same_video(dit: Path, whole: dict, tmp_path: Path) -> None:
    """A LoRA or model that is trained again keeps its name."""
    output, changed = tmp_path / "out", tmp_path / "dit.safetensors"
    changed.write_bytes(dit.read_bytes())
    make(changed, output)
    assert contents(output) == whole
    model = random_dit()
    model.get_parameter("img_in.proj.weight").data.mul_(1.5)
    save_dit(model, changed, spec=spec_and_flavor()[0], flavor=spec_and_flavor()[1])
    make(changed, output)
    new = contents(output)
    assert (
        new.keys() == whole.keys() and all(new[n]["frames_digest"] != whole[n]["frames_digest"] for n in new)
    )


def test_how_the_work_is_done_changes_no_identity(
    dit: Path, whole: dict, whole_folder: Path, tmp_path: Path, no_sampling: None
) -> None:
    output = Path(shutil.copytree(whole_folder, tmp_path / "out"))
    make(dit, output, batch_size=3, blocks_to_swap=2, decode="last")
    assert contents(output) == whole


def test_a_file_that_cannot_be_written_costs_no_sampling(
    dit: Path, whole: dict, tmp_path: Path, monkeypatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        written, real = [], write.write_video

        def full_at_the_second(path: Path, *args: object, **options: object) -> None:
            if written:
                raise DataError(f"{path} cannot be written (No space left on device)")
            written.append(path)
            real(path, *args, **options)

        patch.setattr(write, "write_video", full_at_the_second)
        with pytest.raises(DataError, match="No space left"):
            make(dit, output, batch_size=3)
    assert files(output) == [".0001.mp4.safetensors", ".0002.mp4.safetensors", "0000.mp4"]
    monkeypatch.setattr(sample, "open_dit", None)
    make(dit, output, batch_size=3)
    assert files(output) == ["0000.mp4", "0001.mp4", "0002.mp4"]


def test_latents_stay_if_asked_for(dit: Path, whole: dict, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "out"
    make(dit, output, save_latents=True)
    assert files(output) == [
        name for i in range(3) for name in (f"{i:04d}.latents.safetensors", f"{i:04d}.mp4")
    ]
    (output / "0001.mp4").unlink()
    monkeypatch.setattr(sample, "open_dit", None)
    make(dit, output, save_latents=True, fps=12)  # the rate is no part of the latents
    assert visible(output / "0001.mp4").exists() and read_metadata(output / "0001.mp4")["fps"] == 12
    assert read_metadata(output / "0000.mp4")["frames_digest"] == whole["0000.mp4"]["frames_digest"]


def test_nan_is_refused_with_its_step(dit: Path, tmp_path: Path) -> None:
    model = random_dit()
    model.get_parameter("final_layer.linear.bias").data[3] = float("nan")
    bad, output = tmp_path / "bad.safetensors", tmp_path / "out"
    save_dit(model, bad, spec=spec_and_flavor()[0], flavor=spec_and_flavor()[1])
    with pytest.raises(DataError, match=r"0000\.mp4: its latents are not finite after step 1 of 4"):
        make(bad, output)
    assert files(output) == []


def test_a_vae_that_overflows_is_refused_and_its_latents_stay(dit: Path, tmp_path: Path, monkeypatch) -> None:
    output, real = tmp_path / "out", write.open_vae
    with monkeypatch.context() as patch:

        def broken(*args: object):
            vae = real(*args)
            next(vae.model.decoder.parameters()).data.fill_(float("nan"))
            return vae

        patch.setattr(write, "open_vae", broken)
        with pytest.raises(
            DataError, match=r"0000\.mp4: the VAE makes values that are not finite in model.vae_dtype float32"
        ):
            make(dit, output)
    assert files(output) == [".0000.mp4.safetensors"]


def test_without_room_beside_the_dit_videos_are_decoded_at_the_end(
    dit: Path, whole: dict, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The GPU's error, raised where it would come from, while the DiT is there."""
    output, real, dits = tmp_path / "out", write.open_vae, []
    opened = sample.open_dit

    def open_dit(*args: object):
        dits.append(1)
        return opened(*args)

    def small(*args: object):
        vae = real(*args)
        decode = vae.decode

        def tight(latents: torch.Tensor) -> torch.Tensor:
            if len(dits) == 1:
                dits.append(2)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
            return decode(latents)

        vae.decode = tight
        return vae

    monkeypatch.setattr(sample, "open_dit", open_dit)
    monkeypatch.setattr(write, "open_vae", small)
    seen: list[int] = []
    at_keep(monkeypatch, lambda path, step: seen.append(len(list(output.glob("*.mp4")))))
    make(dit, output)
    assert seen == [0, 0, 0] and contents(output) == whole
    assert capsys.readouterr().out.count("no room for the VAE beside the DiT") == 1


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, wanted: int) -> None:
    """Send this process a signal when it has done so many steps of all videos."""
    done, refuse = [], sample._refuse_broken

    def count(lot, n: int, x: torch.Tensor) -> None:
        refuse(lot, n, x)
        done.append(n)
        if len(done) == wanted:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(sample, "_refuse_broken", count)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in stopping.signals()}
    stopping.remember()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "after", "left"), [
    (signal.SIGUSR1, 6, [".0001.mp4.safetensors", "0000.mp4"]),  # in the midst of the second
    (signal.SIGTERM, 4, [".0000.mp4.safetensors"]),  # at the end of the first: to be decoded
])
def test_a_signal_keeps_everything(
    dit: Path, whole: dict, number: int, after: int, left: list, tmp_path: Path, monkeypatch, handlers, capsys
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, number, after)
        with pytest.raises(Stopped):
            make(dit, output)
    assert files(output) == left
    assert "stopped on request; start again to continue" in capsys.readouterr().out
    done: list[str] = []
    at_keep(monkeypatch, lambda path, step: done.append(path.name))
    make(dit, output)
    said = capsys.readouterr().out
    assert ("0001.mp4: goes on after step 2 of 4" in said) == (after == 6)
    assert ("1 of 3 are sampled already and only decoded: 0000.mp4" in said) == (after == 4)
    assert done == ["0001.mp4", "0002.mp4"] and contents(output) == whole


def interrupted(dit: str, folder: str, who: int, ulysses: int, after: int) -> dict:
    """On each rank: a whole run; one in which rank `who` alone gets a signal after so many
    of its steps; the rest of it."""
    stopping.remember()
    ctx = start(ulysses, 1, device="cpu")
    root, seen = Path(folder), {}
    make(Path(dit), root / "whole", ctx)
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == who:
            stop_at(patch, signal.SIGUSR1, after)
        try:
            make(Path(dit), root / "out", ctx)
        except Stopped:
            seen["stopped"] = True
    ctx.barrier()
    seen["left"] = files(root / "out")
    seen["steps"] = {path.name: _steps(path) for path in (root / "out").glob(".*.safetensors")}
    ctx.barrier()
    make(Path(dit), root / "out", ctx)
    ctx.barrier()
    seen["same"] = contents(root / "whole") == contents(root / "out")
    return seen


def _steps(path: Path) -> int:
    import json

    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["hvtrain.latents"])["step"]


def prepared(folder: Path) -> str:
    for name in ("whole", "out"):
        (folder / f"{name}.txt").write_text("\n".join(PROMPTS) + "\n")
    return str(folder)


def test_two_ranks_of_one_video_stop_at_the_same_step(dit: Path, tmp_path: Path) -> None:
    """Only the second is signalled, in the midst of the second video."""
    first, second = run_ranks(2, interrupted, str(dit), prepared(tmp_path), 1, 2, 6)
    assert first == second
    half = ".0001.mp4.safetensors"
    assert first == {"stopped": True, "left": [half, "0000.mp4"], "steps": {half: 2}, "same": True}


def test_groups_with_videos_of_their_own_stop_together(dit: Path, tmp_path: Path) -> None:
    """Rank 1 alone is signalled, in its only video; rank 0, which has two, hears of it and leaves too."""
    for seen in run_ranks(2, interrupted, str(dit), prepared(tmp_path), 1, 1, 2):
        assert seen["stopped"] and seen["same"]
        assert "0002.mp4" not in seen["left"] and seen["steps"][".0001.mp4.safetensors"] == 2


def test_a_launched_job_ends_with_75_and_goes_on(dit: Path, tmp_path: Path) -> None:
    """As Slurm does it: the launcher gets the signal, in the midst of sampling."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "launcher.cli", "launch", "--nproc", "2", "generate"]
    command += [*overrides(dit, output, steps=120), "parallel.ulysses=2"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 240
        while not (output / "0000.mp4").exists():
            assert started.poll() is None and time.monotonic() < end, started.communicate()[0]
            time.sleep(0.05)
        started.send_signal(signal.SIGUSR1)
        said = started.communicate(timeout=120)[0]
    finally:
        started.kill()
    assert started.returncode == 75 and "stopped on request" in said and "Traceback" not in said, said
    assert not (output / "0002.mp4").exists()
    before = (output / "0000.mp4").stat()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "of 3 are there already, made with these parameters: 0000.mp4" in done.stdout
    assert files(output) == ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert (output / "0000.mp4").stat().st_mtime_ns == before.st_mtime_ns
