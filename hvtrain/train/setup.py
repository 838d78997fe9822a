"""The parts of a training run, built from their config sections."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from hvtrain.adapters.lora import inject, linear_shapes, start_from
from hvtrain.config import FlowConfig, TrainConfig, asset
from hvtrain.errors import ConfigError, DataError
from hvtrain.lorafiles.files import read_lora
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.load import load_dit
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.swap import BlockSwap
from hvtrain.rng import generator
from hvtrain.slices.plan import Cut, SlicePlan, check_fits, load_plan, make_plan
from hvtrain.train.engine import EngineConfig
from hvtrain.weights.float8 import use_matmul
from shards import ShardSet, open_set


@dataclass(frozen=True)
class Subject:
    """The model of a run and what is trained of it."""

    model: DiT
    spec: ModelSpec
    flavor: Flavor
    fingerprint: str  # of the weights that training starts from
    trainable: dict[str, nn.Parameter]
    plan: SlicePlan | None = None  # of a LORAID slice
    swap: BlockSwap | None = None
    n_parameters: int = 0  # that are trained; ZeRO-3 empties the tensors that could be counted


def open_subject(cfg: TrainConfig, ctx: ParallelContext, plan: SlicePlan | None = None) -> Subject:
    """Load (or make) the DiT and choose what is trained: adapters in fp32, or all weights in fp32. `plan`: of its slices."""
    full = cfg.adapter.type == "none"
    if cfg.model.dit is None:
        spec = find(cfg.model.name)
        flavor = spec.flavor(cfg.model.flavor)
        model = spec.build(flavor.arch)
        spec.init_weights(model, generator(cfg.run.seed, stream="init"))
        fingerprint = "scratch"
    else:
        loaded = load_dit(
            asset(cfg.model.dit), model=cfg.model.name, flavor=cfg.model.flavor,
            dtype=torch.float32 if full else getattr(torch, cfg.model.dtype), device="cpu", quantize_to=cfg.model.quantize,
        )
        model, spec, flavor, fingerprint = loaded.model, loaded.spec, loaded.flavor, loaded.fingerprint
    use_matmul(model, cfg.model.fp8_matmul)
    if full:
        model.requires_grad_(True)
    else:
        add_adapter(model, spec, cfg, plan)
    swap = BlockSwap(model.blocks, cfg.run.blocks_to_swap, ctx.device) if cfg.run.blocks_to_swap else None
    if not (cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3):  # that moves and cuts it, parameter by parameter
        model.to(ctx.device)
    model.train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Subject(model, spec, flavor, fingerprint, trainable, plan, swap, sum(p.numel() for p in trainable.values()))


def flow_of(flow: FlowConfig, flavor: Flavor) -> FlowConfig:
    """With the flavor's own values where the config has null. Raises ConfigError for one that the flavor does not use."""
    own = flavor.defaults
    if own.guidance is None and flow.guidance is not None:
        raise ConfigError(
            f"flow.guidance is {flow.guidance:g}, but this '{flavor.name}' embeds no guidance: leave flow.guidance null"
        )
    shift = own.shift if own.training_shift is None else own.training_shift
    return replace(
        flow, shift=shift if flow.shift is None else flow.shift,
        guidance=own.guidance if flow.guidance is None else flow.guidance,
    )


def open_plan(model: DiT, spec: ModelSpec, flavor: Flavor, cfg: TrainConfig, fingerprint: str) -> SlicePlan:
    """The slices that this run's is one of, compared with the model."""
    a, shapes = cfg.adapter, linear_shapes(model)
    if a.plan is not None:
        plan = load_plan(a.plan)
        check_fits(plan, model=spec.name, shapes=shapes, base=fingerprint, where=a.plan)
        return plan
    targets = spec.lora_targets(model, include=a.include, exclude=a.exclude)
    layers = {name: shapes[name] for name in targets}
    cut = Cut(blocks_per_loraid=a.blocks_per_loraid)
    return make_plan(layers, cut, model=spec.name, flavor=flavor.name, base=fingerprint)


