"""`hvtrain doctor`: what this machine has, and what of it would stop a run.
Imports nothing that it looks at."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from launcher.exits import USER_ERROR
from launcher.processes import cores

NEEDED = (
    "torch", "deepspeed", "transformers", "diffusers", "safetensors", "webdataset", "yunchang", "einops",
    "av", "tensorboard", "pyyaml", "rich",
)
FASTER = ("flash-attn", "flash-attn-3", "xfuser", "sageattention")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    advice: str = ""  # empty: all is well
    fatal: bool = False


def run() -> int:
    findings = [*_system(), *_packages(), *_gpus()]
    for f in findings:
        mark = "ok" if not f.advice else "MISSING" if f.fatal else "note"
        print(f"{mark:8}{f.name:16}{f.found}" + (f"  -> {f.advice}" if f.advice else ""))
    return USER_ERROR if any(f.fatal for f in findings) else 0


def _system() -> Iterator[Finding]:
    old = sys.version_info < (3, 10)
    yield Finding("python", platform.python_version(), "3.10 or newer is needed" if old else "", fatal=old)
    scarce = cores() < 2 * count_gpus()
    yield Finding(
        "cores", str(cores()),
        "fewer than 2 for each GPU: ask for more (Slurm: cpus_per_process)" if scarce else ""
    )
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        yield Finding("memory", f"{memory:.0f} GiB")
    yield Finding("disk, here", f"{shutil.disk_usage('.').free / GIB:.0f} GiB free")
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").free / GIB
        few = "NCCL wants at least 1 GiB: docker run --shm-size=8g" if shared < 1 else ""
        yield Finding("/dev/shm", f"{shared:.1f} GiB free", few)


def _packages() -> Iterator[Finding]:
    for name in NEEDED:
        version = _version(name)
        yield Finding(
            name, version or "not installed", "" if version else f"pip install {name}", fatal=not version
        )
    faster = [f"{name} {version}" for name in FASTER if (version := _version(name))]
    yield Finding("fast attention", ", ".join(faster) or "none: PyTorch's own kernels")


def _gpus() -> Iterator[Finding]:
    """Asked of the driver, not of torch: a torch that cannot see the GPU is one of the things to find."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    given = os.environ.get("SLURM_JOB_GPUS")
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        answer = None
    if answer is None or (answer.returncode == 0 and not answer.stdout.strip()):
        lost = "nvidia-smi finds none: the container or the node lacks NVIDIA's driver" if given else ""
        yield Finding(
            "GPU", f"Slurm gave {given}" if given else "none: runs on the CPU", lost, fatal=bool(given)
        )
        return
    if answer.returncode:
        yield Finding(
            "GPU", "nvidia-smi fails", f"mend the driver: {answer.stdout.strip() or answer.stderr.strip()}"
        )
        return
    gpus = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    for gpu in gpus:
        yield Finding("GPU", gpu)
    torch = _version("torch") or ""
    if gpus and torch.endswith("+cpu"):
        yield Finding(
            "torch build", torch, "it has no CUDA: install PyTorch's CUDA build, see docs/install.md",
            fatal=True
        )
    elif expected := count_gpus():
        yield _torch_sees(expected)


def _torch_sees(expected: int) -> Finding:
    """Asked in a process of its own: torch takes seconds to load, and a broken one
    may take its process with it."""
    program = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    seen = int(done.stdout.split()[-1]) if done.returncode == 0 else 0
    if seen >= expected:
        return Finding("torch sees", f"{seen} GPU(s)")
    said = " ".join((done.stderr.strip().splitlines() or ["nothing was said"])[-1].split())
    advice = f"a driver that is too old for this build of PyTorch, or a container without --gpus: {said}"
    return Finding("torch sees", f"{seen} of {expected} GPU(s)", advice, fatal=seen == 0)


def count_gpus() -> int:
    """The GPUs that processes started here will find, by the driver and CUDA_VISIBLE_DEVICES."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    n = (
        len([line for line in done.stdout.splitlines() if line.startswith("GPU")])
        if done.returncode == 0 else 0
    )
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        n if chosen is None
        else min(n, len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
