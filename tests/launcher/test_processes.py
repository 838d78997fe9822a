"""The launcher in the test's own process: what it starts, how it passes signals on,
and when it gives up waiting."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvtrain import stopping
from hvtrain.errors import LaunchError
from launcher import processes


class Clock:
    """Stands for the module `time`; `at`: what happens when."""

    def __init__(self) -> None:
        self.now, self.sleeps = 100.0, 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds == 0.05
        self.now, self.sleeps = round(self.now + seconds, 2), self.sleeps + 1
        assert self.sleeps < 1000, "waits for ever"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(processes, "time", clock := Clock())
    return clock


class Process:
    """Ends with `code` at `ends` on the clock, or when it is killed."""

    def __init__(self, clock: Clock, ends: float, code: int = 0) -> None:
        self.clock, self.ends, self.code, self.got, self.waited = clock, ends, code, [], 0
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.clock.now >= self.ends:
            self.returncode = self.code
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.got.append((round(self.clock.now, 2), number))

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self.ends, self.code = self.clock.now, -signal.SIGKILL

    def wait(self) -> None:
        self.waited += 1


def workers(*started_ones: Any, started: float = 100.0) -> list[processes.Worker]:
    return [processes.Worker(rank, process, None, started) for rank, process in enumerate(started_ones)]


# --- a job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "restarts", "starts", "code"),
    [
        ([0], 3, 1, 0), ([2], 3, 1, 2), ([75], 3, 1, 75), ([130], 3, 1, 130), ([143], 3, 1, 143),
        ([1, 0], 3, 2, 0), ([137, 1, 134], 2, 3, 134), ([1, 75], 2, 2, 75), ([1], 0, 1, 1),
    ],
)
def test_accidents_are_started_again(
    codes: list[int], restarts: int, starts: int, code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture
) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(processes, "_once", lambda *given: calls.append(given) or codes[len(calls) - 1])
    here = processes.Topology(2)
    assert processes.launch(["train"], here, max_restarts=restarts) == code
    assert calls == [(["train"], here, number) for number in range(starts)]
    again = [f"starting again ({number} of {restarts})\n" for number in range(1, starts)]
    assert capsys.readouterr() == ("", "".join(again))


def test_without_restarts_an_accident_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_once", lambda *given: 1 + given[2])
    assert processes.launch([], processes.Topology(1)) == 1


@pytest.mark.parametrize("given", [None, 20007])
def test_a_job_is_one_folder_one_port_and_nproc_processes(
    given: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"started": []}

    def start(arguments: list[str], topology: processes.Topology, **more: Any) -> Any:
        assert more["folder"].is_dir() and more["folder"].name.startswith("hvtrain-")
        seen["started"].append(
            (arguments, topology, *(more[n] for n in ("local_rank", "port", "restart")), len(more))
        )
        return SimpleNamespace(process=SimpleNamespace(poll=lambda: 0))

    def wait(workers: list, mail: processes._Mail) -> str:
        assert mail.workers is workers and len(workers) == 2
        return "failed"

    def explain(workers: list, failed: object, folder: Path) -> int:
        seen["end"], seen["folder"] = (len(workers), failed, folder.is_dir()), folder
        return 9

    for name, what in (
        ("_start", start), ("_wait", wait), ("_explain", explain), ("free_port", lambda: 20001)
    ):
        monkeypatch.setattr(processes, name, what)
    here = processes.Topology(2, master_port=given)
    assert processes._once(["train"], here, 4) == 9
    assert seen["started"] == [(["train"], here, rank, given or 20001, 4, 4) for rank in (0, 1)]
    assert seen["end"] == (2, "failed", True) and not seen["folder"].exists()


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0: {1, 5, 7}}[pid])
    assert processes.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert processes.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processes.cores() == 1


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        busy, free = taken.getsockname()[1], []

        def sample(ports: range, n: int) -> list[int]:
            asked.append((ports, n))
            return [busy, *free]

        monkeypatch.setattr(processes, "random", SimpleNamespace(sample=sample))
        with pytest.raises(
            LaunchError, match=r"^no free port among 20000-31999; give one with --master-port$"
        ):
            processes.free_port()
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            free.append(other.getsockname()[1])
        assert processes.free_port() == free[0] and asked == [(range(20000, 32000), 50)] * 2


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_process_is_started_with_its_place(
    local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def popen(command: list[str], **options: Any) -> str:
        if options["stdout"]:
            options["stdout"].write(b"words")
        calls.append((command, options))
        return "process"

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(processes, "cores", lambda: 7)
    monkeypatch.setattr(processes, "HVTRAIN", ("python", "hvtrain"))
    for name in ("RANK", "OMP_NUM_THREADS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OF_THE_USER", "x")
    there = processes.Topology(2, nnodes=2, node_rank=1, master_addr="node0", master_port=20001)
    worker = processes._start(
        ["train", "a"], there, local_rank=local_rank, port=20001, folder=tmp_path, restart=5
    )
    [(command, options)] = calls
    out, env = options.pop("stdout"), options.pop("env")
    assert command == ["python", "hvtrain", "train", "a"] and env.items() >= {
        "OMP_NUM_THREADS": "3", "OF_THE_USER": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
        "RANK": str(2 + local_rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": "1", "MASTER_ADDR": "node0",
        "MASTER_PORT": "20001", "HVTRAIN_REPORT_DIR": str(tmp_path), "TORCHELASTIC_RESTART_COUNT": "5",
    }.items()
    assert options == {"stderr": out, "start_new_session": True, "preexec_fn": processes._deaf}
    assert (worker.rank, worker.process) == (2 + local_rank, "process")
    if local_rank == 0:
        assert out is None and worker.log is None and not list(tmp_path.iterdir())  # the terminal
    else:
        assert worker.log == tmp_path / "3.log" and worker.log.read_bytes() == b"words"


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (4, "1"), (9, "2")])
def test_each_process_gets_its_share_of_the_cores(
    cores: int, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **more: seen.append(env["OMP_NUM_THREADS"]))
    monkeypatch.setattr(processes, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processes._start([], processes.Topology(4), local_rank=0, port=1, folder=tmp_path, restart=0)
    monkeypatch.setenv("OMP_NUM_THREADS", "11")
    processes._start([], processes.Topology(4), local_rank=0, port=1, folder=tmp_path, restart=0)
    assert seen == [threads, "11"]


# --- signals ------------------------------------------------------------------------------------------------


def test_a_process_that_begins_is_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(signal, "signal", lambda *given: calls.append(given))
    processes._deaf()
    assert calls == [(signal.SIGTERM, signal.SIG_IGN), (signal.SIGUSR1, signal.SIG_IGN)]


def test_a_signal_waits_until_every_process_can_hear(clock: Clock) -> None:
    first, second, gone = Process(clock, 999), Process(clock, 999), Process(clock, 0)
    mail = processes._Mail([*workers(first, gone, started=100.0), *workers(second, started=100.5)])
    mail.take(signal.SIGUSR1)
    mail.take(signal.SIGTERM, None)
    for clock.now in (101.0, 101.5):
        mail.deliver()
        assert first.got == second.got == []
    clock.now = 101.6
    mail.deliver()
    mail.deliver()
    assert first.got == second.got == [(101.6, signal.SIGUSR1), (101.6, signal.SIGTERM)] and gone.got == []


def test_ctrl_c_goes_at_once_and_the_second_kills(clock: Clock) -> None:
    process = Process(clock, 999)
    mail = processes._Mail(workers(process))
    mail.take(signal.SIGINT)
    assert process.got == [(100.0, signal.SIGINT)] and not mail.waiting
    mail.take(signal.SIGINT)
    mail.take(signal.SIGTERM)
    assert process.got[1:] == [(100.0, signal.SIGKILL)] * 2 and not mail.waiting


def test_signals_are_ours_while_a_job_runs_and_no_longer(clock: Clock) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    running, gone = Process(clock, 999), Process(clock, 0)
    with pytest.raises(KeyError), processes._forward_signals(workers(running, gone)) as mail:
        assert mail.waiting == []
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
        assert mail.waiting == [signal.SIGTERM, signal.SIGUSR1] and running.got == [(100.0, signal.SIGINT)]
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before
    # an error of ours leaves nothing behind
    assert running.got[1:] == [(100.0, signal.SIGKILL)] and running.waited == 1
    assert gone.got == [] and gone.waited == 0


def test_a_signal_that_came_while_the_program_was_loading_is_passed_on(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "arrived", lambda: True)
    with processes._forward_signals([]) as mail:
        assert mail.waiting == [signal.SIGUSR1]


# --- the end ------------------------------------------------------------------------------------------------


def test_peers_of_a_failure_get_their_time_and_are_killed_then(clock: Clock) -> None:
    failed, hangs, late = Process(clock, 101, 1), Process(clock, 1e9), Process(clock, 103, 2)
    group = workers(hangs, late, failed)
    assert processes._wait(group, processes._Mail(group)) is group[2]
    # 5 s after the failure was seen
    assert hangs.got == [(106.05, signal.SIGKILL)] and late.got == failed.got == []


def test_one_that_saves_is_waited_for_as_long_as_it_takes(clock: Clock) -> None:
    stopped, saves = Process(clock, 101, 75), Process(clock, 120)
    group = workers(stopped, saves)
    mail = processes._Mail(group)
    mail.take(signal.SIGTERM)
    assert processes._wait(group, mail) is None and 120 <= clock.now < 120.2
    assert saves.got == [(101.05, signal.SIGTERM)] and stopped.got == []


def test_a_failure_at_the_very_end_is_a_failure(clock: Clock) -> None:
    group = workers(Process(clock, 0), Process(clock, 0, 3))
    assert processes._wait(group, processes._Mail(group)) is group[1] and clock.sleeps == 0


def ended(code: int, rank: int = 1, log: Path | None = None) -> processes.Worker:
    return processes.Worker(rank, SimpleNamespace(returncode=code), log)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "said", "end"),
    [
        (-9, "error: process 1 was ended by SIGKILL (out of memory?)", 137),
        (-11, "error: process 1 was ended by SIGSEGV", 139),
        (-15, "error: process 1 was ended by SIGTERM", 143),
        (134, "error: process 1 ended with exit code 134", 134),
    ],
)
def test_a_process_that_could_not_say_why(
    code: int, said: str, end: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "log").write_bytes(b"".join(b"line %d\xff\n" % i for i in range(40)))
    tail = "".join(f"\n  line {i}\ufffd" for i in range(10, 40))
    for log, after in ((None, ""), (tmp_path / "log", tail)):
        failed = ended(code, log=log)
        assert processes._explain([ended(0, 0), failed], failed, tmp_path) == end
        assert capsys.readouterr() == ("", f"{said}{after}\n")


@pytest.mark.parametrize(("rank", "where"), [(0, ""), (1, " (process 1 of 3)")])
def test_the_cause_is_said_once_with_its_process(
    rank: int, where: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "9.json").write_text(f'{{"rank": {rank}, "code": 2, "time_s": 1.0, "text": "error: x"}}')
    group = [ended(0, 0), ended(1, 1), ended(1, 2)]
    assert processes._explain(group, group[2], tmp_path) == 2
    assert capsys.readouterr() == ("", f"error: x{where}\n")


NODES = (
    "--nnodes > 1 needs --master-addr and --master-port: the host name of node 0 and a free port on it, the "
    "same on every node"
)
TWO = {"nproc": 1, "nnodes": 2, "master_addr": "a", "master_port": 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nproc": 0}, "--nproc 0 --nnodes 1: both must be at least 1"),
        ({"nproc": 1, "nnodes": 0}, "--nproc 1 --nnodes 0: both must be at least 1"),
        ({"nproc": 1, "node_rank": 1}, "--node-rank 1: expected 0 to 0 (--nnodes 1)"),
        ({**TWO, "node_rank": 2}, "--node-rank 2: expected 0 to 1 (--nnodes 2)"),
        ({"nproc": 1, "node_rank": -1}, "--node-rank -1: expected 0 to 0 (--nnodes 1)"),
        ({"nproc": 1, "master_port": 0}, "--master-port 0: expected 1 to 65535"),
        ({"nproc": 1, "master_port": 65536}, "--master-port 65536: expected 1 to 65535"),
        ({**TWO, "master_addr": "127.0.0.1"}, NODES), ({**TWO, "master_port": None}, NODES),
    ],
)
def test_a_topology_that_cannot_be(options: dict, says: str) -> None:
    with pytest.raises(LaunchError, match=f"^{re.escape(says)}$"):
        processes.Topology(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"nproc": 1}, {"nproc": 1, "master_port": 1}, {"nproc": 1, "master_port": 65535}, TWO,
        {**TWO, "node_rank": 1}
    ],
)
def test_a_topology_that_can_be(options: dict) -> None:
    assert processes.Topology(**options).nproc == 1
