"""Running the jobs of a slice plan with processes, jobs and a clock that only pretend."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvtrain.errors import LaunchError
from launcher import cli, processes
from launcher.jobs import backends, slices, slurm, standing
from tests.slurm.fake import a_run, finish, stands, weights


def words(run: Path, plan: slices.Slices) -> list[str]:
    return [s.word for s in backends.standings(run, plan)]


# --- what is asked of the scheduler -------------------------------------------------------------------------


def test_the_scheduler_is_asked_of_the_newest_attempts(run, monkeypatch):
    plan, asked = a_run(run, n=3), []
    monkeypatch.setattr(
        slurm, "queue",
        lambda ids: asked.append(list(ids)) or slurm.Queue({"85": "RUNNING", "7_3": "RUNNING"})
    )
    stands(run, "01", "6_1", "7_1")
    stands(run, "03", "7_3")
    for other in ("00", "04"):
        stands(run, other, "9")
    stands(run, "merge", "8", "85")
    assert words(run, plan) == ["failed", "waiting", "running", "running"]
    assert asked == [["7_1", "7_3", "85"]]
    here = a_run(run, n=3, backend="local")
    assert words(run, here)[0] == "failed" and len(asked) == 1


def test_nothing_is_done_while_jobs_are_unknown(tmp_path):
    unknown = [
        standing.Standing(name, "unknown", note=note) for name, note in (("02", "why"), ("merge", "other"))
    ]
    found = [standing.Standing("01", "done"), *unknown]
    with pytest.raises(LaunchError) as caught:
        backends.refuse_unknown(tmp_path, found)
    assert str(caught.value) == (
        f"{tmp_path}: 02, merge: why, so they may be running; nothing was done: try again later"
    )
    backends.refuse_unknown(tmp_path, found[:1])


def test_a_command_of_slices_is_hvtrain_s(run, monkeypatch):
    monkeypatch.setattr(backends, "HVTRAIN", ("python", "main.py"))
    assert backends.command(run, "one", run, 3) == ["python", "main.py", "slices", "one", str(run), "3"]


# --- Slurm --------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch):
    """What is rendered, submitted and cancelled, in order; jobs get the numbers 11, 12."""
    seen: list[Any] = []
    numbers = iter(("11", "12"))
    monkeypatch.setattr(backends, "load_site", lambda path: f"site {path}")
    monkeypatch.setattr(
        slurm, "render", lambda job, site: seen.append((job, site)) or f"script {job.template}"
    )
    monkeypatch.setattr(slurm, "submit", lambda text: seen.append(text) or next(numbers))
    monkeypatch.setattr(slurm, "cancel", lambda ids: seen.append(list(ids)))
    return seen


def test_jobs_of_an_array_and_of_its_merge(tmp_path, jobs):
    run = tmp_path / "5%"
    logs = f"{tmp_path}/5%%/logs"
    plan = a_run(run, n=100, nproc=2, nodes=3, time="5:00", site="s", at_once=4, max_restarts=6)
    stands(run, "007", "6_7", code=2)
    stands(run, "merge", "9", code=1)
    said = backends.submit(run, plan, backends.Start((1, 7), True, ("8_2",), ("9",)))
    assert said == ["job 11: slices 1, 7, 4 at a time", "job 12: merge, when all have finished"]
    array = slurm.BatchJob(
        "array", "5%-slices", Path.cwd(), f"{logs}/%3a.log", ["slices", "one", str(run)],
        slurm.Resources(3, 2, "5:00", True, 6), "1,7%4",
    )
    merge = slurm.BatchJob(
        "merge", "5%-merge", Path.cwd(), f"{logs}/merge.log", ["slices", "merge", str(run)],
        slurm.Resources(gpus=False), after=["8_2", "11"],
    )
    assert jobs == [["9"], (array, "site s"), "script array", (merge, "site s"), "script merge"]
    assert slices.load_state(run, "007") == slices.JobState(["6_7", "11_7"])
    assert (
        slices.load_state(run, "001") == slices.JobState(["11_1"])
        and slices.load_state(run, "002") == slices.JobState()
    )
    assert slices.load_state(run, "merge") == slices.JobState(["9", "12"])


def test_a_merge_alone_and_slices_alone(run, jobs):
    plan = a_run(run, n=2)
    assert backends.submit(run, plan, backends.Start((), True)) == [
        "job 11: merge, at once: all slices are done"
    ]
    [_, (merge, _), _] = jobs
    assert merge.after == [] and slices.load_state(run, "merge").jobs == ["11"]
    jobs.clear()
    assert backends.submit(run, plan, backends.Start((2,), False)) == ["job 12: slices 2, 1 at a time"]
    assert jobs[2:] == ["script array"] and slices.load_state(run, "merge").jobs == ["11"]


# --- this machine -------------------------------------------------------------------------------------------


class Machine:
    """Processes that end on a clock. `takes`: name -> (seconds, exit code); `signals`: time -> the signal
    that this program gets then."""

    def __init__(self, run: Path) -> None:
        self.run, self.now = run, 0
        self.takes: dict[str, tuple[int, int]] = {}
        self.signals: dict[int, int] = {}
        self.when_asked = (2, 75)  # seconds that it goes on, exit code
        self.log: list[tuple] = []

    def start(self, command: list[str], **options: Any) -> Any:
        name = command[1]
        env, log = options.pop("env", {}), options.pop("stdout", None)
        assert options.pop("stderr", None) is log and options == {"start_new_session": True}
        if log:
            assert log.name == str(self.run / f"logs/{name}.log") and log.mode == "ab"
        self.log.append((self.now, "start", name, env.get("CUDA_VISIBLE_DEVICES")))
        seconds, code = self.takes.get(name, (1, 0))
        process = SimpleNamespace(
            name=name, pid=1000 + len(self.log), ends=self.now + seconds, code=code, returncode=None
        )
        return Process(self, process)

    def sleep(self, seconds: float) -> None:
        assert seconds == backends.POLL_S
        self.now += 1
        assert self.now < 100, "waits for ever"
        if self.now in self.signals:
            signal.raise_signal(self.signals[self.now])


class Process:
    def __init__(self, machine: Machine, of: Any) -> None:
        self.machine, self.of, self.pid, self.returncode = machine, of, of.pid, None

    def poll(self) -> int | None:
        if self.returncode is None and self.machine.now >= self.of.ends:
            self.returncode, name, run = self.of.code, self.of.name, self.machine.run
            if self.returncode == 0:
                weights(
                    run / "merge/merged.safetensors"
                    if name == "merge" else run / name / f"slice-{name}.safetensors"
                )
            slices.note_end(run, name, self.returncode)
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.machine.log.append((self.machine.now, "signal", self.of.name, number))
        seconds, self.of.code = self.machine.when_asked
        self.of.ends = self.machine.now + seconds


@pytest.fixture
def machine(run, monkeypatch):
    made = Machine(run)
    plan = slices.Slices("p", None, (), (), 9)

    def command(folder: Path, verb: str, *rest: Any) -> list[str]:
        assert folder == rest[0] == run and len(rest) == (2 if verb == "one" else 1)
        return ["x", plan.name(rest[1]) if verb == "one" else verb]

    monkeypatch.setattr(backends, "command", command)
    monkeypatch.setattr(subprocess, "Popen", made.start)
    monkeypatch.setattr(backends, "time", made)
    monkeypatch.setattr(backends, "job_of", lambda pid: f"{pid}:s{pid}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    return made


def test_slices_run_so_many_at_a_time_each_with_gpus_of_its_own(machine, run, capsys, flushes):
    plan = a_run(run, n=4, backend="local", nproc=2, at_once=2, gpus=("0", "1", "2", "3"))
    machine.takes = {"01": (5, 0), "02": (1, 0), "03": (2, 0)}
    assert backends.run_here(run, plan, [1, 2, 3, 4]) == 0
    assert machine.log == [
        (0, "start", "01", "0,1"), (0, "start", "02", "2,3"), (1, "start", "03", "2,3"),
        (3, "start", "04", "2,3"),
        (5, "start", "merge", "0,1,2,3"),  # which a merge that reconciles computes on
    ]
    assert capsys.readouterr().out.splitlines() == [
        "slice 1: started on GPU 0,1", "slice 2: started on GPU 2,3", "slice 2: done",
        "slice 3: started on GPU 2,3", "slice 3: done", "slice 4: started on GPU 2,3", "slice 4: done",
        "slice 1: done",
    ]
    assert flushes == [True] * 8  # as it happens, also into a file
    assert (
        slices.load_state(run, "01").jobs == ["1001:s1001"]
        and slices.load_state(run, "03").jobs == ["1003:s1003"]
    )


def test_slices_without_gpus_see_what_this_program_sees(machine, run, capsys):
    plan = a_run(run, n=2, backend="local", merge=False)
    assert backends.run_here(run, plan, [2]) == 75  # 1 is not done either: it was not asked for
    assert machine.log == [(0, "start", "02", "all")]
    assert capsys.readouterr().out.splitlines() == [
        "slice 2: started", "slice 2: done",
        f"1 of 2 slices are done; `hvtrain slices status {run}` says more",
    ]
    assert backends.run_here(run, plan, [1]) == 0 and len(machine.log) == 2


@pytest.mark.parametrize(
    ("code", "said", "end"), [(2, "failed (exit code 2)", 1), (75, "stopped, saved", 75)]
)
def test_the_merge_waits_for_all_slices_to_be_done(machine, run, capsys, flushes, code, said, end):
    plan = a_run(run, n=3, backend="local")
    machine.takes = {"02": (1, code)}
    assert backends.run_here(run, plan, [1, 2, 3]) == end
    assert [name for _, _, name, _ in machine.log] == ["01", "02", "03"]
    out = capsys.readouterr().out.splitlines()
    assert (
        flushes == [True] * len(out) and out[3] == f"slice 2: {said}"
        and out[-1].startswith("2 of 3 slices are done; ")
    )
    machine.takes = {}
    assert backends.run_here(run, plan, [2]) == 0 and machine.log[-1][2] == "merge"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_that_is_asked_to_end_lets_its_slices_save_and_starts_no_more(machine, run, capsys, number):
    before = [signal.getsignal(n) for n in processes.forwarded()]
    plan = a_run(run, n=4, backend="local", at_once=2)
    machine.takes, machine.signals = {"01": (50, 0), "02": (60, 0)}, {3: number}
    assert backends.run_here(run, plan, [1, 2, 3, 4]) == 75
    assert machine.log[2:] == [(3, "signal", "01", signal.SIGTERM), (3, "signal", "02", signal.SIGTERM)]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "slice 1: stopped, saved", "slice 2: stopped, saved",
        f"0 of 4 slices are done; `hvtrain slices status {run}` says more",
    ]
    assert [signal.getsignal(n) for n in processes.forwarded()] == before


def test_slices_that_end_well_when_they_are_asked_to_end_are_done_and_not_merged(machine, run):
    plan = a_run(run, n=1, backend="local")
    machine.takes, machine.signals, machine.when_asked = {"01": (50, 0)}, {3: signal.SIGTERM}, (2, 0)
    assert backends.run_here(run, plan, [1]) == 75 and words(run, plan) == ["done", "waiting"]


def test_one_that_is_asked_to_end_as_the_last_slice_ends_does_not_merge(machine, run):
    plan = a_run(run, n=1, backend="local")
    machine.takes, machine.signals = {"01": (1, 0)}, {1: signal.SIGTERM}
    assert backends.run_here(run, plan, [1]) == 75 and [entry[1] for entry in machine.log] == ["start"]


@pytest.mark.parametrize(("code", "end"), [(0, 0), (3, 3), (-9, 137), (75, 75)])
def test_the_exit_code_of_a_merge(machine, run, code, end):
    plan = a_run(run, n=1, backend="local")
    finish(run, "01", "1:1")
    machine.takes = {"merge": (2, code)}
    assert backends.run_here(run, plan, []) == end


def test_a_merge_is_asked_to_end_as_often_as_this_program_is(machine, run):
    plan = a_run(run, n=1, backend="local")
    finish(run, "01", "1:1")
    machine.takes, machine.signals = {"merge": (50, 0)}, {3: signal.SIGINT, 4: signal.SIGTERM}
    assert backends.run_here(run, plan, []) == 75
    assert machine.log[1:] == [(3, "signal", "merge", signal.SIGTERM), (4, "signal", "merge", signal.SIGTERM)]


# --- inside a job -------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Arguments of processes.launch, and the state of slice 2 meanwhile."""
    calls: list[Any] = []
    monkeypatch.setattr(
        processes, "launch", lambda arguments, topology,
        **more: calls.append((arguments, topology, more)) or 9
    )
    monkeypatch.setattr(backends, "job_of", lambda pid: {os.getpid(): f"{pid}:me"}[pid])
    for name in ("SLURM_NODEID", "SLURM_NNODES", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_slice_on_this_machine(run, launched):
    plan = a_run(run, n=2, backend="local", nproc=3, max_restarts=4)
    (run / "02").mkdir()
    (run / "02/slice-02.safetensors").touch()  # damaged
    assert backends.run_one(run, plan, 2) == 9
    assert launched == [(slices.train_arguments(run, plan, 2), processes.Topology(3), {"max_restarts": 4})]
    state = slices.load_state(run, "02")
    assert (state.jobs, state.code) == ([f"{os.getpid()}:me"], 9) and state.ended >= state.started > 0
    assert [path.name for path in (run / "02").iterdir()] == ["slice-02.safetensors.damaged"]


@pytest.mark.parametrize("node", [None, "0", "1"])
def test_a_slice_in_a_job(run, launched, monkeypatch, node):
    plan = a_run(run, n=2, nproc=3, max_restarts=4)
    monkeypatch.setenv("SLURM_NNODES", "1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "84")
    if node:
        monkeypatch.setenv("SLURM_NODEID", node)
    assert backends.run_one(run, plan, 2) == 9
    assert launched == [(slices.train_arguments(run, plan, 2), processes.Topology(3), {"max_restarts": 0})]
    state = slices.load_state(run, "02")
    assert (state.jobs, state.code) == (([], None) if node == "1" else (["84_2"], 9))


def test_a_slice_and_a_merge_that_an_error_ends_have_failed(run, launched, monkeypatch):
    def fails(*given: Any, **more: Any) -> int:
        raise KeyError("x")

    plan = a_run(run, n=2, backend="local")
    monkeypatch.setattr(processes, "launch", fails)
    monkeypatch.setattr(cli, "main", fails)
    for ends in (lambda: backends.run_one(run, plan, 1), lambda: backends.run_merge(run, plan)):
        with pytest.raises(KeyError):
            ends()
    assert [slices.load_state(run, name).code for name in ("01", "merge")] == [1, 1]


@pytest.mark.parametrize(
    ("backend", "variable", "job"),
    [("slurm", "85", "85"), ("slurm", None, "PID:me"), ("local", "85", "PID:me")]
)
def test_a_merge_runs_in_its_job_s_own_process(run, launched, monkeypatch, backend, variable, job):
    plan, seen = a_run(run, n=1, backend=backend), []

    def main(arguments: list[str]) -> int:
        seen.append((arguments, slices.load_state(run, "merge").jobs))
        return 9

    monkeypatch.setattr(cli, "main", main)
    if variable:
        monkeypatch.setenv("SLURM_JOB_ID", variable)
    assert backends.run_merge(run, plan) == 9
    assert seen == [(["merge", *plan.merge], [job.replace("PID", str(os.getpid()))])]
    assert slices.load_state(run, "merge").code == 9


@pytest.mark.parametrize(
    ("note", "left", "code"),
    [("block-000.safetensors", 60, 75), ("states", 60, 1), ("states", None, 1), ("states", 9999, 75)]
)
def test_a_merge_that_is_warned_goes_on_only_from_something(run, monkeypatch, capsys, note, left, code):
    """A job that is put back into the queue with nothing done would be so for ever; not one that was
    preempted, with much of its time left."""
    if left:
        monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + left:.0f}")
    plan, ends = a_run(run, n=1, backend="slurm"), []

    def main(arguments: list[str]) -> int:
        noted = run / "merge" / ".m.safetensors.reconcile" / note
        noted.parent.mkdir(parents=True)
        noted.touch()
        os.utime(noted, (time.time() + 1,) * 2)
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(os, "_exit", lambda code: ends.append((code, slices.load_state(run, "merge").code)))
    monkeypatch.setenv("SLURM_JOB_ID", "85")
    before = signal.getsignal(signal.SIGUSR1)
    backends.run_merge(run, plan)
    assert ends == [(code, code)] and signal.getsignal(signal.SIGUSR1) == before
    said = capsys.readouterr().err
    assert (f"run `hvtrain slices merge {run}` in a longer one" in said) == (code == 1)


# --- cancelling ---------------------------------------------------------------------------------------------


def test_jobs_are_cancelled_before_it_is_noted(run, monkeypatch):
    plan, seen = a_run(run, n=3), []
    monkeypatch.setattr(
        slurm, "queue", lambda ids: slurm.Queue({"7_2": "RUNNING", "8": "PENDING (Dependency)"})
    )
    monkeypatch.setattr(slurm, "cancel", lambda ids: seen.append((ids, slices.cancelled(run))))
    finish(run, "01", "7_1")
    stands(run, "02", "7_2")
    stands(run, "merge", "8")
    assert backends.cancel(run, plan) == ["cancelled: 02, merge"]
    assert seen == [(["7_2", "8"], {})] and slices.cancelled(run) == {"02": "7_2", "merge": "8"}
    monkeypatch.setattr(slurm, "queue", lambda ids: slurm.Queue())
    assert backends.cancel(run, plan) == ["nothing was queued or running"]
    monkeypatch.setattr(slurm, "queue", lambda ids: slurm.Queue(silent="x"))
    with pytest.raises(
        LaunchError, match=f"^{run}: 02, merge: the scheduler does not answer: x, so they may be running;"
    ):
        backends.cancel(run, plan)


@pytest.mark.parametrize("by", ["", "5:5"])
def test_processes_are_asked_to_end_by_who_started_them_or_one_by_one(run, monkeypatch, by):
    plan, asked = a_run(run, n=3, backend="local"), []
    monkeypatch.setattr(standing, "alive", lambda job: job in ("1:1", "2:2"))
    monkeypatch.setattr(backends, "starter", lambda folder: by if folder == run else "wrong")
    monkeypatch.setattr(
        backends, "_ask_to_end", lambda job: asked.append((job, sorted(slices.cancelled(run))))
    )
    stands(run, "01", "1:1")
    stands(run, "02", "2:2")
    if by:
        assert backends.cancel(run, plan) == ["cancelled: 01, 02, 03, merge"]
        assert asked == [("5:5", ["01", "02", "03", "merge"])]
        assert slices.cancelled(run) == {"01": "1:1", "02": "2:2", "03": "", "merge": ""}
    else:
        assert backends.cancel(run, plan) == ["cancelled: 01, 02"]
        assert asked == [("1:1", ["01", "02"]), ("2:2", ["01", "02"])]


def test_a_process_is_asked_by_its_number(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda *given: killed.append(given))
    monkeypatch.setattr(backends, "alive", lambda job: job == "12:34")
    backends._ask_to_end("12:35")
    backends._ask_to_end("12:34")
    assert killed == [(12, signal.SIGTERM)]

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(
        LaunchError, match=r"^process 12 belongs to another user; who started the slices must cancel them$"
    ):
        backends._ask_to_end("12:34")
