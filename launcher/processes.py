"""Start the processes of a job on this machine, pass signals on to them, and say once why they failed.

It sets the variables that torchrun sets, and a command works the same under torchrun. The differences: a
signal reaches the workers and they get the time that saving takes (torchrun kills after 30 s and does not
pass SIGUSR1), exit codes 2 and 75 come through, and one error is printed once.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from hvtrain import stopping
from hvtrain.errors import LaunchError
from hvtrain.stopping import REQUEUE
from launcher.exits import FOLDER_VARIABLE, INTERRUPTED, USER_ERROR, first_cause
from launcher.program import HVTRAIN

PEERS_GRACE_S = 5.0  # after a failure, the time that the others get to notice and say what they saw
TAIL_LINES = 30
YOUNG_S = 1.0  # a worker younger than this may not hear yet
# Below the ports that Linux hands out by itself (32768 and up), so that none is taken
# between choosing and binding.
PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Topology:
    """Where the processes of a job run. One node needs nothing but nproc."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None

    def __post_init__(self) -> None:
        if self.nproc < 1 or self.nnodes < 1:
            raise LaunchError(f"--nproc {self.nproc} --nnodes {self.nnodes}: both must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise LaunchError(
                f"--node-rank {self.node_rank}: expected 0 to {self.nnodes - 1} (--nnodes {self.nnodes})"
            )
        if self.master_port is not None and not 0 < self.master_port < 2**16:
            raise LaunchError(f"--master-port {self.master_port}: expected 1 to 65535")
        if self.nnodes > 1 and (self.master_port is None or self.master_addr == "127.0.0.1"):
            raise LaunchError(
                "--nnodes > 1 needs --master-addr and --master-port: the host name of node 0 and a free port "
                "on it, the same on every node"
            )


@dataclass(frozen=True)
class Worker:
    rank: int
    process: subprocess.Popen
    log: Path | None  # where its output goes; None: to the terminal
    started: float = field(default_factory=time.monotonic)


def launch(arguments: Sequence[str], topology: Topology, *, max_restarts: int = 0) -> int:
    """Run `hvtrain ARGUMENTS` in topology.nproc processes here; the exit code of the job.

    A job that fails is started again up to max_restarts times, unless the fault is the user's (exit code 2).
    """
    for restart in range(max_restarts + 1):
        code = _once(arguments, topology, restart)
        if code in (0, USER_ERROR, REQUEUE, INTERRUPTED, 128 + signal.SIGTERM) or restart == max_restarts:
            break
        print(f"starting again ({restart + 1} of {max_restarts})", file=sys.stderr)
    return code


def _once(arguments: Sequence[str], topology: Topology, restart: int) -> int:
    with TemporaryDirectory(prefix="hvtrain-") as name:
        folder = Path(name)
        workers: list[Worker] = []
        with _forward_signals(workers) as mail:
            port = topology.master_port or free_port()
            for local_rank in range(topology.nproc):
                workers.append(
                    _start(
                        arguments, topology, local_rank=local_rank, port=port, folder=folder, restart=restart
                    )
                )
            failed = _wait(workers, mail)
        return _explain(workers, failed, folder)


def forwarded() -> list[int]:
    """Signals that ask a job to end."""
    return [*stopping.signals(), signal.SIGINT]


