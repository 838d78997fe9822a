"""From a job's description to sbatch text to a job id; and what Slurm says of jobs later."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvtrain.errors import LaunchError
from hvtrain.program import HVTRAIN
from launcher.local import Topology
from launcher.site import Site

TEMPLATES = Path(__file__).resolve().parents[1] / "slurm"


@dataclass(frozen=True)
class Resources:
    """Of one job."""

    nodes: int = 1
    nproc: int = 1  # processes per node
    time: str = ""  # wins over the site's
    gpus: bool = True  # ask for them as the site says


@dataclass(frozen=True)
class Job:
    template: str  # job, array or merge
    name: str
    folder: Path  # where it runs
    log: str  # with Slurm's own %-signs
    command: Sequence[str]  # of hvtrain
    resources: Resources
    extra: Mapping[str, str] | None = None  # further placeholders: array, dependency


def render(job: Job, site: Site) -> str:
    """The sbatch script. A placeholder without a value is a bug, not an empty line."""
    values = {
        "name": job.name, "nodes": str(job.resources.nodes), "log": job.log, "grace": str(site.grace_s),
        "folder": shlex.quote(str(job.folder)), "options": "\n".join(f"#SBATCH {o}" for o in _options(job, site)),
        "setup": "\n".join([*(f"module load {m}" for m in site.modules), *site.setup]),
        "environment": "\n".join(f"export {_export(item)}" for item in site.environment),
        "srun": f"--cpus-per-task={n}" if (n := _cpus(job, site)) else "",
        "command": " ".join([*([site.prefix] if site.prefix else []), _hvtrain(site), *map(shlex.quote, job.command)]),
        **(job.extra or {}),
    }
    path = TEMPLATES / f"{job.template}.sbatch"
    if not path.is_file():
        raise LaunchError(f"{path} is missing: jobs are submitted from a checkout of the repository")
    text = re.sub(r"@\{(\w+)\}", lambda match: values[match[1]], path.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def _options(job: Job, site: Site) -> list[str]:
    """sbatch options that the site or the job sets."""
    found = {
        "--partition": site.partition, "--account": site.account, "--qos": site.qos, "--constraint": site.constraint,
        "--time": job.resources.time or site.time, "--mem": site.mem,
        "--cpus-per-task": str(_cpus(job, site) or ""),
    }
    if job.resources.gpus and job.template != "merge":
        found["--gres"] = site.gres.replace("{n}", str(job.resources.nproc))
        found["--gpus-per-node"] = str(job.resources.nproc) if site.gpus_per_node else ""
    return [*(f"{option}={value}" for option, value in found.items() if value), *site.options]


def _cpus(job: Job, site: Site) -> int:
    return site.cpus_per_process * (job.resources.nproc if job.template != "merge" else 1)


def _export(item: str) -> str:
    name, _, value = item.partition("=")
    return f"{name}={shlex.quote(value)}"


def _hvtrain(site: Site) -> str:
    return site.command or shlex.join(HVTRAIN)


def submit(text: str, *, hold: bool = False) -> str:
    """The job's id."""
    _need("sbatch")
    command = ["sbatch", "--parsable", *(["--hold"] if hold else [])]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def submit_and_wait(text: str) -> int:
    """Run a job to its end; its exit code."""
    _need("sbatch")
    done = subprocess.run(["sbatch", "--parsable", "--wait"], input=text, capture_output=True, text=True)
    if done.returncode and not done.stdout.strip():
        raise LaunchError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.returncode


def states(ids: Sequence[str]) -> dict[str, str]:
    """Job or array task (12_3) -> Slurm's word for its state; one that Slurm has forgotten is absent."""
    if not ids or shutil.which("squeue") is None:
        return {}
    roots = sorted({i.split("_")[0] for i in ids})
    found: dict[str, str] = {}
    for root in roots:
        done = subprocess.run(["squeue", "-h", "-r", "-j", root, "-o", "%i %T %r"], capture_output=True, text=True, timeout=60)
        for line in done.stdout.splitlines():
            name, state, *reason = line.split(None, 2)
            found[name] = f"{state} ({reason[0]})" if reason and state == "PENDING" else state
    for name in ids:
        if name not in found and (state := _shown(name)):
            found[name] = state
    return found


def _shown(name: str) -> str:
    """Of a job that has ended, while the controller remembers it."""
    done = subprocess.run(["scontrol", "show", "job", "-o", name], capture_output=True, text=True, timeout=60)
    match = re.search(r"JobState=(\S+)", done.stdout)
    return match[1] if match else ""


def cancel(ids: Sequence[str]) -> None:
    if ids:
        _need("scancel")
        subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=60)


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
        raise LaunchError(f"{program} is not installed here: run this on a login node of the Slurm cluster, or use --dry-run")
