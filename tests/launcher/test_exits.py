"""What a launcher concludes from how its processes ended, and how it numbers them."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvtrain.errors import ConfigError
from launcher import exits, output, processes
from launcher.exits import Failure, first_cause
from shards.errors import ShardError
from tests.launcher.test_launch import end, job
from tests.wait import wait_for


def recorded(folder: Path, *failures: Failure) -> Failure | None:
    for failure in failures:
        (folder / f"{failure.rank}.json").write_text(json.dumps(asdict(failure)))
    return first_cause(folder)


def test_the_users_mistake_explains_the_others_however_late_it_was_noticed(tmp_path: Path) -> None:
    mistake = Failure(2, 2, 30.0, "error: clip.mp4")
    assert recorded(
        tmp_path, Failure(0, 1, 10.0, "lost a peer"), Failure(1, 1, 20.0, "lost another"), mistake
    ) == mistake


def test_of_several_mistakes_the_first_and_of_equal_ones_rank_0s(tmp_path: Path) -> None:
    assert first_cause(tmp_path) is None
    early = Failure(3, 2, 10.0, "error: a")
    assert recorded(tmp_path, Failure(1, 2, 20.0, "error: b"), early) == early
    same = Failure(0, 2, 99.0, "error: a")
    assert recorded(tmp_path, same, Failure(2, 2, 11.0, "error: a")) == same


def test_without_a_mistake_the_earliest_failure(tmp_path: Path) -> None:
    early = Failure(1, 1, 10.0, "Traceback a")
    assert recorded(
        tmp_path, Failure(0, 1, 20.0, "Traceback b"), early, Failure(2, 130, 15.0, "interrupted")
    ) == early


class Ended:
    def __init__(self, code: int | None) -> None:
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode


def workers(*codes: int | None) -> list[processes.Worker]:
    ended = map(Ended, codes)
    return [processes.Worker(rank, one, None) for rank, one in enumerate(ended)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codes", "failed"),
    [
        ((0, 0), None), ((0, 75), None), ((None, 75), None), ((None, None), None),
        ((0, 1), 1), ((1, 2), 0), ((75, 1), 1), ((None, 2), 1),
        ((1, -9), 1), ((-15, 2), 0), ((1, 0, -9, 2), 2),  # one that was killed explains the others
    ],
)
def test_which_process_failed(codes: tuple, failed: int | None) -> None:
    found = processes._first_failed(workers(*codes))
    assert (found.rank if found else None) == failed


@pytest.mark.parametrize(("codes", "code"), [((0, 0), 0), ((0, 75), 75), ((75, 75), 75)])
def test_the_exit_code_of_a_job_that_did_not_fail(codes: tuple, code: int, tmp_path: Path) -> None:
    assert processes._explain(workers(*codes), None, tmp_path) == code


def test_ranks_are_counted_over_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            seen.append(env)

    monkeypatch.setattr(subprocess, "Popen", Process)
    there = processes.Topology(nproc=4, nnodes=3, node_rank=2, master_addr="node0", master_port=20001)
    for local_rank in range(4):
        worker = processes._start([], there, local_rank=local_rank, port=20001, folder=tmp_path, restart=5)
        assert worker.rank == 8 + local_rank
        assert worker.log == (None if local_rank == 0 else tmp_path / f"{8 + local_rank}.log")
    names = (
        "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
        "TORCHELASTIC_RESTART_COUNT"
    )
    assert [seen[3][name] for name in names] == ["12", "4", "11", "3", "2", "node0", "20001", "5"]


def test_ports_are_none_that_the_system_hands_out_by_itself() -> None:
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert {processes.free_port() for _ in range(20)} <= set(range(20000, min(given, 32000)))


def test_the_second_ctrl_c_means_it(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGINT, lambda *_: (here / f'{rank}.heard').touch())
(here / f'{rank}.ready').touch()
time.sleep(600)
"""
    process = job(tmp_path, body)
    wait(tmp_path, "*.ready")
    process.send_signal(signal.SIGINT)
    wait(tmp_path, "*.heard")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = end(process, timeout=60)
    assert code == 128 + signal.SIGKILL and "was ended by SIGKILL" in err


def test_a_terminal_that_closes_asks_the_processes_to_save(tmp_path: Path) -> None:
    """Unless nohup said that it is of no concern."""
    body = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
(here / f'{rank}.ready').touch()
time.sleep(600)
"""

    def under(handler: signal.Handlers, folder: Path) -> subprocess.Popen:
        """The tests themselves may run under nohup."""
        before = signal.signal(signal.SIGHUP, handler)
        try:
            return job(folder, body)
        finally:
            signal.signal(signal.SIGHUP, before)

    process = under(signal.SIG_DFL, tmp_path)
    wait(tmp_path, "*.ready")
    process.send_signal(signal.SIGHUP)
    assert end(process, timeout=60)[0] == 75

    (tmp_path / "nohup").mkdir()
    process = under(signal.SIG_IGN, tmp_path / "nohup")
    wait(tmp_path / "nohup", "*.ready")
    process.send_signal(signal.SIGHUP)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process, timeout=60)[0] == 75


def wait(folder: Path, pattern: str) -> None:
    wait_for(lambda: len(list(folder.glob(pattern))) == 2)


def test_a_launched_command_is_that_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is a rank only if the environment and the command say so: `hvtrain
    models` in a job stays what it is."""
    from launcher import cli, worker

    started = []
    monkeypatch.setattr(worker, "main", lambda arguments: started.append(arguments))
    monkeypatch.setattr(cli, "run", lambda arguments: 0)
    monkeypatch.setattr(cli.output, "prepare", lambda: None)
    for rank, arguments, expected in (
        ("0", ["train", "a.yaml"], [["train", "a.yaml"]]),
        ("1", ["--local_rank=1", "encode"], [["encode"]]),
        ("1", ["--local-rank=1", "generate"], [["generate"]]),
        ("0", ["models"], []), ("0", [], []), (None, ["train", "a.yaml"], []),
    ):
        started.clear()
        monkeypatch.setattr(cli.sys, "argv", ["hvtrain", *arguments])
        if rank is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main() == 0 and started == expected, arguments
    assert os.environ["PYTHONSAFEPATH"] == "1"


