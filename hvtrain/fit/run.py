"""What `hvtrain fit` prints."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from hvtrain.config import DataConfig, GenerateConfig, ModelConfig, ParallelConfig, SparseConfig, TrainConfig
from hvtrain.errors import ConfigError
from hvtrain.fit.estimate import (
    Candidate,
    Estimate,
    Training,
    candidate,
    degrees,
    of_sampling,
    of_training,
    placed,
    shape_of,
    sparse_line,
    with_silent,
)
from hvtrain.fit.memory import Host
from hvtrain.fit.samples import silent_share
from hvtrain.fit.search import USABLE, fits, nearest
from hvtrain.fit.trace import Shape

GIB = 2**30
DEFAULT_MEMORY_GIB = 80.0
GPUS = range(1, 9)


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    gpus: tuple[int, ...] = (1,)
    memory_gib: float | None = None  # of one GPU; None: this machine's, else 80
    width: int | None = None
    height: int | None = None
    frames: int | None = None


def training(cfg: TrainConfig, asked: Asked) -> str:
    about, memory = candidate(cfg.model), memory_bytes(asked)
    wanted = placed(sections(cfg), about, memory)
    shape = _batch(cfg.data, about, _shape(about, asked, batch=cfg.data.batch_size))
    own = cfg.parallel.ulysses * cfg.parallel.ring
    lines: list[str] = []
    for gpus in asked.gpus:
        if gpus % own:
            raise ConfigError(
                f"parallel: ulysses {cfg.parallel.ulysses} x ring {cfg.parallel.ring} does not divide {gpus} "
                f"GPU(s); give --gpus a multiple of {own}"
            )
        given = of_training(wanted, about, shape, gpus)
        lines += [] if lines else _head(about, shape, given, cfg.sparse)
        lines.append(f"\n{gpus} GPU(s) of {memory / GIB:.0f} GiB: {_legal(about, gpus, cfg.sparse)}")
        lines.append(_budget_table({"as configured": given}))
        per_step = given.flops * gpus * cfg.run.grad_accum / 1e12
        n_samples = gpus // own * shape.batch * cfg.run.grad_accum
        lines.append(
            f"a step of {n_samples} sample(s): {per_step:,.0f} TFLOP on all "
            f"GPUs{_twice(wanted.silent, shape.batch)}"
        )
        lines += [] if given.host is None else [_host_line(given.host)]
        if fits(given, memory):
            lines.append(f"fits: {given.budget.total / GIB:.1f} GiB of {USABLE * memory / GIB:.1f} usable")
            continue
        found = nearest(wanted, about, shape, gpus, memory)
        if found is None:
            lines.append(
                "does not fit, and no setting makes it fit: use more or larger GPUs, fewer frames or a "
                "smaller picture"
            )
            continue
        lines.append(f"does not fit. The nearest that does: {' '.join(found.changes)}")
        lines.append(_budget_table({"nearest": found.estimate}))
    return "\n".join(lines) + "\n"


def sampling(cfg: GenerateConfig, asked: Asked) -> str:
    about = candidate(cfg.model)
    shape = _shape(about, asked, width=cfg.width, height=cfg.height, frames=cfg.frames, batch=cfg.batch_size)
    memory = memory_bytes(asked)
    lines: list[str] = []
    for gpus in asked.gpus:
        legal = degrees(about.flavor.n_heads, gpus, cfg.sparse)
        if not legal:
            heads = about.flavor.n_heads
            raise ConfigError(
                f"--gpus {gpus}: sparse attention has no ring, and {gpus} does not divide {heads} heads"
            )
        found = {
            f"U{u} x R{r}": of_sampling(
                cfg.model, ParallelConfig(u, r), about, shape, gpus, blocks_to_swap=cfg.blocks_to_swap,
                shard_weights=cfg.shard_weights, sparse=cfg.sparse,
            )
            for u, r in legal
        }
        first = next(iter(found.values()))
        lines += [] if lines else _head(about, shape, first, cfg.sparse)
        lines += [f"\n{gpus} GPU(s) of {memory / GIB:.0f} GiB", _budget_table(found)]
        ways = "more GPUs, model.quantize=fp8_scaled, shard_weights or blocks_to_swap"
        verdict = "fits" if fits(first, memory) else f"does not fit: {ways}"
        lines.append(f"{first.flops / 1e12:,.0f} TFLOP a GPU and sampling step; {verdict}")
    return "\n".join(lines) + "\n"


def size_table(
    model: ModelConfig, *, sizes: Sequence[tuple[int, int]] = (), gpus: Sequence[int] = GPUS
) -> str:
    """Every size that the model's authors list and the flavor's latents can hold, on every number of GPUs:
    what one GPU holds and computes for a sampling step."""
    about = candidate(model)
    tall, wide = about.flavor.latent.unit
    frames = about.flavor.defaults.frames
    table = Table(
        title=f"{about.spec.name} {about.flavor.name}, {frames} frames, {model.dtype}: one sampling step"
    )
    for name in ("width x height", "tokens", "GPUs", "ulysses x ring", "GiB a GPU", "TFLOP a GPU"):
        table.add_column(name, justify="left" if name == "width x height" else "right")
    for width, height in [(w, h) for w, h in sizes or about.spec.sizes if w % wide == h % tall == 0]:
        shape = shape_of(about.flavor, width=width, height=height, frames=frames)
        for n in gpus:
            legal = degrees(about.flavor.n_heads, n)
            found = of_sampling(model, ParallelConfig(*legal[0]), about, shape, n)
            row = (
                f"{width} x {height}", f"{found.n_tokens:,}", str(n), _pairs(legal),
                f"{found.budget.total / GIB:.1f}"
            )
            table.add_row(*row, f"{found.flops / 1e12:,.0f}")
    return rendered(table)


def memory_bytes(asked: Asked) -> int:
    if asked.memory_gib is not None:
        if not 0 < asked.memory_gib < float("inf"):
            raise ConfigError(f"--memory is {asked.memory_gib:g}, expected a GPU's memory in GiB")
        return int(asked.memory_gib * GIB)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return int(DEFAULT_MEMORY_GIB * GIB)


def advice(cfg: TrainConfig, asked: Asked) -> str:
    """One line for a run that went out of memory: the nearest config whose prediction fits."""
    about = candidate(cfg.model)
    shape = _batch(cfg.data, about, _shape(about, asked, batch=cfg.data.batch_size))
    found = nearest(
        placed(sections(cfg), about, memory_bytes(asked)), about, shape, asked.gpus[0], memory_bytes(asked)
    )
    if found is None:
        return "no setting makes it fit: use more or larger GPUs, or smaller clips"
    if not found.changes:
        total = found.estimate.budget.total / GIB
        return (
            f"`hvtrain fit` says that {total:.1f} GiB would do, so something else uses this GPU, or try "
            "run.recompute=offload"
        )
    return f"what would fit: {' '.join(found.changes)} ({found.estimate.budget.total / GIB:.1f} GiB a GPU)"


def sections(cfg: TrainConfig) -> Training:
    silent = silent_share(cfg.data)
    return Training(
        cfg.model, cfg.adapter, cfg.parallel, cfg.zero, cfg.run, cfg.optim.name, cfg.sparse, silent
    )


def _twice(silent: float, batch: int) -> str:
    share = with_silent(silent, batch)
    return f", with a second forward pass in {share:.0%} of the micro-steps (silent samples)" if share else ""


def _shape(about: Candidate, asked: Asked, *, batch: int, **own: int | None) -> Shape:
    """`own`: of the config, where --size does not say."""
    try:
        shape_of(about.flavor, width=asked.width, height=asked.height, frames=asked.frames)
    except ConfigError as error:
        raise ConfigError(f"--size: {error}") from None
    size = {name: getattr(asked, name) or own.get(name) for name in ("width", "height", "frames")}
    return shape_of(about.flavor, batch=batch, **size)


def _batch(data: DataConfig, about: Candidate, shape: Shape) -> Shape:
    """With as many samples as data.batch_tokens allows."""
    if data.batch_tokens is None:
        return shape
    latent = about.flavor.latent
    n_tokens = latent.n_tokens(latent.shape(frames=shape.frames, height=shape.height, width=shape.width))
    return replace(shape, batch=max(1, data.batch_tokens // n_tokens))


def _head(about: Candidate, shape: Shape, found: Estimate, sparse: SparseConfig) -> list[str]:
    text = " + ".join(str(field.longest) for field in about.flavor.cond if field.ragged and field.longest)
    what = f"{about.spec.name} {about.flavor.name}, {shape.width} x {shape.height} x {shape.frames} frames"
    head = f"{what}: {found.n_tokens:,} image tokens" + (f" and {text} of text" if text else "")
    return [head, *([sparse_line(sparse, about, shape)] if sparse.pattern != "none" else [])]


def _legal(about: Candidate, gpus: int, sparse: SparseConfig) -> str:
    heads = about.flavor.n_heads
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    found = [f"{size}: {_pairs(legal)}" for size in sizes if (legal := degrees(heads, size, sparse))]
    return f"legal ulysses x ring by GPUs a sample ({heads} heads): " + "; ".join(found)


def _pairs(legal: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{u}x{r}" for u, r in legal)


def _budget_table(found: dict[str, Estimate]) -> str:
    table = Table("GiB a GPU", *found)
    for part in next(iter(found.values())).budget.parts():
        table.add_row(part, *(f"{e.budget.parts()[part] / GIB:.2f}" for e in found.values()))
    table.add_row("worst moment", *(f"{e.budget.total / GIB:.2f}" for e in found.values()), style="bold")
    return rendered(table)


def _host_line(host: Host) -> str:
    gib = [n / GIB for n in (host.load, host.save, host.resident)]
    return (
        f"host memory: rank 0 {gib[0]:.1f} GiB while it loads, {gib[1]:.1f} while it saves; each rank "
        f"{gib[2]:.1f} always"
    )


def rendered(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue().rstrip("\n")


