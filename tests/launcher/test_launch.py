"""How a job of several processes runs and ends under the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvtrain.stopping import REQUEUE

ROOT = Path(__file__).resolve().parents[2]


def job(tmp_path: Path, body: str, nproc: int = 2, restarts: int = 0) -> subprocess.Popen:
    """A launched job whose command is `body` instead of hvtrain's own: what is tested is the launcher."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys, time, signal\n"
        "from pathlib import Path\n"
        "from hvtrain.errors import ConfigError, DataError\n"
        "from launcher import worker, cli; from launcher import processes as local; from launcher import "
        "exits\n"
        f"here = Path({str(tmp_path)!r})\n"
        "rank = int(os.environ.get('RANK', -1))\n"
        "def body():\n" + "".join(f"    {line}\n" for line in body.strip().splitlines()) + "\n"
        "if rank < 0:\n"
        "    local.HVTRAIN = (sys.executable, __file__)\n"
        "    local.PEERS_GRACE_S = 1.0\n"
        f"    sys.exit(local.launch([], local.Topology(nproc={nproc}), max_restarts={restarts}))\n"
        "cli.run = lambda arguments: exits.guarded(body)\n"
        "worker.main([])\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)},
    )


def end(process: subprocess.Popen, timeout: float = 200) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def test_the_workers_know_their_places(tmp_path: Path) -> None:
    names = "WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR".split()
    body = f"(here / f'{{rank}}.txt').write_text(' '.join(os.environ[n] for n in {names}))"
    assert end(job(tmp_path, body, nproc=3)) == (0, "", "")
    assert [(tmp_path / f"{r}.txt").read_text() for r in range(3)] == [
        f"3 {r} {r} 3 127.0.0.1" for r in range(3)
    ]


def test_a_mistake_that_all_ranks_make_is_said_once(tmp_path: Path) -> None:
    assert end(job(tmp_path, "raise ConfigError('no such key')", nproc=3)) == (2, "", "error: no such key\n")


def test_the_mistake_wins_over_the_peers_that_lost_a_peer(tmp_path: Path) -> None:
    body = """
if rank == 1:
    time.sleep(0.3)
    raise DataError('clip.mp4: cannot be decoded')
raise RuntimeError('connection closed by peer')
"""
    code, _, err = end(job(tmp_path, body))
    assert (code, err) == (2, "error: clip.mp4: cannot be decoded (process 1 of 2)\n")


def test_a_bug_on_one_rank_ends_the_job_although_the_other_hangs(tmp_path: Path) -> None:
    begun = time.monotonic()
    code, _, err = end(job(tmp_path, "time.sleep(600 if rank == 0 else 0)\nraise ValueError('a bug')"))
    assert code == 1 and err.count("Traceback") == 1 and "ValueError: a bug (process 1 of 2)" in err
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("code", [2, REQUEUE, 130, 143])
def test_a_job_that_would_end_in_the_same_way_is_not_started_again(tmp_path: Path, code: int) -> None:
    """--max-restarts is for accidents: not for a user's mistake, a stop on request or Ctrl-C."""
    body = f"(here / 'starts').open('a').write('x')\nreturn {code}"
    assert end(job(tmp_path, body, nproc=1, restarts=3))[0] == code
    assert (tmp_path / "starts").read_text() == "x"


def test_an_accident_is_started_again_so_often_and_no_more(tmp_path: Path) -> None:
    body = """
with (here / 'starts').open('a') as file: file.write(os.environ['TORCHELASTIC_RESTART_COUNT'])
if len((here / 'starts').read_text()) < 3: raise ValueError('an accident')
"""
    code, _, err = end(job(tmp_path, body, nproc=1, restarts=5))
    assert code == 0 and (tmp_path / "starts").read_text() == "012"
    assert "starting again (1 of 5)" in err and "starting again (2 of 5)" in err and "(3 of 5)" not in err
    (tmp_path / "starts").write_text("")
    body = "(here / 'starts').open('a').write('x')\nos.kill(os.getpid(), signal.SIGKILL)"
    assert end(job(tmp_path, body, nproc=1, restarts=2))[0] == 137
    assert (tmp_path / "starts").read_text() == "xxx"


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    body = (
        "print('last words', flush=True)\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    )
    code, _, err = end(job(tmp_path, body))
    assert code == 128 + signal.SIGKILL
    assert err == "error: process 1 was ended by SIGKILL (out of memory?)\n  last words\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks_and_they_may_take_their_time(tmp_path: Path, number: int) -> None:
    body = f"""
seen = []
signal.signal({int(number)}, lambda *_: seen.append(1))
(here / f'{{rank}}.ready').touch()
while not seen: time.sleep(0.02)
time.sleep(0.2 + 2 * rank)
(here / f'{{rank}}.saved').touch()
return {REQUEUE}
"""
    process = job(tmp_path, body)
    while len(list(tmp_path.glob("*.ready"))) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    assert end(process) == (REQUEUE, "", "")
    assert len(list(tmp_path.glob("*.saved"))) == 2  # the second later than any grace period after a failure


def test_nothing_runs_on_when_the_launcher_is_killed(tmp_path: Path) -> None:
    process = job(tmp_path, "(here / f'{rank}.pid').write_text(str(os.getpid()))\ntime.sleep(600)")
    while len(files := [p for p in tmp_path.glob("*.pid") if p.read_text()]) < 2:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    pids = [int(path.read_text()) for path in files]
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their launcher"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
