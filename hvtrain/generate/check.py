"""What would end a generation late, found before weights are read: the headers of all
parts, memory, and the output."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from hvtrain.config import ModelConfig
from hvtrain.errors import CheckpointError, ConfigError, DataError, HvtrainError
from hvtrain.generate.requests import Job
from hvtrain.models.parts import open_text, open_vae
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext

T = TypeVar("T")
# [B S E] of a block that are there at once: the residual stream, what goes into attention, and q, k, v
_BLOCK_TENSORS = 5
_VIDEO_BYTES = 3 * 4 * 2  # of a decoded pixel: float32 RGB, before and after it is clamped
_COMPRESSED = 100  # a file is hardly smaller than this part of its pixels


def on_main(ctx: ParallelContext, act: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; a user's mistake that it finds is raised on every rank.
    Collective."""
    answer: tuple[T | None, HvtrainError | None] = None, None
    if ctx.is_main:
        try:
            answer = act(), None
        except HvtrainError as error:
            answer = None, error
    found, mistake = ctx.gather_objects(answer)[0]
    if mistake is not None:
        raise mistake
    return found


def check_parts(model: ModelConfig, spec: ModelSpec, flavor: Flavor) -> dict[str, str]:
    """Fingerprints of "vae" and "text"; of their files only the headers are read, and single values.

    Raises CheckpointError for a damaged file, one of something else, or one of another model's latents.
    """
    nowhere = torch.device("meta")
    vae = open_vae(spec, model, nowhere)
    own = (flavor.latent.stride_t, flavor.latent.stride_h, flavor.latent.stride_w)
    if (vae.channels, vae.stride) != (flavor.latent.channels, own):
        raise CheckpointError(
            f"model.vae: {model.vae} has latents of {vae.channels} channels, "
            f"{' x '.join(map(str, vae.stride))} smaller than the video; those of {flavor.name} have "
            f"{flavor.latent.channels}, {' x '.join(map(str, own))} smaller"
        )
    return {"vae": vae.fingerprint, "text": open_text(spec, model, nowhere, flavor).fingerprint}


def least_bytes(
    batch: Sequence[Job], flavor: Flavor, layers: Mapping[str, tuple[int, int]], *, sp: int, n_bytes: int
) -> int:
    """What one rank cannot do without to make these videos together: hidden states of a block with
    values of `n_bytes`, or one decoded video. The weights are not counted, and no kernel's buffers:
    what is above this fits nowhere."""
    r = batch[0].request
    shape = flavor.latent.shape(frames=r.frames, height=r.height, width=r.width)
    width = Counter(n_in for _, n_in in layers.values()).most_common(1)[0][0]
    tokens = len(batch) * flavor.latent.n_tokens(shape)
    sampling = tokens * width * n_bytes * max(1, _BLOCK_TENSORS / sp)  # embedded whole, then cut
    return int(max(sampling, r.frames * r.height * r.width * _VIDEO_BYTES))


def check_memory(
    batches: Sequence[Sequence[Job]], flavor: Flavor, layers: Mapping[str, tuple[int, int]], *, n_bytes: int,
    ctx: ParallelContext,
) -> None:
    """Refuse what no setting could make fit."""
    there = ctx.memory_bytes
    for batch in batches:
        least = least_bytes(batch, flavor, layers, sp=ctx.sp, n_bytes=n_bytes)
        if least <= there:
            continue
        r, name = batch[0].request, batch[0].output.name
        n_tokens = flavor.latent.n_tokens(
            flavor.latent.shape(frames=r.frames, height=r.height, width=r.width)
        )
        together = f" ({len(batch)} together)" if len(batch) > 1 else ""
        raise ConfigError(
            f"{name}: {r.width} x {r.height} x {r.frames} frames{together} are {n_tokens:,} image tokens "
            f"each and need at least {_size(least)} besides the weights; {ctx.device} has {_size(there)}. "
            "Lower width, height or frames, or share a video among more processes (parallel.ulysses, "
            "parallel.ring)"
        )


def check_outputs(
    jobs: Sequence[Job], flavor: Flavor, *, n_sampled: int, decode: str, size: int, ctx: ParallelContext
) -> None:
    """Try every folder, and ask for the room that `n_sampled` of the videos need at least.
    Collective. Raises DataError."""
    problem = None
    try:
        for folder in dict.fromkeys(job.output.parent for job in jobs):
            _try_folder(folder, ctx.rank)
            problem = (
                problem or _no_room(
                    folder, jobs, flavor, n=min(n_sampled, size) if decode == "each" else n_sampled
                )
            )
        problem = problem or next(
            (
                f"output: {job.output} is a directory; give the name of a file"
                for job in jobs if job.output.is_dir()
            ), None
        )
    except OSError as error:
        problem = f"output: {error.filename or jobs[0].output.parent} cannot be written ({error.strerror})"
    problem = next((found for found in ctx.gather_objects(problem) if found), None)
    if problem:
        raise DataError(problem)


def _try_folder(folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".hvtrain-{os.getpid()}-{rank}.tmp"
    try:
        probe.write_bytes(b"can be written")
    finally:
        if probe.exists():  # unlink would complain of a read-only disk, and hide why
            probe.unlink()


def _no_room(folder: Path, jobs: Sequence[Job], flavor: Flavor, *, n: int) -> str | None:
    """The latents of n videos lie on the disk at a time; the videos stay."""
    need = 0
    for i, job in enumerate(jobs):
        r = job.request
        channels, t, h, w = flavor.latent.shape(frames=r.frames, height=r.height, width=r.width)
        need += r.frames * r.height * r.width * 3 // _COMPRESSED + (4 * channels * t * h * w if i < n else 0)
    free = shutil.disk_usage(folder).free
    if need <= free:
        return None
    return (
        f"output: {folder} has {_size(free)} free; the latents and {len(jobs)} file(s) need at least "
        f"{_size(need)}"
    )


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} GiB"
