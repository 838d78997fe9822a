"""Run a function on several gloo processes of this machine and collect what each returns."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 600) -> list[Any]:
    """[function(*args) on rank 0, on rank 1, ...]; `function` must be importable
    (defined at the top of a module).

    timeout_s is for a hang, and generous: this may run beside other work on two cores.
    The parent holds the rendezvous store on a port that the system chose, as torchrun does: no port is ever
    guessed. A rank that fails ends the others, and its traceback is the error.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        start = _way_to_start()
        ranks = [
            start.Process(target=_child, args=(rank, env, folder, function, args), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, time.monotonic() + timeout_s, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _way_to_start() -> Any:
    """Forked from a process that has only imported libraries: a rank starts in less than a second, not in six
    of CPU time. A CUDA context does not survive a fork."""
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    forkserver = mp.get_context("forkserver")
    forkserver.set_forkserver_preload(["tests.parallel.preload"])
    return forkserver


def _child(rank: int, env: dict[str, str], folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ.clear()  # of the process that this one was forked from, which a test may have changed since
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        result = function(*args)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # at once: a collective that waits for the others must not keep this process
    torch.save(result, Path(folder, f"{rank}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _wait(ranks: list, deadline: float, folder: Path) -> None:
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            time.sleep(0.5)  # let the others write what they saw
            break
        if time.monotonic() > deadline:
            raise TimeoutError("the ranks did not finish in time: probably one of them waits in a collective")
        time.sleep(0.02)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    codes = [process.exitcode for process in ranks]  # of a rank that a signal ended, nothing else is known
    if errors or any(codes):
        raise AssertionError("\n".join([f"ranks ended with exit codes {codes}", *errors]))