# --- how a command ends -------------------------------------------------------------------------------------


class Stream(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """What the command says when it ends, of a process that is no rank."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(exits.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(exits, "sys", SimpleNamespace(stderr=(stream := Stream()), modules=sys.modules))
    return stream


def raises(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/out/x")


ROOM = "/out/x: No space left on device; make room, then the same command again"
OTHER = "choose a place that you may read and write, or ask for the permission"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (output.OutputLost(""), 0, None),
        (output.OutputLost("closed"), 2, "error: standard output: closed; what was printed is not complete"),
        (ConfigError("a\n\n   \n  b  \nc"), 2, "error: a; b; c"),
        (ShardError("x.tar"), 2, "error: x.tar"),
        (refused(errno.ENOSPC), 2, f"error: {ROOM}"),
        (refused(errno.EDQUOT), 2,
            "error: /out/x: Disk quota exceeded; your quota is used up: make room, then the same command "
            "again"),
        (refused(errno.EROFS), 2, "error: /out/x: Read-only file system; choose a place that can be written"),
        (refused(errno.EACCES), 2, f"error: /out/x: Permission denied; {OTHER}"),
        (refused(errno.EPERM), 2, f"error: /out/x: Operation not permitted; {OTHER}"),
        (refused(errno.EFBIG), 2, "error: /out/x: File too large; larger than files may be here (ulimit -f, "
        "or the file system)"),
        (refused(errno.EMFILE), 2, "error: /out/x: Too many open files; too few open files are allowed: "
        "ulimit -n 4096"),
        (OSError(errno.EROFS, "no"), 2, "error: [Errno 30] no; choose a place that can be written"),
        (RuntimeError("io: bad\n (os error 30)"), 2, "error: io: bad; (os error 30); choose a place that can "
        "be written"),
    ],
)
def test_what_a_command_says_when_it_ends(
    error: BaseException, code: int, said: str | None, stderr: Stream, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exits.guarded(raises(error)) == code
    assert stderr.getvalue() == (f"{said}\n" if said else "") and bool(stderr.flushes) == bool(said)
    monkeypatch.setenv(exits.FOLDER_VARIABLE, str(tmp_path))
    assert exits.guarded(raises(error)) == code
    found = first_cause(tmp_path)
    assert (found and (found.code, found.text)) == ((code, said) if said else None)


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("a pipe"), BrokenPipeError(32, "y"), RuntimeError("(os error 32)")]
)
def test_what_is_nobodys_mistake_is_a_bug(
    error: Exception, stderr: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exits.guarded(raises(error)) == 1
    assert re.match(r"Traceback \(most recent call last\):\n[\s\S]*Error: [^\n]+\n\Z", stderr.getvalue())
    monkeypatch.setenv(exits.FOLDER_VARIABLE, str(tmp_path))
    assert exits.guarded(raises(error)) == 1
    found = first_cause(tmp_path)
    assert found and found.code == 1 and found.text.startswith("Traceback")


def test_an_exit_code_is_passed_on(stderr: Stream) -> None:
    assert [exits.guarded(lambda code=code: code) for code in (None, 0, 1, 75)] == [0, 0, 1, 75]
    assert stderr.getvalue() == ""


def test_error_classes_that_nobody_loaded_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "shards.errors")
    assert exits.is_user_error(ConfigError("x")) and not exits.is_user_error(ShardError("x"))


def test_a_rank_without_a_launcher_says_which_it_is(monkeypatch: pytest.MonkeyPatch, stderr: Stream) -> None:
    for rank in ("0", "12"):
        monkeypatch.setenv("RANK", rank)
        exits.guarded(raises(KeyboardInterrupt()))
    assert stderr.getvalue() == "interrupted\ninterrupted (rank 12)\n"
    monkeypatch.setattr(stderr, "write", raises(OSError()))
    assert exits.guarded(raises(ConfigError("x"))) == 2  # nobody hears it; the exit code says it


def test_a_launched_rank_leaves_a_record_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: Stream
) -> None:
    monkeypatch.setattr(time, "time", lambda: 12.5)
    monkeypatch.setenv(exits.FOLDER_VARIABLE, str(tmp_path))
    replaced = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: replaced.append(self.suffix) or replace(self, to))
    exits.guarded(raises(ConfigError("of rank 0")))
    monkeypatch.setenv("RANK", "3")
    exits.guarded(raises(KeyboardInterrupt()))
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {
        "0.json": {"rank": 0, "code": 2, "time_s": 12.5, "text": "error: of rank 0"},
        "3.json": {"rank": 3, "code": 130, "time_s": 12.5, "text": "interrupted"},
    }
    # the launcher reads none half-written
    assert stderr.getvalue() == "" and ".json" not in replaced and len(replaced) == 2
