"""Processes that die, stop or hang in the middle of a run: it ends soon, says
why, and continues bit for bit."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import dump
from hvtrain.errors import CheckpointError
from hvtrain.parallel.context import ParallelContext
from hvtrain.train import run as train
from hvtrain.train import watchdog
from hvtrain.train.watchdog import Place, report
from launcher.program import HVTRAIN
from tests.train.shardset import config, make_shards
from tests.wait import wait_for

ROOT = Path(__file__).parents[2]
ARGS = (
    "data.batch_size=1", "run.save_every_steps=2", "zero.engine=deepspeed", "zero.stage=2",
    "adapter.dropout=0.1"
)


def _write(shards: Path, output: Path, *overrides: str) -> Path:
    path = output.with_suffix(".yaml")
    path.write_text(dump(config(shards, output, *ARGS, *overrides)))
    return path


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def _launch(path: Path, *options: str, nproc: int = 2) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "launcher.cli", "launch", "--nproc", str(nproc), *options, "train", str(path)
    ]
    return _start(command)


_started: list[subprocess.Popen] = []


def _start(command: list[str]) -> subprocess.Popen:
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    _started.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A test that failed leaves no processes behind; workers end with their launcher."""
    yield
    for process in _started:
        if process.poll() is None:
            for worker in _workers(process.pid).values():
                os.kill(worker, signal.SIGKILL)
            process.kill()
            process.wait()
    _started.clear()


def _workers(of: int) -> dict[int, int]:
    """rank -> process id of the running workers under a launcher."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.search(r"^PPid:\s+(\d+)", (process / "status").read_text(), re.M)[1])
            env = dict(e.split("=", 1) for e in (process / "environ").read_text().split("\0") if "=" in e)
        except (OSError, TypeError):
            continue
        if parent == of and "RANK" in env:
            found[int(env["RANK"])] = int(process.name)
    return found


def _steps(run: Path) -> list[int]:
    log = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def _same(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    """The run that nothing happens to, on two processes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = _launch(_write(shards, run, "run.steps=12"))
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    return run / "lora.safetensors"


def test_a_killed_rank_ends_the_job_soon_and_restarts_finish_it(shards, whole, tmp_path):
    """--max-restarts: the first attempt loses a rank, the second goes on from the newest
    checkpoint and ends the same."""
    run = tmp_path / "run"
    process = _launch(_write(shards, run, "run.steps=12"), "--max-restarts", "2")
    wait_for(lambda: len(_steps(run)) >= 5)
    os.kill(_workers(process.pid)[1], signal.SIGKILL)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    assert "process 1 was ended by SIGKILL" in out and "starting again (1 of 2)" in out
    _same(run / "lora.safetensors", whole)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["run/restarts"] == 1 and last["step"] == 12


def test_torchrun_restarts_it_too(shards, whole, tmp_path):
    run = tmp_path / "run"
    path = _write(shards, run, "run.steps=12")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2",
        "--standalone", "--monitor-interval", "0.2", "--no-python", *HVTRAIN, "train", str(path),
    ]
    process = _start(command)
    wait_for(lambda: len(_steps(run)) >= 5)
    os.kill(_workers(process.pid)[0], signal.SIGKILL)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    _same(run / "lora.safetensors", whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_with_the_step(shards, tmp_path, rank):
    """A process that neither dies nor moves: the other says so after run.hang_timeout_s and the job ends.
    Rank 0 keeps the store that the ranks talk through: whoever asks it then waits for ever."""
    run = tmp_path / "run"
    process = _launch(_write(shards, run, "run.steps=5000", "run.hang_timeout_s=6", "run.save_every_steps=0"))
    wait_for(lambda: len(_steps(run)) >= 3)
    time.sleep(1)  # so that they have heard of each other
    stopped = _workers(process.pid)[rank]
    begun = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    out = process.communicate(timeout=240)[0]
    assert time.monotonic() - begun < 60 and process.returncode == 1, out
    assert re.search(rf"rank {rank}: step \d+, .* silent for .*<- the others wait for it", out), out
    assert re.search(rf"rank {1 - rank}: step \d+, [\w ]+ for \d+ s\n", out), out
    assert (
        "rank 0, through which the ranks tell each other where they are, has not answered" in out
    ) == (rank == 0), out
    assert "loop.py" in out  # where the other itself waits


def test_a_hang_of_one_process_is_reported(shards, tmp_path):
    path = _write(shards, tmp_path / "run", "run.hang_timeout_s=4", "zero.engine=torch")
    code = (
        "import sys, time\nfrom hvtrain.train import objective\n"
        "plain = objective.Objective.__call__\n"
        "def slow(self, model, batch, where):\n    if where.step == 2: time.sleep(600)\n"
        "    return plain(self, model, batch, where)\n"
        "objective.Objective.__call__ = slow\nfrom launcher import cli\n"
        f"sys.exit(cli.main(['train', {str(path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=_environment(), capture_output=True, text=True,
        timeout=240
    )
    assert done.returncode == 1
    assert (
        "nothing has moved for 4 s" in done.stderr
        and "rank 0: step 3, in the forward pass for" in done.stderr
    )


@pytest.mark.parametrize(
    "phases, guilty",
    [
        ([(5, "in the backward pass"), (5, "reading data"), (5, "in the backward pass")], [1]),
        ([(6, "reading data"), (6, "reading data"), (5, "averaging the loss")], [2]),
        ([(6, "reading data"), (6, "reading data")], []),
    ],
)
def test_who_keeps_the_others_waiting(phases, guilty):
    now = time.time()
    text = report(
        {r: Place(step, p, now - 50, now) for r, (step, p) in enumerate(phases)}, stale_s=5, timeout_s=40
    )
    assert [int(n) for n in re.findall(r"rank (\d).*<- the others", text)] == guilty


def test_when_the_store_is_deaf_its_keeper_is_the_one():
    now = time.time()
    places = {r: Place(5, "in the backward pass", now - 50, now - 45) for r in range(3)} | {
        2: Place(5, "x", now - 50, now)
    }
    text = report(places, stale_s=5, timeout_s=40, deaf_s=44)
    assert (
        [int(n) for n in re.findall(r"rank (\d).*<- the others", text)] == [0]
        and "not answered for 44 s" in text
    )
    early = report({1: places[2]}, stale_s=5, timeout_s=40, deaf_s=44)  # nothing was ever heard
    assert re.search(r"rank 0: never heard of  <- the others wait for it", early)


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    codes: list[int] = []

    def leave(code):
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    # the watching thread ends so, instead of the process
    monkeypatch.setattr(threading, "excepthook", lambda what: None)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **options: None)
    return codes


