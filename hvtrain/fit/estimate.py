"""From a config to a budget: build the model without values, trace a step as one rank of the
job, add what the engine keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hvtrain.adapters.attach import add_adapter, linear_shapes, trained
from hvtrain.config import (
    AdapterConfig,
    ModelConfig,
    ParallelConfig,
    RunSettings,
    SparseConfig,
    ZeroConfig,
    asset,
)
from hvtrain.config.model import BOTH
from hvtrain.errors import ConfigError
from hvtrain.fit.memory import Budget, Host, Layout, beside, budget, host
from hvtrain.fit.trace import Shape, Trace, byte_counts, fake_input, simulated, trace_step
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.load import identify
from hvtrain.models.sparse_flex import Blocks
from hvtrain.models.sparse_masks import kept_share, pattern_of
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import EXACT
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.swap import shard_savings, swap_savings
from hvtrain.slices.plan import Cut, SlicePlan, load_plan, make_plan
from hvtrain.train.optim import state_bytes
from hvtrain.train.setup import part_of
from hvtrain.weights.float8 import BLOCK, DTYPE, Products, replace_linear, use_products

MACHINE = 8  # GPUs with fast links among them


@dataclass(frozen=True)
class Candidate:
    """A model that is only talked about."""

    spec: ModelSpec
    flavor: Flavor


@dataclass(frozen=True)
class Training:
    """The sections of a training config that decide memory."""

    model: ModelConfig
    adapter: AdapterConfig
    parallel: ParallelConfig
    zero: ZeroConfig
    run: RunSettings
    optimizer: str = "adamw"
    sparse: SparseConfig = EXACT
    silent: float = 0.0  # share of samples on which the adapter shall change nothing


@dataclass(frozen=True)
class Estimate:
    """One rank of a job."""

    budget: Budget
    flops: int  # of one rank in one micro-step or sampling step
    n_tokens: int  # image tokens of one sample
    host: Host | None = None  # of a full fine-tune


def candidate(model: ModelConfig) -> Candidate:
    """The flavor that a config means; of the weights only the headers are read, if there are any. Of several
    experts the one that is named, which is trained, else the largest: one is computed with at a time."""
    spec = find(model.name)
    one = model.experts not in (None, BOTH)
    parts = {part_of(model)} if one else {"dit", *(e.part for f in spec.flavors.values() for e in f.experts)}
    paths = [path for part in sorted(parts) if (path := model.file(part))]
    if not paths:
        return Candidate(spec, spec.flavor(model.flavor))
    found = [identify(asset(path), model=model.name, flavor=model.flavor) for path in paths]
    largest = max(found, key=lambda one: sum(map(math.prod, one.shapes.values())))
    return Candidate(largest.spec, largest.flavor)


def degrees(heads: int, gpus: int, sparse: SparseConfig = EXACT) -> list[tuple[int, int]]:
    """Every (Ulysses, ring) over all `gpus`: Ulysses must divide the heads, the ring takes any number. The
    fastest first: Ulysses as far as one machine reaches, whose all-to-all nothing hides, and between machines
    a ring, whose messages attention hides. Sparse attention has no ring."""
    legal = [(u, gpus // u) for u in range(gpus, 0, -1) if gpus % u == 0 and heads % u == 0]
    legal = [(u, r) for u, r in legal if r == 1 or sparse.pattern == "none"]
    return sorted(legal, key=lambda one: one[0] > MACHINE)


def of_training(cfg: Training, about: Candidate, shape: Shape, gpus: int) -> Estimate:
    """One rank of `gpus`, on CUDA, where a full fine-tune's gradients are reduced
    while the backward goes on."""
    with simulated(world=gpus, ulysses=cfg.parallel.ulysses, ring=cfg.parallel.ring) as ctx:
        model = _build(cfg, about)
        freed = (
            0 if cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3
            else _freed(model, cfg.run.blocks_to_swap)
        )
        layout = Layout(
            cfg.zero, gpus, overlap=cfg.adapter.type == "none", freed_by_swap=freed,
            state_bytes=state_bytes(cfg.optimizer)
        )
        step = partial(
            trace_step, model, fake_input(about.spec, about.flavor, shape), ctx=ctx,
            recompute=cfg.run.recompute, autocast=cfg.run.precision == "bf16",
            keep_gradients=layout.keeps_gradients, sparse=cfg.sparse,
        )
        trace = step()
        if cfg.silent and cfg.adapter.type != "none":
            trace = _now_and_then(trace, step(silent=True), with_silent(cfg.silent, shape.batch))
        counts, idle = byte_counts(model), len(about.flavor.experts) - 1 if cfg.model.experts == BOTH else 0
        found = beside(
            budget(counts, trace, layout), counts, layout, n=idle, on_host=cfg.run.idle_expert == "host"
        )
        whole, largest = cfg.adapter.type == "none", max(4 * p.numel() for p in model.parameters())
        return Estimate(
            found, trace.flops, _n_tokens(about, shape), host(counts, largest, layout) if whole else None
        )


def with_silent(share: float, batch: int) -> float:
    """Share of micro-steps with another forward pass: those in which a sample of the batch is
    silent, if they are drawn alone."""
    return 1 - (1 - share) ** batch


def _now_and_then(usual: Trace, other: Trace, share: float) -> Trace:
    """Memory for the worse of two kinds of micro-steps, and the operations of their mean."""
    worst = max(usual, other, key=lambda one: one.peak_bytes)
    return replace(worst, flops=round(usual.flops + share * (other.flops - usual.flops)))


def placed(cfg: Training, about: Candidate, memory: int) -> Training:
    """With what the run would make of idle_expert `auto` on a device of so many bytes."""
    whole, stage3 = cfg.adapter.type == "none", cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3
    if cfg.run.idle_expert != "auto" or cfg.model.experts != BOTH or whole or stage3:
        return cfg
    with simulated(world=1, ulysses=1, ring=1):
        model = _build(cfg, about)
    host = 2 * byte_counts(model)["frozen"] * len(about.flavor.experts) > memory
    return replace(cfg, run=replace(cfg.run, idle_expert="host" if host else "device"))


def swap_for(cfg: Training, about: Candidate, excess: int) -> int | None:
    """The fewest blocks whose swap frees `excess` bytes more than the config's own does; None if none do."""
    with simulated(world=1, ulysses=1, ring=1):
        model = _build(cfg, about)
        wanted = excess + _freed(model, cfg.run.blocks_to_swap)
        for n in range(cfg.run.blocks_to_swap + 1, len(model.blocks) + 1):
            try:
                if swap_savings(model.blocks, n) >= wanted:
                    return n
            except ConfigError:
                return None
    return None


