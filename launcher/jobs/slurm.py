"""From a job's description to sbatch text to a job id; and what Slurm says of jobs later."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvtrain.errors import LaunchError
from launcher.processes import Topology
from launcher.program import HVTRAIN
from launcher.site import Site, check_time

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"
ANSWER_S = 20  # a scheduler that takes longer to say how jobs stand is taken for silent
SUBMIT_S = 120
RESTARTS = 3  # of the processes, within a job


@dataclass(frozen=True)
class Resources:
    """Of one job."""

    nodes: int = 1
    nproc: int = 1  # processes per node
    time: str = ""  # wins over the site's
    gpus: bool = True  # ask for them as the site says
    max_restarts: int = RESTARTS


@dataclass(frozen=True)
class BatchJob:
    template: str  # job, array or merge
    name: str
    folder: Path  # where it runs
    log: str  # a pattern of Slurm's: %j is the job's number, literal() makes a path one
    command: Sequence[str]  # of hvtrain
    resources: Resources
    array: str = ""  # of an array, its tasks, as in 1,2,3%2
    after: Sequence[str] = ()  # jobs that must have ended well


def render(job: BatchJob, site: Site) -> str:
    """The sbatch script. A placeholder without a value is a bug, not an empty line. Raises LaunchError for a
    value that cannot be an option of sbatch."""
    values = {
        "name": quoted("--job-name", job.name), "nodes": str(job.resources.nodes),
        "log": quoted("--output", job.log), "grace": str(site.grace_s),
        "max_restarts": str(job.resources.max_restarts), "folder": shlex.quote(str(job.folder)),
        "options": "\n".join(f"#SBATCH {o}" for o in _options(job, site)),
        "setup": "\n".join([*(f"module load {shlex.join(m.split())}" for m in site.modules), *site.setup]),
        "environment": "\n".join(f"export {_export(item)}" for item in site.environment),
        "srun": f"--cpus-per-task={n}" if (n := _cpus(job, site)) else "",
        "command": " ".join(
            [*([site.prefix] if site.prefix else []), _hvtrain(site), *map(shlex.quote, job.command)]
        ),
        "array": job.array,
    }
    path = TEMPLATES / f"{job.template}.sbatch"
    if not path.is_file():
        raise LaunchError(f"{path} is missing: jobs are submitted from a checkout of the repository")
    return re.sub(r"@\{(\w+)\}", lambda match: values[match[1]], path.read_text(encoding="utf-8"))


def quoted(option: str, value: str) -> str:
    """A value as sbatch reads it in an #SBATCH line: bare, or in double quotes, where a
    backslash takes the next sign as it is.

    A line break would end the line, and what follows it would be run by the shell of the node.
    """
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise LaunchError(
            f"{option} {value!r}: has a line break or control character, which no Slurm option can hold"
        )
    if re.fullmatch(r"[\w.,:/%+@=-]+", value, re.ASCII):
        return value
    return '"' + re.sub(r'["\\]', r"\\\g<0>", value) + '"'


def literal(path: Path | str) -> str:
    """A path as a pattern of Slurm's that means this path and nothing else."""
    if "\\" in str(path):
        raise LaunchError(
            f"{path}: a backslash in a log's path stops Slurm from filling in job numbers; choose another "
            "name"
        )
    return str(path).replace("%", "%%")


def _options(job: BatchJob, site: Site) -> list[str]:
    """sbatch options that the site or the job sets."""
    check_time("--time", job.resources.time)
    found = {
        "--partition": site.partition, "--account": site.account, "--qos": site.qos,
        "--constraint": site.constraint, "--time": job.resources.time or site.time, "--mem": site.mem,
        "--cpus-per-task": str(_cpus(job, site) or ""),
        "--dependency": "afterok:" + ":".join(job.after) if job.after else "",
    }
    if job.resources.gpus and site.gpus:
        n = str(job.resources.nproc)
        found |= {"--gres": site.gres.replace("{n}", n)} if site.gres else {"--gpus-per-node": n}
    return [*(f"{option}={quoted(option, value)}" for option, value in found.items() if value), *site.options]


def _cpus(job: BatchJob, site: Site) -> int:
    return site.cpus_per_process * job.resources.nproc


def _export(item: str) -> str:
    name, _, value = item.partition("=")
    return f"{name}={shlex.quote(value)}"


def _hvtrain(site: Site) -> str:
    return site.command or shlex.join(HVTRAIN)


