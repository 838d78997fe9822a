"""What a generation will do: all that can be known, and refused, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import ModelConfig, SparseConfig, asset
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.flow.solvers import SOLVERS
from hvtrain.generate import spool
from hvtrain.generate.check import check_parts
from hvtrain.generate.conditions import check_own_columns, read_image
from hvtrain.generate.identity import Sources, sources_of
from hvtrain.generate.loras import Applied
from hvtrain.generate.low import check_low
from hvtrain.generate.requests import Job, Request
from hvtrain.generate.video import read_metadata
from hvtrain.models.dit import DiT
from hvtrain.models.kernels import pick_kernel
from hvtrain.models.load import Identified, float8_shapes, identify, whole_model
from hvtrain.models.parts import open_enlarger
from hvtrain.models.sparse import check_sparse, pick_sparse
from hvtrain.models.spec import Expert, Flavor, ModelSpec
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.apply import EXACT
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.products import pick_products
from hvtrain.parallel.swap import swap_savings
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.float8 import NO_PRODUCTS, Chosen

DIT = "dit"  # the part that every model has


@dataclass(frozen=True)
class Dits:
    """The DiT that samples, or several experts, told from their headers."""

    spec: ModelSpec
    flavor: Flavor
    files: Mapping[str, Identified]  # by part: "dit", and where there are experts each one's
    layers: dict[str, tuple[int, int]]  # [out, in] of every Linear, alike in all of them
    empty: DiT  # on the meta device


@dataclass(frozen=True)
class Compute:
    """How a DiT computes."""

    precision: str
    kernel: str
    blocks_to_swap: int = 0
    shard_weights: bool = False
    sparse: SparseConfig = EXACT
    float8: Chosen = field(default_factory=dict)  # layers that multiply in float8

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Lot:
    """Videos that are sampled together, from `step` on: 0, or where a run before was stopped,
    or all: only to be decoded."""

    jobs: list[Job]
    step: int

    @property
    def n_left(self) -> int:
        return self.jobs[0].request.steps - self.step


@dataclass(frozen=True)
class Plan:
    """What to make with what."""

    model: ModelConfig
    dits: Dits
    compute: Compute
    loras: list[Applied]
    sources: Sources
    jobs: list[Job]
    lots: list[Lot]  # what is left to do; each group of ranks takes every dp-th

    @property
    def spec(self) -> ModelSpec:
        return self.dits.spec

    @property
    def flavor(self) -> Flavor:
        return self.dits.flavor


def phases(flavor: Flavor) -> list[Expert | None]:
    """Who predicts, from noise on; one DiT for all is None."""
    return [*sorted(flavor.experts, key=lambda expert: -expert.sigmas[0])] or [None]


def last_step(request: Request, expert: Expert | None) -> int:
    """How many of its steps are done when this expert, and those of more noise, have done theirs."""
    if expert is None:
        return request.steps
    levels = SOLVERS[request.solver].schedule(request.steps, shift=request.shift)[:-1].tolist()
    return sum(level >= expert.sigmas[0] for level in levels)


def open_headers(model: ModelConfig) -> Dits:
    """Of the DiTs. Raises ConfigError for an expert that is not given,
    CheckpointError for files that do not fit."""
    found = identify(asset(str(model.dit)), model=model.name, flavor=model.flavor)
    flavor = found.flavor
    files = {DIT: found}
    for expert in flavor.experts:
        if expert.part in files:
            continue
        path = model.file(expert.part)
        if path is None:
            about = found.spec.parts[expert.part].about
            raise ConfigError(
                f"model.{expert.part} is not set; '{flavor.name}' samples with it too ({about})"
            )
        other = files[expert.part] = identify(asset(path), model=found.spec.name, flavor=model.flavor)
        if other.arch != found.arch:
            raise CheckpointError(
                f"model.{expert.part}: {path} has other sizes than model.dit, {model.dit}: not of one model"
            )
    for expert in flavor.experts:
        flavor.check_file(expert, files[expert.part].path)
    # all: their tensors are compared in it
    empty, *_ = [whole_model(one).requires_grad_(False) for one in files.values()]
    return Dits(found.spec, flavor, files, linear_shapes(empty), empty)


def find_sources(
    dits: Dits, model: ModelConfig, loras: Sequence[Applied], jobs: Sequence[Job], *, precision: str,
    sparse: SparseConfig = EXACT, float8: Chosen = NO_PRODUCTS,
) -> Sources:
    """Of all parts the headers are read, and single values; of each image the picture."""
    prints: dict[str, Any] = {part: fingerprint(found.weights) for part, found in dits.files.items()}
    prints |= {"flavor": dits.flavor.name, **check_parts(model, dits.spec, dits.flavor)}
    shown = {path: job.request for job in jobs for path in job.request.images.values()}
    if shown or not dits.flavor.image_optional:
        prints |= {
            f"column {name}": value for name,
            value in check_own_columns(dits.spec, dits.flavor, model).items()
        }
    for path, request in shown.items():
        read_image(path, width=request.width, height=request.height)
    if dits.flavor.enlarges:
        prints["enlarger"] = open_enlarger(dits.spec, model, torch.device("meta"), dits.flavor).fingerprint
    for request in (job.request for job in jobs if job.request.video is not None):
        check_low(str(request.video), request, dits.spec, dits.flavor)
        shown[str(request.video)] = request
    if sparse.sampled:
        prints["sparse"] = sparse.sampled
    return sources_of(model, loras, prints, precision=precision, images=list(shown), float8=float8)


def remaining(grouped: list[list[Job]], sources: Sources, *, save_latents: bool = False) -> list[Lot]:
    """What of the batches is still to do. Batches stay as they are, so that a video does not depend on how
    often the run was stopped; only what a run before has carried to other steps is apart."""
    lots = []
    for batch in grouped:
        steps = {}
        for job in batch:
            if _is_there(job, sources):
                # of a run that was killed after it had written the file
                spool.forget(job.output, save=save_latents)
                continue
            kept = spool.find(job.output, sources.latents(job.request))
            steps[job.output] = kept.step if kept else 0
        left = sorted((job for job in batch if job.output in steps), key=lambda job: steps[job.output])
        lots += [Lot(list(group), step) for step, group in groupby(left, key=lambda job: steps[job.output])]
    return lots


def _is_there(job: Job, sources: Sources) -> bool:
    """Whether the file is what this run would make."""
    try:
        return (
            job.output.is_file() and read_metadata(job.output).get("identity") == sources.video(job.request)
        )
    except DataError:
        return False


def pick_float8(
    dits: Dits, model: ModelConfig, jobs: Sequence[Job], size: int, ctx: ParallelContext, *,
    dtype: torch.dtype,
) -> Chosen:
    """Which layers multiply in float8, for batches of `size` of the largest of these videos. Collective."""
    shapes = set().union(*(float8_shapes(found, model.quantize) for found in dits.files.values()))
    longest = max(map(dits.flavor.latent.n_tokens, latent_shapes(jobs, dits.flavor)))
    return pick_products(
        model.fp8_matmul, shapes, ctx, dtype=dtype, tokens=longest * size // ctx.sp, learns=False,
        factors=model.quantize != "fp8",
    )


def latent_shapes(jobs: Sequence[Job], flavor: Flavor) -> list[tuple[int, int, int, int]]:
    """Latents [C T H W] of each video."""
    requests = [job.request for job in jobs]
    return [flavor.latent.shape(frames=r.frames, height=r.height, width=r.width) for r in requests]


def check_placing(compute: Compute, model: DiT, ctx: ParallelContext) -> None:
    """Kernel and swap are refused here as they would be with the weights in memory."""
    if compute.kernel == xfuser_path.NAME:
        xfuser_path.refuse(ctx, training=False)
    else:
        dense = pick_kernel(compute.kernel, device=ctx.device, dtype=compute.dtype, training=False)
        pick_sparse(compute.sparse, dense=dense, device=ctx.device, dtype=compute.dtype, training=False)
    check_sparse(compute.sparse, model, ring=ctx.ring, kernel=compute.kernel)
    if compute.blocks_to_swap:
        swap_savings(model.blocks, compute.blocks_to_swap)


def dit_names(plan: Plan) -> str | dict[str, str]:
    """The file, or each expert's."""
    names = {part: Path(str(plan.model.file(part))).name for part in plan.dits.files}
    return names if len(names) > 1 else names[DIT]
