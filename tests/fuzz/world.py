"""What the fuzz tests type into: one valid file of every kind, and a way to call
hvtrain that sees what it did.

A command runs in this process, as far as the point where real work would begin (a forward, an encoder, a new
process): there `Started` ends it. So thousands of command lines cost a minute.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from safetensors import safe_open

from hvtrain import models
from hvtrain.adapters.attach import inject
from hvtrain.lorafiles.write import save_lora
from hvtrain.models.dit import DiT
from launcher import cli
from tests.adapters.models import lora_tensors
from tests.generate.models import random_dit
from tests.train.shardset import make_shards

CLIP = Path(__file__).parents[1] / "data" / "bigbuckbunny.mp4"
# exit code 1: what is bad, or cannot be carried over, is named
MAY_FIND_FAULTS = ("data check", "shards verify", "import")
DONE, FAULTS, MISTAKE, REQUEUE = 0, 1, 2, 75


class Started(BaseException):
    """Everything was accepted, and the work would begin."""


@dataclass(frozen=True)
class Outcome:
    code: int | None  # None: the work would have begun
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """`given` holds what the user has; only `out` may change."""

    given: Path
    out: Path

    def fresh_output(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        if (old := self.given / "old").exists():
            shutil.copytree(old, self.out / "old")

    def call(self, *arguments: str) -> Outcome:
        """One command line, typed in `out`."""
        out, err = (
            io.TextIOWrapper(io.BytesIO(), "utf-8"),
            io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        )
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        environment = dict(os.environ)
        os.chdir(self.out)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code: int | None = cli.main(list(arguments))
        except Started:
            code = None
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        finally:
            os.chdir(self.given)
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out.flush(), err.flush()
        return Outcome(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())

    def try_line(self, arguments: Sequence[str]) -> Outcome:
        """A command line, and the promises that hold for every one."""
        given, out = snapshot(self.given), snapshot(self.out)
        outcome = self.call(*arguments)
        self._check(outcome, arguments, given, out)
        return outcome

    def _check(
        self, outcome: Outcome, arguments: Sequence[str], given: dict[str, tuple], out: dict[str, tuple]
    ) -> None:
        said = (
            f"\nhvtrain {' '.join(map(repr, arguments))}\n-> "
            f"{outcome.code}\n{outcome.out[-600:]}\n{outcome.err[-1500:]}"
        )
        assert "Traceback" not in outcome.err, said
        faults = any(list(arguments[: len(c.split())]) == c.split() for c in MAY_FIND_FAULTS)
        assert outcome.code in (None, DONE, MISTAKE, REQUEUE) or (faults and outcome.code == FAULTS), said
        lines = [line for line in outcome.err.splitlines() if line.startswith("error")]
        assert (len(lines) == 1) == (outcome.code == MISTAKE) or "usage:" in outcome.out, said
        assert outcome.code != DONE or outcome.out.strip() or any(self.out.iterdir()), (
            f"said and did nothing: {said}"
        )
        assert snapshot(self.given) == given, f"changed what it was given: {said}"
        for name, stamp in snapshot(self.out).items():
            if stamp and stamp != out.get(name) and not Path(name).name.startswith("."):
                _whole(self.out / name, said)


def fuzz(*, examples: int) -> Callable:
    """Settings of a fuzz test: the same examples every time, or with HVTRAIN_FUZZ=20 twenty
    times as many, others each time."""
    times = int(os.environ.get("HVTRAIN_FUZZ", "1"))
    checks = [
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large,
        HealthCheck.filter_too_much
    ]
    return settings(
        max_examples=examples * times, derandomize=times == 1, deadline=None, database=None,
        suppress_health_check=checks, print_blob=False,
    )


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file and folder below, with what would show a change."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) if p.is_file() else ()
        for p in folder.rglob("*") if p.exists()
    }


def _whole(path: Path, said: str) -> None:
    """A file under its final name is never half of one."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                f.keys()
        elif path.suffix == ".json":
            json.loads(path.read_text())
    except Exception as error:
        raise AssertionError(f"{path.name} is not whole ({error}): {said}") from error


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("fuzz")
    made = World(root / "given", root / "out")
    made.given.mkdir()
    made.fresh_output()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.given)
        patch.delenv("HVTRAIN_SITE", raising=False)
        _fill(made)
        _stop_before_work(patch)
        _begin_slices(made)
        yield made


