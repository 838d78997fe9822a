"""Running the jobs of a slice plan: on this machine, N at a time, or as a Slurm
array and a dependent merge job."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvtrain.errors import LaunchError
from hvtrain.stopping import REQUEUE
from launcher import processes
from launcher.jobs import slurm, waves
from launcher.jobs.slices import (
    Slices,
    alive,
    job_of,
    load_state,
    mark_cancelled,
    note_end,
    note_start,
    note_submitted,
    set_damaged_aside,
    starter,
    train_arguments,
)
from launcher.jobs.standing import Standing, merge_standing, standing
from launcher.program import HVTRAIN
from launcher.site import load_site

GOOD = ("done",)
POLL_S = 0.2
PREEMPTED_S = 3600  # a job with more time left than any warning of its limit leaves is preempted


def standings(run: Path, slices: Slices) -> list[Standing]:
    """Of each slice, in order, and of the merge; with waves, of each wave's merge."""
    queue = slurm.Queue()
    if slices.backend == "slurm":
        names = [
            *(slices.name(i) for i in range(1, slices.n + 1)),
            *(waves.merge_name(slices, w) for w in waves.every(slices))
        ]
        queue = slurm.queue([state.jobs[-1] for name in names if (state := load_state(run, name)).jobs])
    merges = (merge_standing(run, slices, queue, wave) for wave in waves.every(slices))
    return [*(standing(run, slices, i, queue) for i in range(1, slices.n + 1)), *merges]


def refuse_unknown(run: Path, found: Sequence[Standing]) -> None:
    """Nothing is started twice, and nothing is called cancelled that runs on."""
    if unknown := [s for s in found if s.word == "unknown"]:
        names = ", ".join(s.name for s in unknown)
        raise LaunchError(
            f"{run}: {names}: {unknown[0].note}, so they may be running; nothing was done: try again later"
        )


@dataclass(frozen=True)
class Start:
    """What is neither done nor under way, of a wave."""

    loraids: tuple[int, ...]
    merge: bool
    waiting_for: tuple[str, ...] = ()  # slices' jobs under way, which the merge needs
    instead_of: tuple[str, ...] = ()  # jobs in the queue that wait for other jobs
    wave: int = 1
    after: str = ""  # the merge before this wave, where it is under way

    def __bool__(self) -> bool:
        return bool(self.loraids or self.merge)


def not_begun(found: Sequence[Standing], first: int = 1, *, anew: bool = False) -> Start:
    """Of a wave's slices, the first of them LORAID `first`, and its merge. `anew`: what they wait for is
    started again, so those in the queue would wait for a job that is gone."""
    *parts, merge = found
    lost = ("blocked", "queued") if anew else ("blocked",)
    stale = [s.job for s in parts if s.job and s.word in lost]
    loraids = tuple(
        i for i, s in enumerate(parts, start=first) if s.word not in GOOD and (not s.job or s.job in stale)
    )
    coming = merge.job and merge.word not in lost
    needed = merge.word != "none" and bool(loraids or (merge.word not in GOOD and not coming))
    old = (merge.job,) if needed and merge.job else ()
    return Start(loraids, needed, tuple(s.job for s in parts if s.job and s.job not in stale), (*old, *stale))


def starts(slices: Slices, found: Sequence[Standing]) -> list[Start]:
    """Of each wave, by what `standings` has found: one after the other."""
    todo: list[Start] = []
    for wave in waves.every(slices):
        ids, merge = waves.members(slices, wave), found[slices.n + wave - 1]
        start = not_begun([*found[ids[0] - 1 : ids[-1]], merge], ids[0], anew=bool(todo and todo[-1].merge))
        before = found[slices.n + wave - 2].job if wave > 1 else ""
        todo.append(replace(start, wave=wave, after=before))
    return todo


def command(run: Path, *arguments: object) -> list[str]:
    return [*HVTRAIN, "slices", *map(str, arguments)]


# --- Slurm --------------------------------------------------------------------------------------------------


def array_script(run: Path, slices: Slices, loraids: Sequence[int], after: Sequence[str] = ()) -> str:
    job = slurm.BatchJob(
        "array", f"{run.name}-slices", Path.cwd(), f"{slurm.literal(run / 'logs')}/%{slices.width()}a.log",
        ["slices", "one", str(run)],
        slurm.Resources(slices.nodes, slices.nproc, slices.time, max_restarts=slices.max_restarts),
        array=",".join(map(str, loraids)) + f"%{slices.at_once}", after=after,
    )
    return slurm.render(job, load_site(slices.site))


