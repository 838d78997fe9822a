"""Sliced runs on this machine, without training: who gets which GPU, how they end, who is cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvtrain.errors import LaunchError
from launcher.jobs import backends, slices
from tests.slurm.fake import a_run, hvtrain, stands, words
from tests.wait import wait_for

SLICE = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from launcher.jobs import slices
from tests.slurm.fake import weights
run, verb, name = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
wish = json.loads((run / "wish.json").read_text()).get(name, "done")
with (run / "seen").open("a") as file:
    shares = (os.environ.get(of) for of in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
    file.write(" ".join([name, *map(str, shares)]) + "\\n")
if wish == "waits":
    signal.signal(signal.SIGTERM, lambda *_: (slices.note_end(run, name, 75), os._exit(75)))
    (run / f"ready-{{name}}").touch()
    time.sleep(60)
code = 0 if wish == "done" else int(wish)
if code == 0:
    made = "merged" if name == "merge" else f"slice-{{name}}"
    weights(run / name / f"{{made}}.safetensors")
if name == "merge":
    slices.note_start(run, name, "1:1")
slices.note_end(run, name, code)
sys.exit(code)
"""


@pytest.fixture
def here(run, monkeypatch):
    """A local run whose slices only pretend; `wish`: name -> exit code, or "waits"."""
    root = str(Path(__file__).resolve().parents[2])

    def command(folder, verb, *rest):
        name = plan.name(int(rest[1])) if verb == "one" else "merge"
        return [sys.executable, "-c", SLICE.format(root=root), str(folder), verb, name]

    monkeypatch.setattr(backends, "command", command)
    monkeypatch.setattr(backends, "POLL_S", 0.02)
    plan = None

    def make(wish: dict | None = None, **more):
        nonlocal plan
        plan = a_run(run, backend="local", **more)
        (run / "wish.json").write_text(json.dumps(wish or {}))
        return plan

    return make


def seen(run: Path) -> list[str]:
    return (run / "seen").read_text().splitlines()


def test_each_slice_gets_as_many_gpus_as_it_has_processes(here, run, capsys):
    here(n=4, nproc=2, at_once=2, gpus=("0", "1", "5", "7"))
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert (
        sorted(line.split()[0] for line in seen(run)[:-1]) == ["01", "02", "03", "04"]
        and seen(run)[-1].startswith("merge ")
    )
    gpus = dict(line.split()[:2] for line in seen(run)[:-1])
    assert {gpus["01"], gpus["02"]} == {"0,1", "5,7"} and {gpus["03"], gpus["04"]} <= {"0,1", "5,7"}
    assert hvtrain(capsys, "retry", run) == (0, f"{run}: nothing to start, all slices are done and merged\n")


