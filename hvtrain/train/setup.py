"""The parts of a training run, built from their config sections."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from hvtrain.adapters.attach import add_adapter, first_match, linear_shapes, merging, trained
from hvtrain.config import AdapterConfig, DataConfig, FlowConfig, ModelConfig, ShardsConfig, asset
from hvtrain.config.model import BOTH, EXPERT
from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.flow.timesteps import SAMPLER_KEYS, parameters, quantile_function, share_within
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.load import identify, load_dit, whole_model
from hvtrain.models.spec import Expert, Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.spread import spread_weights
from hvtrain.parallel.swap import BlockSwap, ModelSwap
from hvtrain.rng import generator
from hvtrain.slices.plan import Cut, SlicePlan, check_fits, load_plan, make_plan
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.float8 import NO_PRODUCTS, Chosen, use_products
from hvtrain.weights.source import Edit
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
class TeamMember:
    """What a run trains: one DiT, on which noise levels, for which share of the steps."""

    base: Origin
    flow: FlowConfig
    name: str  # of the files that it leaves
    share: float = 1.0

    @property
    def key(self) -> str:
        """Among the others."""
        return self.base.expert.name if self.base.expert else ""


@dataclass(frozen=True)
class Subject:
    """A DiT that is trained, and what of it."""

    model: DiT
    base: Origin
    trainable: dict[str, nn.Parameter]
    plan: SlicePlan | None = None  # of a LORAID slice
    swap: BlockSwap | None = None
    n_parameters: int = 0  # that are trained; ZeRO-3 empties the tensors that could be counted
    edit: Edit | None = None  # what was merged into the weights

    def base_weight(self, name: str) -> Tensor:
        """One that is not trained, float32: from the file, for ZeRO-3 has cut it up here."""
        assert self.base.path is not None
        weight = identify(self.base.path, model=self.spec.name).read(name, dtype=torch.float32)
        if self.edit is not None and name.endswith(".weight"):
            self.edit(name.removesuffix(".weight"), weight)
        return weight

    @property
    def spec(self) -> ModelSpec:
        return self.base.spec

    @property
    def flavor(self) -> Flavor:
        return self.base.flavor


def find_bases(model: ModelConfig, *, scratch: bool = False) -> list[Origin]:
    """One, or that of each expert where the run trains both. Raises as `find_base`."""
    if model.experts != BOTH:
        return [find_base(model, scratch=scratch)]
    names = _parts_of_experts(model) or {"high": ""}  # refused by name
    found = [find_base(replace(model, experts=name), scratch=scratch) for name in names]
    if any(one.flavor != found[0].flavor for one in found):
        raise CheckpointError(
            f"model: {' and '.join(str(one.path) for one in found)} have other sizes: not of one model"
        )
    return found


def find_idle(model: ModelConfig, trained: Sequence[Origin]) -> dict[str, Origin]:
    """The experts that are not trained, by name: videos are made with them too. Raises as `find_base`."""
    names = {expert.name for expert in trained[0].flavor.experts} - {
        one.expert.name for one in trained if one.expert
    }
    return {name: find_base(replace(model, experts=name)) for name in sorted(names)}


def find_base(model: ModelConfig, *, scratch: bool = False) -> Origin:
    """Raises ConfigError and CheckpointError. `scratch`: without a file, the flavor that the config names."""
    part = part_of(model)
    path = model.file(part)
    if path is None and not scratch:
        raise ConfigError(f"model.{part} is not set; the expert '{model.experts}' is in that file")
    if path is None:
        spec = find(model.name)
        flavor = spec.flavor(model.flavor)
        with torch.device("meta"):
            return Origin(
                spec.build(flavor.arch), spec, flavor, "scratch", None, _expert(flavor, model.experts)
            )
    found = identify(asset(path), model=model.name, flavor=model.flavor)
    expert = _expert(found.flavor, model.experts)
    if expert is not None:
        found.flavor.check_file(expert, asset(path))
    return Origin(
        whole_model(found), found.spec, found.flavor, fingerprint(found.weights), asset(path), expert
    )


def part_of(model: ModelConfig) -> str:
    """Which file of the model is trained."""
    if model.experts is None:
        return "dit"
    parts = _parts_of_experts(model)
    if model.experts not in parts:
        where = f"flavor '{model.flavor}'" if model.flavor else model.name
        known = (
            suggest(model.experts, [*parts, BOTH]) if parts else "it has no experts; leave model.experts null"
        )
        raise ConfigError(f"model.experts: {where} has no expert '{model.experts}'; {known}")
    return parts[model.experts]


def _parts_of_experts(model: ModelConfig) -> dict[str, str]:
    """Names of the experts that the flavor has, or any flavor where none is
    named, and in which file each is."""
    spec = find(model.name)
    flavors = [spec.flavor(model.flavor)] if model.flavor else spec.flavors.values()
    return {expert.name: expert.part for flavor in flavors for expert in flavor.experts}


def _expert(flavor: Flavor, name: str | None) -> Expert | None:
    found = {expert.name: expert for expert in flavor.experts}
    if name is None and found:
        ranges = ", ".join(f"{e.name} (sigma {e.sigmas[0]:g} to {e.sigmas[1]:g})" for e in flavor.experts)
        what = f"'{flavor.name}' is made of several DiTs, of which a run trains one, or both in turns"
        raise ConfigError(f"model.experts: {what}; choose {BOTH} or one of: {ranges}")
    if name is not None and name not in found:
        raise ConfigError(
            f"model.experts: the file's flavor '{flavor.name}' has no '{name}'; set model.flavor"
        )
    return found[name] if name is not None else None


def open_subject(
    base: Origin, model: ModelConfig, adapter: AdapterConfig, plan: SlicePlan | None, ctx: ParallelContext, *,
    seed: int, blocks_to_swap: int = 0, move: bool = True, idle: ModelSwap | None = None,
    float8: Chosen = NO_PRODUCTS,
) -> Subject:
    """Load (or make) the DiT and choose what is trained: adapters in fp32, or all weights in fp32. `plan`: of
    its slices. `move`: to the device at once; ZeRO-3 moves and cuts it itself, parameter by parameter.
    `idle`: takes the frozen weights, to have them on the device when they are computed with. `float8`: the
    layers that multiply so."""
    adapter = adapter_of(adapter, base.expert)
    whole, edit = adapter.type == "none", None
    if base.path is None:
        dit = base.spec.build(base.flavor.arch)
        base.spec.init_weights(dit, generator(seed, stream="init"))
    else:
        dtype = torch.float32 if whole else getattr(torch, model.dtype)
        if adapter.base_lora:
            edit = merging(linear_shapes(base.outline), open_base_loras(base, adapter))
        place = ctx.device if move and not blocks_to_swap and idle is None else torch.device("cpu")
        with spread_weights(ctx, device=place, frozen=not whole, cut=not move) as spread:
            dit = load_dit(
                base.path, model=model.name, flavor=model.flavor, dtype=dtype, device=place,
                quantize_to=model.quantize, edit=edit, spread=spread,
            ).model
    use_products(dit, float8)
    if whole:
        names = set(
            trained([n for n, _ in dit.named_parameters()], train=adapter.train, freeze=adapter.freeze)
        )
        for name, p in dit.named_parameters():
            p.requires_grad_(name in names)
    else:
        add_adapter(dit, base.spec, adapter, plan, seed=seed)
    swap = BlockSwap(dit.blocks, blocks_to_swap, ctx.device) if blocks_to_swap else None
    if idle is not None and base.expert is not None:
        idle.add(base.expert.name, dit)
    if move:
        dit.to(ctx.device)
    dit.train()
    trainable = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    return Subject(dit, base, trainable, plan, swap, sum(p.numel() for p in trainable.values()), edit)


def open_base_loras(base: Origin, adapter: AdapterConfig) -> list[tuple[LoraFile, float]]:
    """What is merged into the model before training. Raises CheckpointError for one of another model."""
    shapes = linear_shapes(base.outline)
    return [
        (read_lora(asset(one.path), shapes, spec=base.spec, decomposed=True), one.multiplier)
        for one in adapter.base_lora
    ]


def rates(adapter: AdapterConfig, names: Iterable[str]) -> dict[str, float]:
    """Each parameter's learning rate, as a multiple of the common one."""
    return {name: first_match(adapter.lr_ratios, name, 1.0, key="adapter.lr_ratios") for name in names}