def merge_script(run: Path, slices: Slices, after: Sequence[str], wave: int | None = None) -> str:
    name = waves.merge_name(slices, wave or slices.waves)
    reconciles = "--reconcile" in slices.merge  # which takes a GPU, and as long as training does
    job = slurm.BatchJob(
        "merge", f"{run.name}-{name}", Path.cwd(), slurm.literal(run / "logs" / f"{name}.log"),
        ["slices", "merge", str(run), *_which(slices, wave)],
        slurm.Resources(gpus=reconciles, time=slices.time if reconciles else ""), after=after,
    )
    return slurm.render(job, load_site(slices.site))


def _which(slices: Slices, wave: int | None) -> list[str]:
    return [] if wave in (None, slices.waves) else ["--wave", str(wave)]


def submit_all(run: Path, slices: Slices, todo: Sequence[Start]) -> list[str]:
    """Each wave after the merge of the one before."""
    said: list[str] = []
    slurm.cancel([job for start in todo[1:] for job in start.instead_of])
    for number, start in enumerate(todo):
        if number and todo[number - 1].merge:
            start = replace(start, after=load_state(run, waves.merge_name(slices, number)).jobs[-1])
        said += (
            submit(run, slices, replace(start, instead_of=() if number else start.instead_of))
            if start else []
        )
    return said


def submit(run: Path, slices: Slices, start: Start) -> list[str]:
    """Submit an array of these slices, and the merge after it and after what is under way. What to print."""
    before = (start.after,) if start.after else ()
    said, after = [], [*start.waiting_for, *before]
    name = waves.merge_name(slices, start.wave)
    slurm.cancel(start.instead_of)
    if start.loraids:
        array = slurm.submit(array_script(run, slices, start.loraids, before))
        after.append(array)
        for i in start.loraids:
            note_submitted(run, slices.name(i), f"{array}_{i}")
        said.append(f"job {array}: slices {', '.join(map(str, start.loraids))}, {slices.at_once} at a time")
    if start.merge:
        merge = slurm.submit(merge_script(run, slices, after, start.wave))
        note_submitted(run, name, merge)
        said.append(
            f"job {merge}: {name}, {'when all have finished' if after else 'at once: all slices are done'}"
        )
    return said


# --- this machine -------------------------------------------------------------------------------------------


def run_here(run: Path, slices: Slices, loraids: Sequence[int]) -> int:
    """Wave by wave: slices, `at_once` of them at a time, then the merge. Ctrl-C and SIGTERM ask
    them to save. The exit code."""
    asked: list[int] = []
    with processes.handling(lambda number, frame: asked.append(number)):
        for wave in waves.every(slices):
            own = [i for i in loraids if i in waves.members(slices, wave)]
            if not own and standings(run, slices)[slices.n + wave - 1].word in GOOD:
                continue
            if code := _wave_here(run, slices, own, wave, asked):
                return code
    return 0


def _wave_here(run: Path, slices: Slices, loraids: Sequence[int], wave: int, asked: list[int]) -> int:
    """`asked`: signals as they come; after one, nothing more is begun."""
    waiting, told = list(loraids), 0
    running: dict[subprocess.Popen, tuple[int, str]] = {}
    together = min(slices.at_once, len(loraids)) * slices.nproc
    free = [",".join(slices.gpus[i * slices.nproc : (i + 1) * slices.nproc]) for i in range(slices.at_once)]
    while waiting or running:
        while waiting and free and not asked:
            loraid, gpus = waiting.pop(0), free.pop(0)
            running[_start(run, slices, loraid, gpus, together)] = (loraid, gpus)
            print(f"slice {loraid}: started{f' on GPU {gpus}' if gpus else ''}", flush=True)
        if len(asked) > told:
            told = len(asked)
            waiting.clear()
            for process in running:
                process.send_signal(signal.SIGTERM)
        time.sleep(POLL_S)
        for process in [p for p in running if p.poll() is not None]:
            loraid, gpus = running.pop(process)
            free.append(gpus)
            print(f"slice {loraid}: {_ending(process.returncode)}", flush=True)
    words = [s.word for s in standings(run, slices)[: waves.members(slices, wave)[-1]]]
    if asked or any(word not in GOOD for word in words):
        done = sum(word in GOOD for word in words)
        print(f"{done} of {slices.n} slices are done; `hvtrain slices status {run}` says more", flush=True)
        return 1 if "failed" in words else REQUEUE
    return _merge_here(run, slices, wave, asked) if slices.merge else 0