def test_writing_takes_as_long_as_it_takes(ended, capsys):
    with watchdog.Watchdog(ParallelContext(), 0.2) as watch:
        watch.at(7, "waiting for the last files", writing=True)
        said = wait_for(lambda: capsys.readouterr().err)
        assert (
            not ended and re.search(r"step 7: waiting for the last files for \d+ s; is the disk slow", said)
        )
        watch.at(8, "reading data")
        wait_for(lambda: ended)
    assert ended == [1]


@pytest.mark.parametrize(("seen", "codes"), [(-3600.0, []), (99.0, [1])], ids=["alive", "silent"])
def test_the_others_wait_for_the_one_that_writes_while_it_lives(ended, seen, codes):
    watch = watchdog.Watchdog(ParallelContext(world=2, rank=1), 0.2)
    watch._exchange = lambda: None  # what it would have heard:
    watch._heard = {0: Place(7, "waiting for the last files", time.time(), time.time() - seen, writing=True)}
    watch._answered = float("inf")
    looked, somebody = [], watch._somebody_writes
    watch._somebody_writes = lambda: (looked.append(found := somebody()), found)[1]
    with watch:
        wait_for(lambda: len(looked) > 2 or ended)
    assert ended == codes and looked == ([False] if codes else [True] * len(looked))


def test_every_forward_pass_of_evaluations_and_previews_is_a_sign_of_life(shards, tmp_path, monkeypatch):
    """One number for the whole of them would end a healthy run: a preview of 13B takes half an hour."""
    said = []
    at = watchdog.Watchdog.at
    monkeypatch.setattr(
        watchdog.Watchdog, "at", lambda self, *a, **o: (said.append((*a, o)), at(self, *a, **o))[1]
    )
    train.run(config(
        shards, tmp_path / "run", "run.steps=2", "eval.every_steps=2", f"eval.shards={shards}",
        "eval.max_batches=2", "preview.every_steps=2",
        "preview.prompts=[{prompt: a, frames: 5, width: 32, height: 32, steps: 3},"
        " {prompt: b, frames: 5, width: 32, height: 32, steps: 3}]",
        "model.vae=tiny:vae.safetensors", "model.llm=tiny:llm", "model.clip=tiny:clip",
        "model.vae_dtype=float32",
    ))
    phases = [phase for _, phase, _ in said]
    assert phases.count("evaluating, forward pass 10") == 1  # 2 batches x 5 quantiles
    assert phases.count("making previews, forward pass 6") == 1  # 2 prompts x 3 steps
    assert "making previews, preview/0 written" in phases
    assert (2, "waiting for the last files", {"writing": True}) in said
    assert all(o.get("writing", False) == phase.startswith("waiting for the") for _, phase, o in said)