def of_sampling(
    model: ModelConfig, parallel: ParallelConfig, about: Candidate, shape: Shape, gpus: int, *,
    blocks_to_swap: int = 0, shard_weights: bool = False, sparse: SparseConfig = EXACT,
) -> Estimate:
    """One sampling step of one rank; a second pass of classifier-free guidance costs as
    much again, not more memory."""
    with simulated(world=gpus, ulysses=parallel.ulysses, ring=parallel.ring) as ctx:
        dit = empty_model(about, getattr(torch, model.dtype)).requires_grad_(False)
        _quantize(dit, about.spec, model)
        inp = fake_input(about.spec, about.flavor, shape)
        trace = trace_step(dit.eval(), inp, ctx=ctx, training=False, sparse=sparse)
        freed = (
            shard_savings(dit.blocks, ctx.sp) if shard_weights and ctx.sp > 1 else _freed(dit, blocks_to_swap)
        )
        layout = Layout(world=gpus, freed_by_swap=freed)
        return Estimate(budget(byte_counts(dit), trace, layout), trace.flops, _n_tokens(about, shape))


def flops_of_sample(cfg: Training, about: Candidate, shape: Shape) -> int:
    """Forward and backward on one device with nothing recomputed; also inside a job,
    whose ranks it does not touch."""
    with FakeTensorMode():
        model = _build(replace(cfg, model=replace(cfg.model, quantize="none")), about)
        return trace_step(model, fake_input(about.spec, about.flavor, shape), ctx=ParallelContext()).flops