def _merge_here(run: Path, slices: Slices, wave: int, asked: list[int]) -> int:
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(slices.gpus)} if slices.gpus else {})}
    process = subprocess.Popen(
        command(run, "merge", run, *_which(slices, wave)), env=env, start_new_session=True
    )
    told = 0
    while process.poll() is None:
        if len(asked) > told:  # it may end well all the same: then the next wave is not begun
            told = len(asked)
            process.send_signal(signal.SIGTERM)
        time.sleep(POLL_S)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _start(run: Path, slices: Slices, loraid: int, gpus: str, together: int) -> subprocess.Popen:
    """`together`: processes that share the cores."""
    visible = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    env = {**os.environ, **processes.threads(together), **visible}
    with (run / "logs" / f"{slices.name(loraid)}.log").open("ab") as log:
        process = subprocess.Popen(
            command(run, "one", run, loraid), env=env, stdout=log, stderr=log, start_new_session=True
        )
    note_start(run, slices.name(loraid), job_of(process.pid))
    return process


def _ending(code: int) -> str:
    return {0: "done", REQUEUE: "stopped, saved"}.get(code, f"failed (exit code {code})")


# --- inside a job -------------------------------------------------------------------------------------------


def run_one(run: Path, slices: Slices, loraid: int) -> int:
    """Train one slice in this job and note how it ended. On several nodes, node 0 notes."""
    name, inside = slices.name(loraid), slices.backend == "slurm"
    writes = not inside or os.environ.get("SLURM_NODEID", "0") == "0"
    if writes:
        note_start(
            run, name, f"{os.environ['SLURM_ARRAY_JOB_ID']}_{loraid}" if inside else job_of(os.getpid())
        )
        set_damaged_aside(run, slices, loraid)
    code = 1
    try:
        topology = slurm.topology(slices.nproc) if inside else processes.Topology(nproc=slices.nproc)
        # In a Slurm job all nodes start again together: its script sees to that.
        code = processes.launch(
            train_arguments(run, slices, loraid), topology, max_restarts=0 if inside else slices.max_restarts
        )
    finally:
        if writes:
            note_end(run, name, code)
    return code


def run_merge(run: Path, slices: Slices, wave: int | None = None) -> int:
    """In this very process, so that whoever ends it ends the merge."""
    from launcher import cli

    job = os.environ.get("SLURM_JOB_ID") if slices.backend == "slurm" else None
    name = waves.merge_name(slices, wave or slices.waves)
    note_start(run, name, job or job_of(os.getpid()))
    code, began = 1, time.time()

    def warned(number: int, frame: object) -> None:
        """Of the time limit: the next job goes on, if there is something to go on from. Of a preemption,
        which comes at any time: it begins again at worst."""
        notes = [path for kind in (".*/*.safetensors", ".*.partial") for path in (run / "merge").glob(kind)]
        left = float(os.environ.get("SLURM_JOB_END_TIME", 0)) - time.time()
        go_on = left > PREEMPTED_S or any(path.stat().st_mtime > began for path in notes)
        if not go_on:
            more = " ".join(["hvtrain slices merge", shlex.quote(str(run)), *_which(slices, wave)])
            print(
                f"error: {name}: nothing of it was noted within this job's time limit, and the next would do "
                f"no better: run `{more}` in a longer one", file=sys.stderr, flush=True
            )
        note_end(run, name, code := REQUEUE if go_on else 1)
        os._exit(code)

    before = signal.signal(signal.SIGUSR1, warned) if job else None
    try:
        code = cli.main(["merge", *waves.merge_arguments(run, slices, wave or slices.waves)])
    finally:
        note_end(run, name, code)
        if job:
            signal.signal(signal.SIGUSR1, before)
    return code


def cancel(run: Path, slices: Slices) -> list[str]:
    """Cancel what is queued or running, and nothing else; what was done."""
    found = standings(run, slices)
    refuse_unknown(run, found)
    under_way = {s.name: s.job for s in found if s.job}
    if slices.backend == "slurm":
        slurm.cancel(list(under_way.values()))
        mark_cancelled(run, under_way)
    else:
        by = starter(run)
        if by:  # it passes the wish on, and starts no more
            under_way |= {s.name: "" for s in found if s.word == "waiting"}
        mark_cancelled(run, under_way)
        for job in [by] if by else under_way.values():
            _ask_to_end(job)
    return [f"cancelled: {', '.join(under_way)}" if under_way else "nothing was queued or running"]


def _ask_to_end(job: str) -> None:
    """A process of ours, or nobody: not the one that has its number now."""
    if not alive(job):
        return
    pid = int(job.partition(":")[0])
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise LaunchError(
            f"process {pid} belongs to another user; who started the slices must cancel them"
        ) from None