def add_adapter(model: DiT, spec: ModelSpec, cfg: TrainConfig, plan: SlicePlan | None) -> None:
    """Freeze the model and put the config's adapter on it."""
    a = cfg.adapter
    shapes = linear_shapes(model)
    if plan is None:
        rows, targets = None, spec.lora_targets(model, include=a.include, exclude=a.exclude)
    else:
        slots = plan.slice(a.loraid or 0).slots
        rows, targets = {s.module: (s.begin, s.end) for s in slots}, [s.module for s in slots]
    inject(model, targets, rank=a.rank, alpha=a.alpha, dropout=a.dropout, seed=cfg.run.seed, rows=rows)
    if a.init_from is not None:
        start_from(model, read_lora(a.init_from, shapes, spec=spec))


def open_shards(paths: Sequence[str], flavor: Flavor, *, key: str) -> list[ShardSet]:
    """Open shard sets and compare a sample of each with what the model needs."""
    sets = [open_set(path) for path in paths]
    for found in sets:
        if not len(found):
            raise DataError(f"{key}: {found.name} holds no samples; encode some clips into it")
        tensors = found.some().tensors
        if "latents" not in tensors:
            raise DataError(f"{key}: {found.name} lacks the field 'latents'; encode column 'latents'")
        if tensors["latents"].shape[0] != flavor.latent.channels:
            raise DataError(
                f"{key}: {found.name} holds latents of {tensors['latents'].shape[0]} channels, flavor '{flavor.name}' takes "
                f"{flavor.latent.channels}; encode the clips with this model's VAE"
            )
        for field in flavor.cond:
            if field.name not in tensors:
                if field.optional:
                    continue
                raise DataError(f"{key}: {found.name} lacks the field '{field.name}'; encode column '{field.column}'")
            shape = tensors[field.name].shape
            if not field.fits(shape):
                raise DataError(
                    f"{key}: {found.name} holds '{field.name}' of shape {tuple(shape)}, flavor '{flavor.name}' takes {field}; "
                    "encode the captions with this model's text encoders"
                )
    return sets


def total_steps(cfg: TrainConfig, n_samples: int, *, dp: int) -> int:
    """Optimizer steps of the run; epochs are counted in samples."""
    if cfg.run.steps is not None:
        return cfg.run.steps
    per_step = dp * cfg.data.batch_size * cfg.run.grad_accum
    return max(1, math.ceil((cfg.run.epochs or 0) * n_samples / per_step))


def identity(cfg: TrainConfig, base: str, plan: SlicePlan | None, sets: Sequence[ShardSet]) -> dict[str, object]:
    """What makes a run this run, by key: changing any of it makes another. Length, rates, ranks and where the shards lie may
    change; not their samples, because the cursor counts them. `base`: fingerprint of the weights it starts from."""
    a = cfg.adapter
    names = ("type",) if a.type == "none" else ("type", "rank", "alpha", "dropout", "include", "exclude")
    adapter: dict[str, object] = {f"adapter.{name}": getattr(a, name) for name in names}
    if plan is not None:
        adapter |= {"adapter.plan": plan.hash[:12], "adapter.loraid": a.loraid}
    return {
        "model.name": cfg.model.name, "weights": base, **adapter,
        **{f"flow.{name}": value for name, value in asdict(cfg.flow).items()},  # all: whatever a sampler takes is in there
        "data.shards": [_content(s) for s in sets], "data.batch_size": cfg.data.batch_size,
        "run.seed": cfg.run.seed, "run.name": cfg.run.name,
    }


def _content(found: ShardSet) -> str:
    chunks = [
        [chunk.bucket, chunk.repeats, chunk.keys, {column: tar.checksum for column, tar in chunk.tars.items()}]
        for chunk in found.manifest.chunks
    ]
    digest = hashlib.sha256(json.dumps(chunks, sort_keys=True).encode()).hexdigest()
    return f"{len(found)} samples, sha256 {digest[:16]}"


def engine_config(cfg: TrainConfig) -> EngineConfig:
    zero = cfg.zero
    return EngineConfig(
        zero.engine, zero.stage, zero.offload_optimizer, cfg.run.grad_accum, cfg.optim.max_grad_norm,
        offload_param=zero.offload_param, nvme_path=zero.nvme_path, bucket_mb=zero.bucket_mb,
        communication_dtype=zero.communication_dtype, deepspeed=zero.deepspeed,
    )


def check_lengths(cfg: TrainConfig, steps: int) -> None:
    if cfg.optim.warmup_steps > steps:
        raise ConfigError(f"optim.warmup_steps is {cfg.optim.warmup_steps}, more than the run's {steps} steps")