def shape_of(
    flavor: Flavor, *, width: int | None = None, height: int | None = None, frames: int | None = None,
    batch: int = 1
) -> Shape:
    """Of the flavor's own size where none is given. Raises ConfigError for one
    that its latents cannot hold."""
    flavor.latent.check_size(width=width, height=height, frames=frames)
    d = flavor.defaults
    return Shape(batch, frames or d.frames, height or d.height, width or d.width)


def sparse_line(cfg: SparseConfig, about: Candidate, shape: Shape) -> str:
    """How much of attention is left."""
    grid = about.flavor.latent.grid(
        about.flavor.latent.shape(frames=shape.frames, height=shape.height, width=shape.width)
    )
    with torch.device("meta"):
        n_blocks = len(about.spec.build(about.flavor.arch).blocks)
    blocks = (
        f", by flex_attention {Blocks(pattern_of(cfg), grid, 0).density:.1%} of the blocks"
        if cfg.kernel != "gather" else ""
    )
    return (
        f"sparse attention, NOT exact ({pattern_of(cfg).describe()}): {kept_share(cfg, grid, n_blocks):.1%} "
        f"of the pairs of {' x '.join(map(str, grid))} video tokens are computed{blocks}"
    )


def _n_tokens(about: Candidate, shape: Shape) -> int:
    latent = about.flavor.latent
    return latent.n_tokens(latent.shape(frames=shape.frames, height=shape.height, width=shape.width))


def empty_model(about: Candidate, dtype: torch.dtype) -> DiT:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return about.spec.build(about.flavor.arch)
    finally:
        torch.set_default_dtype(before)


def _build(cfg: Training, about: Candidate) -> DiT:
    if cfg.adapter.type == "none":
        whole = empty_model(about, torch.float32).train()
        names = set(
            trained(
                [n for n, _ in whole.named_parameters()], train=cfg.adapter.train, freeze=cfg.adapter.freeze
            )
        )
        for name, p in whole.named_parameters():
            p.requires_grad_(name in names)
        return whole
    model = empty_model(about, getattr(torch, cfg.model.dtype))
    _quantize(model, about.spec, cfg.model)
    adapter = replace(cfg.adapter, init_from=None, init="zero")
    add_adapter(model, about.spec, adapter, _plan(cfg, about, model), seed=cfg.run.seed)
    return model.train()


def _plan(cfg: Training, about: Candidate, model: DiT) -> SlicePlan | None:
    a = cfg.adapter
    if a.type != "loraid":
        return None
    if a.plan is not None:
        return load_plan(a.plan)
    if a.blocks_per_loraid is None:
        raise ConfigError(
            "plan: a slice's size is in its plan; give adapter.plan or adapter.blocks_per_loraid"
        )
    shapes = linear_shapes(model)
    layers = {
        name: shapes[name] for name in about.spec.lora_targets(model, include=a.include, exclude=a.exclude)
    }
    return make_plan(
        layers, Cut(blocks_per_loraid=a.blocks_per_loraid), model=about.spec.name, flavor=about.flavor.name
    )


def _quantize(model: DiT, spec: ModelSpec, cfg: ModelConfig) -> None:
    """With float8 products wherever there may be some: what they make of long clips is more than a weight
    that is dequantised."""
    if cfg.quantize == "none":
        return
    for name in spec.lora_targets(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        n_out, n_in = layer.weight.shape
        scaled = cfg.quantize == "fp8_scaled" and n_in % BLOCK == 0
        scale = torch.empty(n_out, n_in // BLOCK, 1, dtype=layer.weight.dtype) if scaled else None
        replace_linear(model, name, torch.empty(n_out, n_in, dtype=DTYPE), scale)
    if cfg.fp8_matmul is not False:
        use_products(model, dict.fromkeys(linear_shapes(model).values(), Products(True, True)))


def _freed(model: DiT, blocks_to_swap: int) -> int:
    return swap_savings(model.blocks, blocks_to_swap) if blocks_to_swap else 0