@contextmanager
def handling(take: Callable[[int, object], object]) -> Iterator[None]:
    """Those signals are taken by `take` meanwhile, instead of ending this program."""
    before = {number: signal.signal(number, take) for number in forwarded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cores() -> int:
    """Those that this process may use: fewer than the machine has inside a Slurm job or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(together: int) -> dict[str, str]:
    """The variable that gives each of so many processes its share of the cores, or the user's own setting."""
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // together))}


def free_port() -> int:
    for port in random.sample(PORTS, 50):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LaunchError(f"no free port among {PORTS.start}-{PORTS.stop - 1}; give one with --master-port")


def _start(
    arguments: Sequence[str], topology: Topology, *, local_rank: int, port: int, folder: Path, restart: int
) -> Worker:
    rank = topology.node_rank * topology.nproc + local_rank
    env = {
        **os.environ,
        **threads(topology.nproc),
        "WORLD_SIZE": str(topology.nproc * topology.nnodes),
        "LOCAL_WORLD_SIZE": str(topology.nproc),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(topology.node_rank),
        "MASTER_ADDR": topology.master_addr,
        "MASTER_PORT": str(port),
        FOLDER_VARIABLE: str(folder),
        "TORCHELASTIC_RESTART_COUNT": str(restart),
    }
    # Only the first process of a node writes to the terminal: N equal warnings tell no more than one.
    log = None if local_rank == 0 else folder / f"{rank}.log"
    with open(log or os.devnull, "wb") as sink:
        out = None if log is None else sink
        # A session of its own: Ctrl-C then reaches a worker once, through us, and not twice.
        process = subprocess.Popen(
            [*HVTRAIN, *arguments], env=env, stdout=out, stderr=out, start_new_session=True, preexec_fn=_deaf
        )
    return Worker(rank, process, log)


def _deaf() -> None:
    """In the child, until it has handlers of its own: Slurm signals every process of a step, also one that is
    an instant old. What it misses is sent again when it is YOUNG_S old."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class _Mail:
    """Signals on their way to the workers."""

    workers: list[Worker]
    waiting: list[int] = field(default_factory=list)
    interrupts: int = 0

    def take(self, number: int, frame: object = None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            number = signal.SIGKILL  # the second Ctrl-C means it
        if number == signal.SIGHUP:
            number = signal.SIGTERM  # the terminal is gone, an ssh connection say: what was done shall not be
        if number in (signal.SIGKILL, signal.SIGINT):
            self._send(number)
        else:
            self.waiting.append(number)

    def deliver(self) -> None:
        if self.waiting and all(time.monotonic() - w.started > YOUNG_S for w in self.workers):
            for number in self.waiting:
                self._send(number)
            self.waiting.clear()

    def _send(self, number: int) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)


@contextmanager
def _forward_signals(workers: list[Worker]) -> Iterator[_Mail]:
    mail = _Mail(workers)
    with handling(mail.take):
        if stopping.arrived():  # while this program was loading
            mail.take(signal.SIGUSR1)
        try:
            yield mail
        finally:
            for worker in workers:  # an error of our own must leave nothing behind
                if worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()


def _wait(workers: Sequence[Worker], mail: _Mail) -> Worker | None:
    """Until all have ended; the first that failed. A stop on request (75) is no
    failure: its peers may still save."""
    failed: Worker | None = None
    deadline = float("inf")
    while any(worker.process.poll() is None for worker in workers):
        mail.deliver()
        if failed is None and (failed := _first_failed(workers)):
            deadline = time.monotonic() + PEERS_GRACE_S
        if time.monotonic() > deadline:
            for worker in workers:
                worker.process.kill()
        time.sleep(0.05)
    return failed or _first_failed(workers)


def _first_failed(workers: Sequence[Worker]) -> Worker | None:
    failed = [w for w in workers if w.process.poll() not in (None, 0, REQUEUE)]
    # One that was killed explains peers that ended with an error at the same moment, not the other way round.
    return min(failed, key=lambda w: w.process.returncode >= 0, default=None)


def _explain(workers: Sequence[Worker], failed: Worker | None, folder: Path) -> int:
    """Print the cause of a failure, once, and give the exit code of the job."""
    if failed is None:
        return REQUEUE if any(w.process.returncode == REQUEUE for w in workers) else 0
    code = failed.process.returncode
    if code < 0:  # killed: it could not say why, and what the others recorded is only that it is gone
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"error: process {failed.rank} was ended by {name}{hint}{_tail(failed)}", file=sys.stderr)
        return 128 - code
    cause = first_cause(folder)
    if cause is None:
        print(f"error: process {failed.rank} ended with exit code {code}{_tail(failed)}", file=sys.stderr)
        return code
    where = f" (process {cause.rank} of {len(workers)})" if cause.rank else ""
    print(f"{cause.text}{where}", file=sys.stderr)
    return cause.code


def _tail(worker: Worker) -> str:
    if worker.log is None:
        return ""
    lines = worker.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "".join(f"\n  {line}" for line in lines)
