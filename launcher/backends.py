"""Running the jobs of a slice plan: on this machine, N at a time, or as a Slurm array and a dependent merge job."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from hvtrain.program import HVTRAIN
from launcher import slurm
from launcher.report import REQUEUE
from launcher.site import load_site
from launcher.slices import (
    MERGE,
    Slices,
    Standing,
    load_state,
    merge_standing,
    note_end,
    note_start,
    process_start,
    save_state,
    standing,
)

GOOD = ("done",)
OPEN = ("queued", "running")


def queue_of(run: Path, slices: Slices) -> dict[str, str]:
    """What Slurm says of the newest jobs."""
    if slices.backend != "slurm":
        return {}
    names = [*(slices.name(i) for i in range(1, slices.n + 1)), MERGE]
    return slurm.states([state.jobs[-1] for name in names if (state := load_state(run, name)).jobs])


def standings(run: Path, slices: Slices) -> list[Standing]:
    queue = queue_of(run, slices)
    return [*(standing(run, slices, i, queue) for i in range(1, slices.n + 1)), merge_standing(run, slices, queue)]


def command(run: Path, *arguments: object) -> list[str]:
    return [*HVTRAIN, "slices", *map(str, arguments)]


# --- Slurm ------------------------------------------------------------------------------------------------------------


def array_script(run: Path, slices: Slices, loraids: Sequence[int]) -> str:
    job = slurm.Job(
        "array", f"{run.name}-slices", Path.cwd(), str(run / "logs" / f"{'%' + str(slices.width())}a.log"),
        ["slices", "one", str(run)], slurm.Resources(slices.nodes, slices.nproc, slices.time),
        {"array": ",".join(map(str, loraids)) + f"%{slices.at_once}"},
    )
    return slurm.render(job, load_site(slices.site))


def merge_script(run: Path, slices: Slices, dependency: str) -> str:
    job = slurm.Job(
        "merge", f"{run.name}-merge", Path.cwd(), str(run / "logs" / "merge.log"), ["slices", "merge", str(run)],
        slurm.Resources(gpus=False), {"dependency": dependency},
    )
    return slurm.render(job, load_site(slices.site))


def submit(run: Path, slices: Slices, loraids: Sequence[int], waiting_for: Sequence[str] = ()) -> list[str]:
    """Submit an array of these slices, and the merge after it and after the jobs `waiting_for`. What to print."""
    said, after = [], list(waiting_for)
    if loraids:
        array = slurm.submit(array_script(run, slices, loraids))
        after.append(array)
        for i in loraids:
            state = load_state(run, slices.name(i))
            state.jobs.append(f"{array}_{i}")
            state.started = state.ended = state.code = None
            save_state(run, slices.name(i), state)
        said.append(f"job {array}: slices {', '.join(map(str, loraids))}, {slices.at_once} at a time")
    if slices.merge:
        state = load_state(run, MERGE)
        slurm.cancel(state.jobs[-1:])  # it waits for jobs that will not come
        merge = slurm.submit(merge_script(run, slices, "afterok:" + ":".join(after)))
        state.jobs.append(merge)
        state.started = state.ended = state.code = None
        save_state(run, MERGE, state)
        said.append(f"job {merge}: merge, when all have finished")
    return said


# --- this machine -----------------------------------------------------------------------------------------------------


def run_here(run: Path, slices: Slices, loraids: Sequence[int]) -> int:
    """Run slices, `at_once` of them at a time, then the merge. Ctrl-C and SIGTERM ask them to save. The exit code."""
    waiting, stop = list(loraids), []
    running: dict[subprocess.Popen, tuple[int, str]] = {}
    free = [",".join(slices.gpus[i * slices.nproc : (i + 1) * slices.nproc]) for i in range(slices.at_once)]
    before = {n: signal.signal(n, lambda number, frame: stop.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or running:
            while waiting and free and not stop:
                loraid, gpus = waiting.pop(0), free.pop(0)
                running[_start(run, slices, loraid, gpus)] = (loraid, gpus)
                print(f"slice {loraid}: started{f' on GPU {gpus}' if gpus else ''}", flush=True)
            if stop:
                waiting.clear()
                for process in running:
                    process.send_signal(signal.SIGTERM)
                stop.clear()
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                loraid, gpus = running.pop(process)
                free.append(gpus)
                print(f"slice {loraid}: {_ending(process.returncode)}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    words = [s.word for s in standings(run, slices)[:-1]]
    if any(word not in GOOD for word in words):
        done = sum(word in GOOD for word in words)
        print(f"{done} of {slices.n} slices are done; `hvtrain slices status {run}` says more", flush=True)
        return REQUEUE if all(w in (*GOOD, "preempted", "waiting") for w in words) else 1
    return subprocess.run(command(run, "merge", run)).returncode if slices.merge else 0


def _start(run: Path, slices: Slices, loraid: int, gpus: str) -> subprocess.Popen:
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})}
    with (run / "logs" / f"{slices.name(loraid)}.log").open("ab") as log:
        process = subprocess.Popen(
            command(run, "one", run, loraid), env=env, stdout=log, stderr=log, start_new_session=True
        )
    note_start(run, slices.name(loraid), f"{process.pid}:{process_start(process.pid)}")
    return process


def _ending(code: int) -> str:
    return {0: "done", REQUEUE: "stopped, saved"}.get(code, f"failed (exit code {code})")


# --- inside a job -----------------------------------------------------------------------------------------------------


def run_one(run: Path, slices: Slices, loraid: int) -> int:
    """Train one slice in this job and note how it ended. On several nodes, node 0 notes."""
    from launcher import local
    from launcher.slices import train_arguments

    name, inside = slices.name(loraid), slices.backend == "slurm"
    writes = not inside or os.environ.get("SLURM_NODEID", "0") == "0"
    if writes:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{loraid}" if inside else f"{os.getpid()}:{process_start(os.getpid())}"
        note_start(run, name, job)
    code = 1
    try:
        topology = slurm.topology(slices.nproc) if inside else local.Topology(nproc=slices.nproc)
        code = local.launch(train_arguments(run, slices, loraid), topology)
    finally:
        if writes:
            note_end(run, name, code)
    return code


def run_merge(run: Path, slices: Slices) -> int:
    """The merge, in a process of its own."""
    job = os.environ.get("SLURM_JOB_ID") if slices.backend == "slurm" else None
    note_start(run, MERGE, job or f"{os.getpid()}:{process_start(os.getpid())}")
    code = 1
    try:
        code = subprocess.run([*HVTRAIN, "merge", *slices.merge]).returncode
    finally:
        note_end(run, MERGE, code)
    return code


def cancel(run: Path, slices: Slices) -> list[str]:
    """Cancel what is queued or running; what was done."""
    names = [*(slices.name(i) for i in range(1, slices.n + 1)), MERGE]
    found = [s for s in standings(run, slices) if s.word in (*OPEN, "preempted")]
    jobs = [load_state(run, s.name).jobs[-1] for s in found if s.name in names and load_state(run, s.name).jobs]
    if slices.backend == "slurm":
        slurm.cancel(jobs)
    else:
        for job in jobs:
            os.kill(int(job.split(":")[0]), signal.SIGTERM)
    return [f"cancelled: {', '.join(s.name for s in found)}" if found else "nothing was queued or running"]