def submit(text: str, *, hold: bool = False) -> str:
    """The job's id."""
    command = ["sbatch", "--parsable", *(["--hold"] if hold else [])]
    try:
        done = _ask(command, SUBMIT_S, text)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"sbatch did not answer in {SUBMIT_S} s; {_PERHAPS}") from None
    return _job_id(done)


def submit_and_wait(text: str) -> int:
    """Run a job to its end; its exit code."""
    done = _ask(["sbatch", "--parsable", "--wait"], None, text)
    if done.returncode and not done.stdout.strip():
        _job_id(done)
    return done.returncode


_PERHAPS = "the job may have been accepted all the same: look at `squeue --me` before you submit it again"


def _job_id(done: subprocess.CompletedProcess) -> str:
    said = _line(done.stderr)
    if done.returncode:
        hint = ""
        if re.search("timed out|Zero Bytes", said):
            hint = f"; {_PERHAPS}"
        elif re.search("generic resource|node configuration is not available", said):
            hint = (
                "; GPUs and cores are asked for as the site file says: gpus, gres, cpus_per_process "
                "(docs/slurm.md)"
            )
        raise LaunchError(f"sbatch refused the job: {said}{hint}")
    found = re.search(r"^(\d+)(;\S+)?$", done.stdout, re.MULTILINE)
    if not found:
        raise LaunchError(f"sbatch gave no job number but {_line(done.stdout)!r}; {_PERHAPS}")
    return found[1]


@dataclass(frozen=True)
class Queue:
    """What Slurm says of jobs. A job that it has forgotten has no state; `silent`: why Slurm said nothing at
    all, and then any job may still be running."""

    # job or array task (12_3) -> "RUNNING", "PENDING (Priority)"
    states: Mapping[str, str] = field(default_factory=dict)
    silent: str = ""


def queue(ids: Sequence[str]) -> Queue:
    """Of these jobs and array tasks, and of the other tasks of their arrays. One question,
    so that the wait is bounded."""
    if not ids:
        return Queue()
    roots = sorted({i.split("_")[0] for i in ids})
    command = [
        "squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(roots)}", "--format=%i|%T|%r"
    ]
    try:
        done = _ask(command, ANSWER_S)
    except LaunchError:
        return Queue(silent="squeue is not installed here")
    except subprocess.TimeoutExpired:
        return Queue(silent=f"squeue took more than {ANSWER_S} s")
    # so it says of a single job that it has forgotten
    if done.returncode and "Invalid job id" not in done.stderr:
        return Queue(silent=_line(done.stderr) or f"squeue ended with {done.returncode}")
    rows = [line.strip().split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    return Queue(
        {name: f"{state} ({reason})" if state == "PENDING" else state for name, state, reason in rows}
    )


def cancel(ids: Sequence[str]) -> None:
    """Raises LaunchError unless Slurm has heard it. Jobs that have ended are no error."""
    if not ids:
        return
    try:
        done = _ask(["scancel", *ids], ANSWER_S)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"scancel did not answer in {ANSWER_S} s; jobs may be running still: {' '.join(ids)}"
        ) from None
    wrong = [
        line for line in done.stderr.splitlines() if not re.search("Invalid job id|already complet", line)
    ]
    if done.returncode and (wrong or not done.stderr.strip()):
        raise LaunchError(
            f"scancel: {_line(' '.join(wrong)) or 'failed'}; jobs may be running still: {' '.join(ids)}"
        )


def _ask(
    command: Sequence[str], wait_s: float | None, text: str | None = None
) -> subprocess.CompletedProcess:
    _need(command[0])
    # Its own session, so that a wrapper script ends together with what it started.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        errors="surrogateescape", start_new_session=True,
    ) as process:
        try:
            said = process.communicate(text, wait_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def topology(nproc: int) -> Topology:
    """This node's part of the job it runs in; the script has set the rendezvous."""
    try:
        n_nodes = int(os.environ["SLURM_NNODES"])
        if n_nodes == 1:
            return Topology(nproc=nproc)  # a free port is found on the spot
        return Topology(
            nproc=nproc, nnodes=n_nodes, node_rank=int(os.environ["SLURM_NODEID"]),
            master_addr=os.environ["MASTER_ADDR"], master_port=int(os.environ["MASTER_PORT"]),
        )
    except (KeyError, ValueError) as error:
        raise LaunchError(f"not inside a job that hvtrain submitted: {error} is not set") from None


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise LaunchError(
            f"{program} is not installed here: run this on a login node of the Slurm cluster, or use "
            "--dry-run"
        )