def adapter_of(a: AdapterConfig, expert: Expert | None) -> AdapterConfig:
    """With the files to start from that are this expert's."""
    if expert is None:
        return a
    start = None if a.init_from is None else a.init_from.replace(EXPERT, expert.name)
    return replace(
        a, init_from=start,
        base_lora=tuple(replace(one, path=one.path.replace(EXPERT, expert.name)) for one in a.base_lora)
    )


def members_of(bases: Sequence[Origin], flow: FlowConfig, name: str) -> list[TeamMember]:
    """Each with its part of the noise levels, and for as many steps as are in it.
    Raises ConfigError as `flow_of`."""
    flavor, d = bases[0].flavor, bases[0].flavor.defaults
    if len(bases) > 1 and flow.range == "squeeze":
        raise ConfigError(
            "flow.range squeeze would give each of several experts all of the distribution; use cut"
        )
    whole = flow_of(flow, flavor)
    quantile = quantile_function(whole.timestep_sampling, whole, flavor)
    usual = flavor.latent.shape(frames=d.frames, height=d.height, width=d.width)
    found = []
    for base in bases:
        own, part = flow_of(flow, base.flavor, base.expert), 1.0
        quantile_function(own.timestep_sampling, own, flavor)  # refused where there is nothing in its range
        if len(bases) > 1 and base.expert is not None:
            part = share_within(quantile, *base.expert.sigmas, usual)
        found.append(TeamMember(base, own, named_after(name, base.expert), part))
    return found


