"""A run that went out of memory says what would fit, instead of a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hvtrain.config import TrainConfig, load
from hvtrain.errors import HvtrainError
from hvtrain.models.spec import Flavor
from hvtrain.parallel.context import ParallelContext, without_job

_SECONDS = 300
_PROGRAM = "import sys; from hvtrain.fit.oom import main; main(*sys.argv[1:])"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def explained(
    error: BaseException, config: str, ctx: ParallelContext, flavor: Flavor | None, latents: Sequence[int]
) -> HvtrainError:
    """The error to raise instead. `config`: the training's, as YAML; `latents`: the shape [B C T H W] of the
    batch at hand, empty if there was none yet.

    The search is made by a process of its own: this one has no memory left, and its process groups are real.
    """
    memory = ctx.memory_bytes if ctx.device.type == "cuda" else ctx.memory_bytes // ctx.world
    size = "0x0x0"
    if flavor is not None and len(latents) == 5:
        geometry = flavor.latent
        frames = (latents[2] - 1) * geometry.stride_t + 1
        size = f"{latents[4] * geometry.stride_w}x{latents[3] * geometry.stride_h}x{frames}"
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config)
        command = [sys.executable, "-c", _PROGRAM, str(path), str(ctx.world), str(memory / 2**30), size]
        try:
            done = subprocess.run(
                command, env=without_job(), capture_output=True, text=True, timeout=_SECONDS, check=False
            )
            advice = (
                done.stdout.strip()
                or f"`hvtrain fit` could not tell what would fit: {done.stderr.strip()[-300:]}"
            )
        except (OSError, subprocess.TimeoutExpired):
            advice = "see `hvtrain fit` for what would fit"
    where = (
        "this machine" if ctx.device.type == "cpu" else f"GPU {ctx.device.index} ({memory / 2**30:.0f} GiB)"
    )
    at = f" with clips of {size}" if size != "0x0x0" else " before the first step"
    return HvtrainError(
        f"out of memory on {where}{at}; {advice}. What was asked for: {str(error).splitlines()[0][:200]}"
    )


def main(config: str, gpus: str, memory_gib: str, size: str) -> None:
    """In the process that searches."""
    from hvtrain.fit.run import Asked, advice

    width, height, frames = (int(n) or None for n in size.split("x"))
    print(advice(load(TrainConfig, config), Asked((int(gpus),), float(memory_gib), width, height, frames)))
