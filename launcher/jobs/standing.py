"""How the jobs of a slice plan stand: from their files, and from what the scheduler says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvtrain.stopping import REQUEUE
from launcher.exits import USER_ERROR
from launcher.jobs import waves
from launcher.jobs.slices import JobState, Slices, alive, amiss, cancelled, load_state, result
from launcher.jobs.slurm import Queue

# Slurm's words for jobs that wait, and for jobs that have ended. One with any other word is running.
QUEUED = ("PENDING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT",
)


@dataclass(frozen=True)
class Standing:
    """One line of `hvtrain slices status`."""

    name: str
    # waiting, queued, running, preempted, blocked, failed, cancelled, unknown, done; none: no merge wanted
    word: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eta_s: float | None = None
    note: str = ""
    job: str = ""  # what is queued or running


def standing(run: Path, slices: Slices, loraid: int, queue: Queue) -> Standing:
    """Of a slice, from its files and from what the queue says of its job."""
    name, path = slices.name(loraid), result(run, slices, loraid)
    step, loss, pace = _progress(path.parent)
    steps = _steps(path.parent)
    state, wrong = load_state(run, name), amiss(path)
    if not wrong and state.code in (0, None):
        return Standing(name, "done", steps or step, steps, loss)
    found = _of_job(run, name, state, queue, wrong)
    eta = (steps - step) * pace if found.word == "running" and steps and pace else None
    return replace(found, step=step, steps=steps, loss=loss, eta_s=eta)


def merge_standing(run: Path, slices: Slices, queue: Queue, wave: int | None = None) -> Standing:
    """Of a wave's merge; None: the last one's, which is the run's."""
    if not slices.merge:
        return Standing(waves.MERGE, "none", note="not asked for")
    name = waves.merge_name(slices, wave or slices.waves)
    arguments = waves.merge_arguments(run, slices, wave or slices.waves)
    state, output = load_state(run, name), Path(arguments[arguments.index("--output") + 1])
    wrong = amiss(output)
    if not wrong and state.code == 0:
        return Standing(name, "done", note=f"{output}")
    return _of_job(run, name, state, queue, wrong)


def _of_job(run: Path, name: str, state: JobState, queue: Queue, wrong: str) -> Standing:
    """By the newest attempt; `wrong`: what its result lacks."""
    job = state.jobs[-1] if state.jobs else ""
    local = ":" in job
    # after another code its script may start again
    if job and not local and queue.silent and state.code not in (0, USER_ERROR):
        return Standing(name, "unknown", note=f"the scheduler does not answer: {queue.silent}")
    said = ("RUNNING" if alive(job) else "") if local else _said(queue, job, state)
    word = said.split(" ")[0]
    if "DependencyNeverSatisfied" in said:
        return Standing(
            name, "blocked", note=f"job {job} waits for jobs that failed; `hvtrain slices retry`", job=job
        )
    if word in QUEUED:
        return Standing(
            name, "preempted" if state.code == REQUEUE else "queued", note=f"job {job} {said}", job=job
        )
    if word and word not in ENDED:
        return Standing(name, "running", note=f"job {job}", job=job)
    saved = "saved; `hvtrain slices retry` goes on" if state.code == REQUEUE else ""
    if word == "CANCELLED" or cancelled(run).get(name) == job:
        return Standing(name, "cancelled", note=saved)
    if not job:
        return Standing(name, "waiting")
    if saved:
        return Standing(name, "preempted", note=saved)
    if state.code == 0:
        return Standing(name, "failed", note=f"{wrong}; `hvtrain slices retry` makes it again")
    if state.code is None and not said and state.started is None:
        return Standing(
            name, "failed", note=f"job {job}: gone from the queue before it began; cancelled by hand?"
        )
    if state.code is not None:
        why = f"exit code {state.code}"
    elif said:
        why = f"job {job}: Slurm says {said}"
    else:
        why = f"job {job}: ended without a word: killed, or its node died"
    return Standing(name, "failed", note=last_error(run / "logs" / f"{name}.log") or why)


def _said(queue: Queue, job: str, state: JobState) -> str:
    """Of tasks that were cancelled while pending, Slurm tells by the number of their array alone."""
    root = job.partition("_")[0] if state.started is None else job
    return queue.states.get(job, queue.states.get(root, ""))


def _progress(folder: Path) -> tuple[int, float | None, float | None]:
    """(last step, its loss, seconds per step) of a run."""
    step, loss, pace = 0, None, None
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()[-50:]
    except OSError:
        return step, loss, pace
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written
        if "train/loss" in row:
            step, loss, pace = row["step"], row["train/loss"], row.get("speed/slowest_rank_s")
    return step, loss, pace


def _steps(folder: Path) -> int:
    import yaml

    try:
        return int(
            (
                yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
            ).get("run", {}).get("steps") or 0
        )
    except (OSError, ValueError, yaml.YAMLError):
        return 0


def last_error(log: Path) -> str:
    """The last line that says what went wrong."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error:") or "Error:" in line]
    return (errors or lines or [""])[-1][:300]


def table(standings: Sequence[Standing]) -> list[str]:
    lines, wide = [], max(6, *(len(s.name) + 1 for s in standings))
    for s in standings:
        progress = f"{s.step}/{s.steps}" if s.steps else (str(s.step) if s.step else "")
        loss = f"loss {s.loss:.4f}" if s.loss is not None else ""
        eta = f"{_span(s.eta_s)} left" if s.eta_s is not None else ""
        parts = [f"{s.name:<{wide}}{s.word:<11}", f"{progress:<14}", f"{loss:<13}", f"{eta:<14}", s.note]
        lines.append("".join(parts).rstrip())
    return lines


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