def _killed_run(shards: Path, run: Path, *, kills: int, seed: int) -> str:
    """Kill -9 a random rank at random moments, and start again each time."""
    draw, path, done, log = random.Random(seed), _write(shards, run, "run.steps=12"), 0, ""
    while True:
        process = _launch(path)
        if done < kills:
            wait_for(lambda p=process: len(_workers(p.pid)) == 2 or p.poll() is not None)
            before = len(_steps(run))
            kind = draw.choice(("anywhere", "step", "checkpoint"))
            if kind == "anywhere":
                time.sleep(draw.uniform(0, 9))
            elif kind == "step":
                wait_for(lambda p=process, n=before: len(_steps(run)) > n or p.poll() is not None)
                time.sleep(draw.uniform(0, 0.3))
            else:
                wait_for(
                    lambda p=process,
                    writing=run / "checkpoints": any(writing.glob(".writing-*")) or p.poll() is not None
                )
            workers = _workers(process.pid)
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(workers[draw.choice(sorted(workers))], signal.SIGKILL)
            done += 1
        out = process.communicate(timeout=240)[0]
        log += out
        if process.returncode == 0:
            return log
        assert process.returncode == 137, out


def test_kills_at_random_moments_leave_the_same_adapter(shards, whole, tmp_path):
    _killed_run(shards, tmp_path / "run", kills=3, seed=1)
    _same(tmp_path / "run/lora.safetensors", whole)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_kills_leave_the_same_adapter(shards, whole, tmp_path):
    kills = 0
    for seed in range(2, 12):  # 12 steps each: a run of its own after every three
        run = tmp_path / f"run{seed}"
        _killed_run(shards, run, kills=3, seed=seed)
        _same(run / "lora.safetensors", whole)
        kills += 3
    assert kills == 30


def test_the_order_of_samples_survives_other_numbers_of_ranks(tmp_path):
    """DP 1 -> 2 -> 4 -> 1, 8 samples of each step: the same global sequence as without."""
    from shards.loader import BatchLoader
    from shards.reader import open_set

    found = [open_set(make_shards(tmp_path / "shards", n=21))]

    def steps(dp: int, cursor: int, n: int) -> tuple[list[list[str]], int]:
        """n steps of 8 samples on dp ranks."""
        streams = [
            iter(BatchLoader(found, batch_size=2, dp_rank=r, dp_size=dp, seed=3, cursor=cursor, workers=0))
            for r in range(dp)
        ]
        taken = []
        for _ in range(n):
            step = []
            for _ in range(8 // (2 * dp)):
                batches = [next(stream) for stream in streams]
                step += [key for batch in batches for key in batch.keys]
                cursor = batches[0].cursor
            taken.append(step)
        return taken, cursor

    plain, _ = steps(1, 0, 12)
    changed, cursor = [], 0
    for dp in (1, 2, 4, 1):
        taken, cursor = steps(dp, cursor, 3)
        changed += taken
    assert changed == plain


def test_the_best_weights_are_kept(tmp_path):
    """By held-out loss, also over a restart; the file says its loss."""
    shards = make_shards(tmp_path / "shards")
    run = tmp_path / "run"
    args = (
        "run.keep_best=true", "eval.every_steps=2", f"eval.shards={shards}", "eval.max_batches=1",
        "optim.lr=0.01"
    )
    train.run(config(shards, run, "run.steps=6", *args))
    train.run(config(shards, run, "run.steps=10", *args))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    from hvtrain.weights.containers import open_weights

    about = open_weights(run / "lora-best.safetensors").metadata
    assert len(losses) == 5
    assert float(about["hvtrain.held_out_loss"]) == pytest.approx(min(losses.values()), rel=1e-6)
    assert int(about["ss_steps"]) == min(losses, key=losses.get)


def test_a_failed_write_is_not_lost(tmp_path, monkeypatch):
    """It happens behind the training, and ends it."""
    from hvtrain.train import files

    def fail(*args, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(files.checkpoint, "save", fail)
    with pytest.raises(
        CheckpointError, match="step 2 could not be saved .the disk is gone.; mend that and start again"
    ):
        train.run(config(make_shards(tmp_path / "shards"), tmp_path / "run", "run.save_every_steps=2"))


def test_writing_does_not_hold_the_training_up(tmp_path, monkeypatch):
    from hvtrain.train import checkpoint

    plain, order = checkpoint.save, []

    def slow(root, snapshot, **options):
        wait_for(lambda: ("step", snapshot.progress.step + 1) in order or snapshot.progress.step == 6)
        order.append(("written", snapshot.progress.step))
        return plain(root, snapshot, **options)

    shards = make_shards(tmp_path / "shards")
    monkeypatch.setattr(checkpoint, "save", slow)
    from hvtrain.train.monitor import Monitor

    log = Monitor.log
    monkeypatch.setattr(
        Monitor, "log", lambda self, r: (order.append(("step", r.progress.step)), log(self, r))
    )
    train.run(config(shards, tmp_path / "run", "run.save_every_steps=3"))
    assert order.index(("step", 4)) < order.index(("written", 3))  # step 4 did not wait
    assert order[-1] == ("written", 6)  # the run did
    assert (tmp_path / "run/checkpoints/step-00000006/COMPLETE").exists()