@pytest.mark.parametrize(
    ("n", "at_once", "nproc", "own", "threads"),
    [(3, 2, 1, "", "8"), (3, 2, 2, "", "4"), (1, 9, 1, "", "17"), (3, 2, 1, "5", "5"), (3, 3, 9, "", "1")],
)
def test_slices_that_run_together_share_the_cores(
    here, run, capsys, monkeypatch, n, at_once, nproc, own, threads
):
    monkeypatch.setattr(backends.processes, "cores", lambda: 17)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    here(n=n, at_once=at_once, nproc=nproc)
    assert hvtrain(capsys, "retry", run)[0] == 0
    *parts, merge = [line.split()[-1] for line in seen(run)]
    assert parts == [threads] * n and merge == (own or "None")  # the merge is alone on the machine
    (run / "01" / "slice-01.safetensors").unlink()
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert seen(run)[n + 1].split()[-1] == (own or str(17 // nproc))  # and so is one that is tried again
    (run / "merge" / "merged.safetensors").unlink()
    assert hvtrain(capsys, "retry", run)[0] == 0 and seen(run)[-1].startswith("merge ")  # it alone


def test_one_failure_keeps_the_merge_back_and_only_it_is_tried_again(here, run, capsys):
    here({"02": "2"}, n=3)
    code, said = hvtrain(capsys, "retry", run)
    assert code == 1 and "slice 2: failed (exit code 2)" in said and "2 of 3 slices are done" in said
    assert [line.split()[0] for line in seen(run)] == ["01", "02", "03"]
    (run / "wish.json").write_text('{"merge": "1"}')
    assert hvtrain(capsys, "retry", run)[0] == 1
    (run / "wish.json").write_text("{}")
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert [line.split()[0] for line in seen(run)[3:]] == ["02", "merge", "merge"]


def in_another_process(run: Path, here_command) -> subprocess.Popen:
    """`slices retry` as a program of its own, with the pretending slices."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "from launcher import cli; from launcher.jobs import backends\n"
        "backends.POLL_S = 0.02\nbackends.command = lambda folder, verb, *rest: [sys.executable, '-c', "
        f"{here_command[2]!r}, "
        "str(folder), verb, f'{int(rest[1]):02d}' if verb == 'one' else 'merge']\n"
        "sys.exit(cli.main(['slices', 'retry', sys.argv[1]]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)


def test_cancelling_ends_what_runs_and_starts_no_more(here, run, capsys):
    here({"01": "waits"}, n=3)
    process = in_another_process(run, backends.command(run, "one", run, 1))
    wait_for((run / "ready-01").exists)
    code, said = hvtrain(capsys, "retry", run)
    assert code == 2 and f"by process {process.pid};" in said
    assert hvtrain(capsys, "cancel", run) == (0, "cancelled: 01, 02, 03, merge\n")
    said, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 75 and said.splitlines()[:2] == ["slice 1: started", "slice 1: stopped, saved"]
    )
    assert "slice 2" not in said and [line.split()[0] for line in seen(run)] == ["01"]
    found = words(capsys, run)
    assert [found[n][0] for n in ("01", "02", "03", "merge")] == ["cancelled"] * 4
    assert hvtrain(capsys, "cancel", run) == (0, "nothing was queued or running\n")
    (run / "wish.json").write_text("{}")
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert [words(capsys, run)[n][0] for n in ("01", "02", "03", "merge")] == ["done"] * 4


def test_cancelling_reaches_slices_whose_starter_was_killed_and_the_merge(here, run, capsys):
    here({"01": "waits"}, n=1)
    process = in_another_process(run, backends.command(run, "one", run, 1))
    wait_for((run / "ready-01").exists)
    process.kill()
    process.wait()
    code, said = hvtrain(capsys, "retry", run)
    assert code == 2 and "its slices are running already" in said
    assert hvtrain(capsys, "cancel", run) == (0, "cancelled: 01\n")
    wait_for(lambda: words(capsys, run)["01"][0] == "cancelled")


def test_a_stop_during_the_merge_ends_the_merge(here, run):
    here({"merge": "waits"}, n=1)
    process = in_another_process(run, backends.command(run, "one", run, 1))
    wait_for((run / "ready-merge").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75


def test_cancelling_ends_nobody_else(run, capsys):
    """The number of a slice that is gone belongs to another process now."""
    a_run(run, n=3, backend="local")
    innocent = subprocess.Popen(["sleep", "60"])
    try:
        stands(run, "01", f"{innocent.pid}:1", code=75)
        stands(run, "02", f"{innocent.pid}:1")
        stands(run, "03", "999999999:5", code=75)
        assert hvtrain(capsys, "cancel", run) == (0, "nothing was queued or running\n")
        backends._ask_to_end(f"{innocent.pid}:1")
        time.sleep(0.2)
        assert innocent.poll() is None
        backends._ask_to_end(f"{innocent.pid}:{slices.process_start(innocent.pid)}")
        assert innocent.wait(120) == -signal.SIGTERM
    finally:
        innocent.kill()
        innocent.wait()


@pytest.mark.parametrize(
    ("error", "says"), [(ProcessLookupError(), None), (PermissionError(), "belongs to another user")]
)
def test_a_process_that_cannot_be_asked(monkeypatch, error, says):
    def kill(pid, number):
        raise error

    monkeypatch.setattr(os, "kill", kill)
    me = f"{os.getpid()}:{slices.process_start(os.getpid())}"
    if says:
        with pytest.raises(LaunchError, match=says):
            backends._ask_to_end(me)
    else:
        backends._ask_to_end(me)
