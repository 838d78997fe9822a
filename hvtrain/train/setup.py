"""The parts of a training run, built from their config sections."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from hvtrain.adapters.attach import add_adapter, linear_shapes
from hvtrain.config import AdapterConfig, FlowConfig, ModelConfig, asset
from hvtrain.errors import ConfigError, suggest
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.load import identify, load_dit, whole_model
from hvtrain.models.spec import Expert, Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.spread import spread_weights
from hvtrain.parallel.swap import BlockSwap
from hvtrain.rng import generator
from hvtrain.slices.plan import Cut, SlicePlan, check_fits, load_plan, make_plan
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.float8 import use_matmul
from shards import ShardSet


@dataclass(frozen=True)
class Origin:
    """What training starts from, known from a file's header and samples."""

    outline: DiT  # on the meta device
    spec: ModelSpec
    flavor: Flavor
    fingerprint: str
    path: str | None  # None: from scratch
    expert: Expert | None = None  # which of the flavor's


@dataclass(frozen=True)
class Subject:
    """The model of a run and what is trained of it."""

    model: DiT
    base: Origin
    trainable: dict[str, nn.Parameter]
    plan: SlicePlan | None = None  # of a LORAID slice
    swap: BlockSwap | None = None
    n_parameters: int = 0  # that are trained; ZeRO-3 empties the tensors that could be counted

    @property
    def spec(self) -> ModelSpec:
        return self.base.spec

    @property
    def flavor(self) -> Flavor:
        return self.base.flavor


def find_base(model: ModelConfig, *, scratch: bool = False) -> Origin:
    """Raises ConfigError and CheckpointError. `scratch`: without a file, the flavor that the config names."""
    part = part_of(model)
    path = model.file(part)
    if path is None and not scratch:
        raise ConfigError(f"model.{part} is not set; the expert '{model.expert}' is in that file")
    if path is None:
        spec = find(model.name)
        flavor = spec.flavor(model.flavor)
        with torch.device("meta"):
            return Origin(spec.build(flavor.arch), spec, flavor, "scratch", None, _expert(flavor, model.expert))
    found = identify(asset(path), model=model.name, flavor=model.flavor)
    expert = _expert(found.flavor, model.expert)
    return Origin(whole_model(found), found.spec, found.flavor, fingerprint(found.weights), asset(path), expert)


def part_of(model: ModelConfig) -> str:
    """Which file of the model is trained."""
    if model.expert is None:
        return "dit"
    spec = find(model.name)
    flavors = [spec.flavor(model.flavor)] if model.flavor else spec.flavors.values()
    parts = {expert.name: expert.part for flavor in flavors for expert in flavor.experts}
    if model.expert not in parts:
        where = f"flavor '{model.flavor}'" if model.flavor else spec.name
        known = suggest(model.expert, parts) if parts else "it has no experts; leave model.expert null"
        raise ConfigError(f"model.expert: {where} has no expert '{model.expert}'; {known}")
    return parts[model.expert]


def _expert(flavor: Flavor, name: str | None) -> Expert | None:
    found = {expert.name: expert for expert in flavor.experts}
    if name is None and found:
        ranges = ", ".join(f"{e.name} (sigma {e.sigmas[0]:g} to {e.sigmas[1]:g})" for e in flavor.experts)
        what = f"'{flavor.name}' is made of several DiTs, and a run trains one"
        raise ConfigError(f"model.expert: {what}; choose one of: {ranges}")
    if name is not None and name not in found:
        raise ConfigError(f"model.expert: the file's flavor '{flavor.name}' has no '{name}'; set model.flavor")
    return found[name] if name is not None else None


def open_subject(
    base: Origin, model: ModelConfig, adapter: AdapterConfig, plan: SlicePlan | None, ctx: ParallelContext, *,
    seed: int, blocks_to_swap: int = 0, move: bool = True,
) -> Subject:
    """Load (or make) the DiT and choose what is trained: adapters in fp32, or all weights in fp32. `plan`: of
    its slices. `move`: to the device at once; ZeRO-3 moves and cuts it itself, parameter by parameter."""
    whole = adapter.type == "none"
    if base.path is None:
        dit = base.spec.build(base.flavor.arch)
        base.spec.init_weights(dit, generator(seed, stream="init"))
    else:
        dtype = torch.float32 if whole else getattr(torch, model.dtype)
        place = ctx.device if move and not blocks_to_swap else torch.device("cpu")
        with spread_weights(ctx, device=place, frozen=not whole, cut=not move) as spread:
            dit = load_dit(
                base.path, model=model.name, flavor=model.flavor, dtype=dtype, device=place, quantize_to=model.quantize,
                spread=spread,
            ).model
    use_matmul(dit, model.fp8_matmul)
    if whole:
        dit.requires_grad_(True)
    else:
        add_adapter(dit, base.spec, adapter, plan, seed=seed)
    swap = BlockSwap(dit.blocks, blocks_to_swap, ctx.device) if blocks_to_swap else None
    if move:
        dit.to(ctx.device)
    dit.train()
    trainable = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    return Subject(dit, base, trainable, plan, swap, sum(p.numel() for p in trainable.values()))