def flow_of(flow: FlowConfig, flavor: Flavor, expert: Expert | None = None) -> FlowConfig:
    """With the flavor's own values where the config has null, and the part of the noise levels that is the
    expert's. Raises ConfigError for a value that the flavor does not use."""
    own, takes = flavor.defaults, parameters(flow.timestep_sampling)
    for key in SAMPLER_KEYS:
        if key not in takes and getattr(flow, key) != getattr(FlowConfig, key):
            legal = ", ".join(f"flow.{name}" for name in takes if hasattr(flow, name)) or "nothing"
            raise ConfigError(
                f"flow.{key} is {getattr(flow, key):g}, but flow.timestep_sampling {flow.timestep_sampling} "
                f"takes {legal}: leave flow.{key} away"
            )
    if own.guidance is None and flow.guidance is not None:
        raise ConfigError(
            f"flow.guidance is {flow.guidance:g}, but this '{flavor.name}' embeds no guidance: "
            "leave flow.guidance null"
        )
    if flow.raw_guidance and flow.guidance is None:
        what = (
            "give flow.guidance"
            if own.guidance is not None else f"this '{flavor.name}' embeds none; leave it away"
        )
        raise ConfigError(f"flow.raw_guidance is for a guidance of your own: {what}")
    shift = own.shift if own.training_shift is None else own.training_shift
    if flow.shift is None and "shift" in takes and flavor.shift_by_tokens is None:
        flow = replace(flow, shift=shift)
    flow = replace(flow, guidance=own.guidance if flow.guidance is None else flow.guidance)
    if expert is None:
        return flow
    low, high = max(flow.min_sigma, expert.sigmas[0]), min(flow.max_sigma, expert.sigmas[1])
    if low >= high:
        raise ConfigError(
            f"flow.min_sigma {flow.min_sigma:g} to flow.max_sigma {flow.max_sigma:g} are not the noise "
            f"levels of the expert '{expert.name}', {expert.sigmas[0]:g} to {expert.sigmas[1]:g}"
        )
    return replace(flow, min_sigma=low, max_sigma=high)