def _fill(world: World) -> None:
    given = world.given
    clips = given / "clips"
    clips.mkdir()
    shutil.copy(CLIP, clips / "a.mp4")
    (clips / "a.txt").write_text("a rabbit in a meadow\n")
    (given / "clips.toml").write_text(
        '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = '
        'true\n\n'
        f'[[datasets]]\nvideo_directory = "{clips}"\ntarget_frames = [1, 5]\nframe_extraction = "head"\n'
    )
    (given / "clips.jsonl").write_text(
        json.dumps({"video_path": str(clips / "a.mp4"), "caption": "a rabbit"}) + "\n"
    )
    (given / "jsonl.toml").write_text(
        '[general]\nresolution = [64, 64]\n\n[[datasets]]\nvideo_jsonl_file = '
        f'"{given}/clips.jsonl"\ntarget_frames = [5]\n'
    )
    (given / "prompts.txt").write_text(
        "# two\na red circle --w 64 --h 64 --f 5 --s 2 --d 1\na blue square --n green --l 2\n"
    )
    (given / "site.yaml").write_text(
        "partition: gpu\ntime: '1:00:00'\ngrace_s: 30\nmem: 10G\nsetup:\n- source /opt/env\nenvironment:\n- "
        "A=b\n"
    )
    make_shards(given / "set", n=4)
    (given / "train.yaml").write_text(
        f"model: {{dit: 'tiny:dit.safetensors', dtype: float32}}\ndata: {{shards: ['{given}/set'], "
        f"batch_size: 2}}\n"
        "adapter: {rank: 4, alpha: 4}\nrun: {precision: fp32, recompute: none, steps: 2, output_dir: run}\n"
        "zero: {engine: torch}\n"
    )
    (given / "generate.yaml").write_text(
        "model: {dit: 'tiny:dit.safetensors', vae: 'tiny:vae.safetensors', llm: 'tiny:llm', clip: "
        "'tiny:clip', dtype: float32}\nprompt: a red circle\nwidth: 64\nheight: 64\nframes: 5\nsteps: "
        "2\nprecision: fp32\noutput: a.mp4\n"
    )
    (given / "pipe.toml").write_text(
        "output_dir = 'o'\nepochs = 2\n[model]\ntype = 'hunyuan-video'\ntransformer_path = "
        "'d'\n[optimizer]\ntype = 'adamw'\n"
    )
    (given / "musubi.sh").write_text(
        "accelerate launch hv_train_network.py --dit x --output_dir o --network_dim 4\n"
    )
    (given / "encode.yaml").write_text(
        "model: {vae: 'tiny:vae.safetensors', llm: 'tiny:llm', clip: 'tiny:clip', flavor: tiny}\n"
        f"dataset: {given}/clips.toml\noutput: shards\n"
    )
    model = random_dit()
    inject(model, models.find("hunyuan-video").lora_targets(model), rank=4, alpha=2.0, seed=1)
    save_lora(
        given / "lora.safetensors", lora_tensors(model), rank=4, alpha=2.0, architecture="hunyuan-video",
        metadata={},
    )
    assert world.call(
        "slices", "plan", "--model", "hunyuan-video", "--flavor", "tiny", "--n", "2", "--output", "plan"
    ).code == 0
    shutil.move(world.out / "plan", given / "plan")
    assert world.call("shards", "split", str(given / "set"), "--n", "2", "--output", "parts").code == 0
    shutil.move(world.out / "parts", given / "parts")


def _stop_before_work(patch: pytest.MonkeyPatch) -> None:
    def begin(*arguments: object, **options: object) -> None:
        raise Started

    patch.setattr(DiT, "forward", begin)
    patch.setattr(subprocess, "Popen", begin)
    for name in ("run", "check_output", "check_call", "call"):
        patch.setattr(subprocess, name, begin)
    for name in ("kill", "killpg", "fork"):
        patch.setattr(os, name, begin)
    for spec in models.all_specs():
        for name in ("open_text", "open_vae"):
            patch.setitem(vars(spec), name, begin)  # the record is frozen


def _begin_slices(world: World) -> None:
    given = world.given
    data = ("--plan", str(given / "plan" / "plan.json"), "--data", str(given / "parts"))
    assert world.call("slices", "run", str(given / "train.yaml"), *data, "--output", "old").code is None
    shutil.move(world.out / "old", given / "old")
    world.fresh_output()
