"""One run per directory: held, dropped by the kernel at death, taken over when
stale, watched across machines."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hvtrain.train import run as train
from hvtrain.train import runlock
from hvtrain.train.runlock import Busy, Holder, RunLock
from tests.train.shardset import config, make_shards

HOLD = (
    "import sys, time\nfrom hvtrain.train.runlock import RunLock\n"
    "lock = RunLock(sys.argv[1]).acquire(0)\nprint('held', flush=True)\ntime.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2]
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_is_refused_by_name_and_a_dead_one_s_lock_is_taken(tmp_path, holder, capsys, monkeypatch):
    with pytest.raises(Busy) as caught:
        RunLock(tmp_path).acquire(0.3)
    host = json.loads((tmp_path / ".lock").read_text())["host"]
    assert (
        f"is in use by process {holder.pid} on {host} since 20" in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert "waiting 0 s" in capsys.readouterr().err
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".lock").exists()  # it could not clean up
    monkeypatch.setattr(runlock, "_moves", None)  # the kernel knows: nothing to watch
    lock = RunLock(tmp_path).acquire(0)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".lock").exists()


def test_it_waits_for_one_that_is_ending(tmp_path, holder):
    threading.Timer(0.5, holder.kill).start()
    RunLock(tmp_path).acquire(20).release()


def test_a_released_lock_is_free_and_a_removed_file_is_no_lock(tmp_path):
    """Two in one process: flock belongs to the open file, not to the process."""
    first = RunLock(tmp_path).acquire(0)
    with pytest.raises(Busy):
        RunLock(tmp_path).acquire(0)
    old = os.open(tmp_path / ".lock", os.O_RDWR)  # one that waits for the very file that is removed
    first.release()
    fcntl.flock(old, fcntl.LOCK_EX)
    with RunLock(tmp_path).acquire(0):
        assert not runlock._same_file(old, tmp_path / ".lock")
    os.close(old)


def _of_another_host(folder: Path) -> Holder:
    other = replace(Holder.me(), host="node-elsewhere", pid=77, job="12")
    (folder / ".lock").write_text(json.dumps(asdict(other)))
    return other


def test_another_machine_s_heartbeat_counts_where_flock_says_nothing(tmp_path, monkeypatch):
    """A requeued job whose first life goes on on a lost node: flock may not reach there."""
    monkeypatch.setattr(runlock, "WATCH_S", 1.0)
    _of_another_host(tmp_path)
    end = threading.Event()

    def beat():
        while not end.wait(0.2):
            os.utime(tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Busy, match=r"process 77 on node-elsewhere since .* \(Slurm job 12\)"):
            RunLock(tmp_path).acquire(0)
    finally:
        end.set()
        thread.join()
    RunLock(tmp_path).acquire(0).release()  # silent now


def test_without_kernel_locks_the_heartbeat_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(runlock, "WATCH_S", 0.8)
    monkeypatch.setattr(runlock, "BEAT_S", 0.1)
    monkeypatch.setattr(runlock, "_flock", lambda handle: None)
    with RunLock(tmp_path).acquire(0), pytest.raises(Busy):
        RunLock(tmp_path).acquire(0)
    RunLock(tmp_path).acquire(0).release()


def test_one_that_stood_still_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(runlock, "BEAT_S", 0.05)
    lock = RunLock(tmp_path).acquire(0)
    lock.check()
    taken = _of_another_host(tmp_path)
    with pytest.raises(Busy, match="was taken over by process 77 on node-elsewhere"):
        lock.check()
    time.sleep(0.3)
    lock.release()
    assert json.loads((tmp_path / ".lock").read_text())["token"] == taken.token  # not ours to remove


def test_a_second_training_is_refused_and_harms_nothing(tmp_path, monkeypatch):
    shards, run = make_shards(tmp_path / "shards"), tmp_path / "run"
    monkeypatch.setattr(runlock, "WAIT_S", 0.2)
    train.run(config(shards, run, "run.steps=2"))
    assert not (run / ".lock").exists()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir())
    with RunLock(run).acquire(0):
        with pytest.raises(Busy, match=f"run.output_dir: {run} is in use by process {os.getpid()} "):
            train.run(config(shards, run, "run.steps=4"))
        (run / ".lock").touch()
        assert sorted((p.name, p.stat().st_mtime_ns) for p in run.iterdir() if p.name != ".lock") == before
        # A job that Slurm has started again must not end as failed: it comes back until the other is gone.
        monkeypatch.setattr(runlock, "REQUEUED_WAIT_S", 0.3)
        waits = []
        acquire = RunLock.acquire
        monkeypatch.setattr(
            RunLock, "acquire", lambda self, wait_s: (waits.append(wait_s), acquire(self, wait_s))[1]
        )
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert train.run(config(shards, run, "run.steps=4")) == 75 and waits == [0.3]
    assert train.run(config(shards, run, "run.steps=4")) == 0


def test_a_run_that_was_refused_or_failed_leaves_no_lock(tmp_path):
    shards, run = make_shards(tmp_path / "shards"), tmp_path / "run"
    with pytest.raises(Exception, match="leaves nothing to train"):
        train.run(config(shards, run, "adapter.exclude=.*"))
    assert not run.exists() or not list(run.iterdir())
    assert train.run(config(shards, run, "run.steps=1")) == 0