def named_after(name: str, expert: Expert | None) -> str:
    """A run's name says which expert it trained: two LoRAs of equal shapes."""
    return name if expert is None or name.endswith(f"-{expert.name}") else f"{name}-{expert.name}"


def open_plan(base: Origin, adapter: AdapterConfig, *, others: Sequence[Origin] = ()) -> SlicePlan:
    """The slices that this run's is one of, compared with the model; `others`: its other experts,
    which have the same layers."""
    shapes, spec = linear_shapes(base.outline), base.spec
    if adapter.plan is not None:
        plan = load_plan(adapter.plan)
        own = next((one for one in others if one.fingerprint == plan.base), base)
        check_fits(plan, model=spec.name, shapes=shapes, base=own.fingerprint, where=adapter.plan)
        return plan
    targets = spec.lora_targets(base.outline, include=adapter.include, exclude=adapter.exclude)
    cut = Cut(blocks_per_loraid=adapter.blocks_per_loraid)
    layers = {name: shapes[name] for name in targets}
    return make_plan(layers, cut, model=spec.name, flavor=base.flavor.name, base=base.fingerprint)


def n_steps(steps: int | None, epochs: float | None, n_samples: int, *, per_step: float) -> int:
    """Optimizer steps of the run; epochs are counted in samples."""
    return steps if steps is not None else max(1, math.ceil((epochs or 0) * n_samples / per_step))


_OF_WHOLE = ("type", "train", "freeze")
_OF_ADAPTER = (
    "type", "rank", "alpha", "rank_stable", "ranks", "alphas", "dropout", "rank_dropout", "module_dropout",
    "scale_weight_norms", "init", "factor", "include", "exclude", "slice_type",
)


def identity(
    bases: Sequence[Origin], adapter: AdapterConfig, plan: SlicePlan | None, flow: FlowConfig,
    sets: Sequence[ShardSet], *, data: DataConfig, optimizer: str, seed: int, name: str, turn: int = 1,
    sparse: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What makes a run this run, by key: changing any of it makes another. Length, rates, ranks and where the
    shards lie may change; not their samples, because the cursor counts them. `turn`: steps of one expert
    before the next; `sparse`: what attention leaves out, so that a file's metadata says it of all steps."""
    base, several = bases[0], len(bases) > 1
    names = _OF_WHOLE if adapter.type == "none" else _OF_ADAPTER
    merged = [
        [fingerprint(open_weights(asset(lora.path))), lora.multiplier]
        for one in bases for lora in adapter_of(adapter, one.expert).base_lora
    ]
    slices = {} if plan is None else {"adapter.plan": plan.hash[:12], "adapter.loraid": adapter.loraid}
    return {
        "model.name": base.spec.name, "model.experts": BOTH if several else base.expert and base.expert.name,
        "weights": " ".join(one.fingerprint for one in bases),
        **({"run.expert_turn": turn} if several else {}),
        **{f"adapter.{key}": getattr(adapter, key) for key in names}, **slices, "adapter.base_lora": merged,
        **{f"flow.{key}": value for key, value in asdict(flow).items()},  # all that a sampler takes
        "data.shards": [_content(s) for s in sets], "data.batch_size": data.batch_size,
        "data.mixture": [_entry(e) for e in data.mixture] or None, "data.batch_tokens": data.batch_tokens,
        "optim.name": optimizer,
        "run.seed": seed, "run.name": name,
        **{f"sparse.{key}": value for key, value in (sparse or {"pattern": "none"}).items()},
    }


def _entry(entry: ShardsConfig) -> dict[str, object]:
    """`silent` only where it is so: runs that were begun without the key go on."""
    return {key: v for key, v in asdict(replace(entry, path="")).items() if key != "silent" or v}


def _content(found: ShardSet) -> str:
    chunks = [
        [chunk.bucket, chunk.repeats, chunk.keys, {name: tar.checksum for name, tar in chunk.tars.items()}]
        for chunk in found.manifest.chunks
    ]
    digest = hashlib.sha256(json.dumps(chunks, sort_keys=True).encode()).hexdigest()
    return f"{len(found)} samples, sha256 {digest[:16]}"
