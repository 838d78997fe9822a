"""`hvtrain doctor`: what this machine has, and what of it would stop a run. Imports nothing that it looks at."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from launcher.report import USER_ERROR

NEEDED = (
    "torch",
    "deepspeed",
    "transformers",
    "diffusers",
    "safetensors",
    "webdataset",
    "yunchang",
    "einops",
    "av",
    "tensorboard",
    "pyyaml",
    "rich",
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
    yield Finding("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
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
        yield Finding(name, version or "not installed", "" if version else f"pip install {name}", fatal=not version)
    faster = [f"{name} {version}" for name in FASTER if (version := _version(name))]
    yield Finding("fast attention", ", ".join(faster) or "none: PyTorch's own kernels")


def _gpus() -> Iterator[Finding]:
    """Asked of the driver, not of torch: a torch that cannot see the GPU is one of the things to find."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        yield Finding("GPU", "none: runs on the CPU")
        return
    if answer.returncode:
        yield Finding("GPU", "nvidia-smi fails", f"mend the driver: {answer.stdout.strip() or answer.stderr.strip()}")
        return
    gpus = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    for gpu in gpus:
        yield Finding("GPU", gpu)
    torch = _version("torch") or ""
    if gpus and torch.endswith("+cpu"):
        yield Finding("torch build", torch, "it has no CUDA: pip install torch from the CUDA index, see docs/install.md")


def count_gpus() -> int:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len([line for line in done.stdout.splitlines() if line.startswith("GPU")]) if done.returncode == 0 else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