def flow_of(flow: FlowConfig, flavor: Flavor, expert: Expert | None = None) -> FlowConfig:
    """With the flavor's own values where the config has null, and the part of the noise levels that is the
    expert's. Raises ConfigError for a value that the flavor does not use."""
    own = flavor.defaults
    if own.guidance is None and flow.guidance is not None:
        raise ConfigError(
            f"flow.guidance is {flow.guidance:g}, but this '{flavor.name}' embeds no guidance: "
            "leave flow.guidance null"
        )
    shift = own.shift if own.training_shift is None else own.training_shift
    flow = replace(
        flow, shift=shift if flow.shift is None else flow.shift,
        guidance=own.guidance if flow.guidance is None else flow.guidance,
    )
    if expert is None:
        return flow
    low, high = max(flow.min_sigma, expert.sigmas[0]), min(flow.max_sigma, expert.sigmas[1])
    if low >= high:
        raise ConfigError(
            f"flow.min_sigma {flow.min_sigma:g} to flow.max_sigma {flow.max_sigma:g} are not the noise levels of "
            f"the expert '{expert.name}', {expert.sigmas[0]:g} to {expert.sigmas[1]:g}"
        )
    return replace(flow, min_sigma=low, max_sigma=high)


def named_after(name: str, expert: Expert | None) -> str:
    """A run's name says which expert it trained: two LoRAs of equal shapes."""
    return name if expert is None or name.endswith(f"-{expert.name}") else f"{name}-{expert.name}"


def open_plan(base: Origin, adapter: AdapterConfig) -> SlicePlan:
    """The slices that this run's is one of, compared with the model."""
    shapes, spec = linear_shapes(base.outline), base.spec
    if adapter.plan is not None:
        plan = load_plan(adapter.plan)
        check_fits(plan, model=spec.name, shapes=shapes, base=base.fingerprint, where=adapter.plan)
        return plan
    targets = spec.lora_targets(base.outline, include=adapter.include, exclude=adapter.exclude)
    cut = Cut(blocks_per_loraid=adapter.blocks_per_loraid)
    layers = {name: shapes[name] for name in targets}
    return make_plan(layers, cut, model=spec.name, flavor=base.flavor.name, base=base.fingerprint)


def n_steps(steps: int | None, epochs: float | None, n_samples: int, *, per_step: int) -> int:
    """Optimizer steps of the run; epochs are counted in samples."""
    return steps if steps is not None else max(1, math.ceil((epochs or 0) * n_samples / per_step))


def identity(
    base: Origin, adapter: AdapterConfig, plan: SlicePlan | None, flow: FlowConfig, sets: Sequence[ShardSet], *,
    batch_size: int, seed: int, name: str,
) -> dict[str, object]:
    """What makes a run this run, by key: changing any of it makes another. Length, rates, ranks and where the
    shards lie may change; not their samples, because the cursor counts them."""
    names = ["type"] if adapter.type == "none" else ["type", "rank", "alpha", "dropout", "include", "exclude"]
    slices = {} if plan is None else {"adapter.plan": plan.hash[:12], "adapter.loraid": adapter.loraid}
    return {
        "model.name": base.spec.name, "model.expert": base.expert and base.expert.name,
        "weights": base.fingerprint,
        **{f"adapter.{key}": getattr(adapter, key) for key in names}, **slices,
        **{f"flow.{key}": value for key, value in asdict(flow).items()},  # all that a sampler takes
        "data.shards": [_content(s) for s in sets], "data.batch_size": batch_size,
        "run.seed": seed, "run.name": name,
    }


def _content(found: ShardSet) -> str:
    chunks = [
        [chunk.bucket, chunk.repeats, chunk.keys, {name: tar.checksum for name, tar in chunk.tars.items()}]
        for chunk in found.manifest.chunks
    ]
    digest = hashlib.sha256(json.dumps(chunks, sort_keys=True).encode()).hexdigest()
    return f"{len(found)} samples, sha256 {digest[:16]}"
