"""What `hvtrain fit --merge` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import MergeConfig, ModelConfig, asset
from hvtrain.config.rules import check_merge_values
from hvtrain.errors import ConfigError
from hvtrain.fit.estimate import Candidate, candidate, empty_model, shape_of
from hvtrain.fit.merges.needs import Merge, Needs, of_merge
from hvtrain.fit.merges.streaming import PairSize
from hvtrain.fit.run import GIB, Asked, memory_bytes, rendered
from hvtrain.fit.search import USABLE
from hvtrain.fit.trace import Shape
from hvtrain.lorafiles.overlap import by_layer
from hvtrain.merge.changes import low_rank
from hvtrain.merge.choose import DEFAULT, choose
from hvtrain.merge.evaluate import compute_dtype
from hvtrain.merge.inputs import Inputs, PlanSlices, as_trained, open_inputs
from hvtrain.merge.reconcile import kept_sets, levels_of, sources
from hvtrain.models.load import identify, whole_model
from hvtrain.slices.plan import check_fits, load_plan

RANK = 32  # of LoRAs of which none is said
GOAL = 0.05  # of the LoRAs' own training: what a merge may cost


@dataclass(frozen=True)
class Loras:
    """Those of a merge that names none: so many, in every layer that a LoRA
    adapts, or as a plan cuts them."""

    n: int | None = None
    rank: int | None = None  # None: RANK


def merging(cfg: MergeConfig, asked: Asked, loras: Loras) -> str:
    job = job_of(cfg, loras)
    shape = shape_of(job.about.flavor, width=asked.width, height=asked.height, frames=asked.frames)
    memory = memory_bytes(asked)
    lines = [_head(job, shape)]
    for gpus in asked.gpus:
        own = cfg.parallel.ulysses * cfg.parallel.ring
        if gpus % own:
            raise ConfigError(
                f"parallel: {own} GPUs that share a clip do not divide {gpus}; give --gpus a multiple of "
                f"{own}"
            )
        needs = of_merge(job, shape, gpus, cfg.parallel)
        lines += [f"\n{gpus} GPU(s) of {memory / GIB:.0f} GiB", *_memory(job, needs, memory)]
    return "\n".join([*lines, "", *_cost(job, needs)]) + "\n"


def job_of(cfg: MergeConfig, loras: Loras) -> Merge:
    """From the LoRAs that the config names, else from as many as `loras` says."""
    check_merge_values(cfg)
    dtype = torch.float32 if cfg.device == "cpu" else compute_dtype(torch.device("cuda"))
    policy = cfg.on_overlap != "error" or cfg.density is not None
    if cfg.lora or (cfg.plan and cfg.slices):
        if loras != Loras():
            raise ConfigError(
                "--loras and --lora-rank are for LoRAs that are not there yet; the config names some"
            )
        about, parts, inputs = _opened(cfg)
        how = choose(cfg.reconcile, inputs, policy=policy, model=True).how
        levels_of(cfg.reconcile, about.flavor, inputs, cfg.expert)  # refuses what the merge will
        n, n_sets, keep = (
            len(inputs.loras), len(sources(cfg.reconcile, inputs)), bool(kept_sets(cfg.reconcile, inputs))
        )
        file_bytes = sum(
            t.nbytes for lora, _ in inputs.loras for p in lora.pairs.values() for t in (p.up, p.down)
        )
    else:
        about, parts, n = _imagined(cfg, loras)
        by_itself = DEFAULT if n > 1 and not policy else "none"
        how, n_sets, keep = (by_itself if cfg.reconcile.how == "auto" else cfg.reconcile.how), n, True
        file_bytes = 2 * sum(p.numbers for own in parts.values() for p in own)
    if how == "none":
        raise ConfigError(
            "reconcile: this merge adds weights up, tensor by tensor, which takes a few of the model's "
            "tensors in memory; give reconcile.how=fit, distill or fit+distill"
        )
    return Merge(
        about, parts, n, n_sets, replace(cfg.reconcile, how=how), keep, cfg.target == "model", cfg.rank,
        dtype, file_bytes
    )


def _opened(cfg: MergeConfig) -> tuple[Candidate, dict[str, list[PairSize]], Inputs]:
    if not cfg.dit:
        raise ConfigError("dit: the model that the LoRAs change is needed to read them")
    found = identify(asset(cfg.dit), model=cfg.model, flavor=cfg.flavor)
    plan = (
        None if cfg.plan is None
        else PlanSlices(Path(cfg.plan), Path(cfg.slices) if cfg.slices else None, cfg.allow_missing)
    )
    inputs = open_inputs(
        cfg.lora, plan, linear_shapes(whole_model(found)), found.spec, base=None, expert=cfg.expert
    )
    inputs = replace(inputs, any_base=cfg.any_base)
    found = found if cfg.flavor else as_trained(found, inputs)
    layers = {name: [low_rank(c) for c in own] for name, own in by_layer(inputs.loras).items()}
    parts = {
        name: [PairSize(len(p.down), p.begin, p.begin + len(p.up), p.down.shape[1]) for p in own if len(p.up)]
        for name, own in layers.items()
    }
    return Candidate(found.spec, found.flavor), {name: own for name, own in parts.items() if own}, inputs


def _imagined(cfg: MergeConfig, loras: Loras) -> tuple[Candidate, dict[str, list[PairSize]], int]:
    if cfg.dit:
        found = identify(asset(cfg.dit), model=cfg.model, flavor=cfg.flavor)
        about = Candidate(found.spec, found.flavor)
    else:
        about = candidate(ModelConfig(name=cfg.model or ModelConfig.name, flavor=cfg.flavor))
    with torch.device("meta"):
        model = empty_model(about, torch.bfloat16)
    shapes, rank = linear_shapes(model), loras.rank or RANK
    if cfg.plan is not None:
        plan = load_plan(cfg.plan)
        check_fits(plan, model=about.spec.name, shapes=shapes, where=cfg.plan)
        if loras.n is not None:
            raise ConfigError(f"--loras {loras.n}: the plan has {plan.n} slices; leave it away")
        parts: dict[str, list[PairSize]] = {}
        for slot in (slot for s in plan.slices for slot in s.slots):
            parts.setdefault(slot.module, []).append(
                PairSize(rank, slot.begin, slot.end, shapes[slot.module][1])
            )
        return about, parts, plan.n
    if loras.n is None:
        raise ConfigError(
            "lora: the config names no LoRAs; say how many there will be with --loras, as in --loras 20"
        )
    layers = about.spec.lora_targets(model)
    return about, {name: [PairSize(rank, 0, *shapes[name])] * loras.n for name in layers}, loras.n


def _head(job: Merge, shape: Shape) -> str:
    ranks = sorted({p.rank for own in job.parts.values() for p in own})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    what = (
        f"{job.about.spec.name} {job.about.flavor.name}: {job.reconcile.how} of {job.n_loras} LoRAs of rank "
        f"{rank} in "
    )
    clips = (
        f"{job.n_states:,} noisy clips of {shape.width} x {shape.height} x {shape.frames}, {job.n_held:,} "
        "held out"
    )
    return f"{what}{len(job.parts)} layers, from {clips}{'' if job.keep else ', no keep'}"


def _memory(job: Merge, needs: Needs, memory: int) -> Iterator[str]:
    table = Table("GiB a GPU", "fit" if job.fits else "passes", *(["distill"] if needs.distill else []))
    for part, n in needs.distill.parts().items() if needs.distill else ():
        table.add_row(part, "", f"{n / GIB:.2f}")
    table.add_row(
        "worst moment", f"{needs.fit / GIB:.2f}",
        *([f"{needs.distill.total / GIB:.2f}"] if needs.distill else []), style="bold"
    )
    yield rendered(table)
    disk = f", and {needs.disk / GIB:.1f} GiB on the disk beside the output" if needs.disk else ""
    yield (
        f"host memory of a process: {needs.host / GIB:.1f} GiB "
        f"(reconcile.host_gb={job.reconcile.host_gb:g}){disk}"
    )
    if needs.device <= USABLE * memory:
        yield f"fits: {needs.device / GIB:.1f} GiB of {USABLE * memory / GIB:.1f} usable"
        return
    ways = "fewer LoRAs at a time, a smaller clip (--size)"
    if needs.distill and needs.distill.total == needs.device:
        ways = f"--rank with fit+distill, reconcile.how=fit, parallel.ulysses, {ways}"
    yield f"does not fit: {needs.device / GIB:.1f} GiB of {USABLE * memory / GIB:.1f} usable; {ways}"


def _cost(job: Merge, needs: Needs) -> Iterator[str]:
    table = Table("all GPUs together", "passes of a clip", "PFLOP")
    for what, (n, flops) in needs.passes.items():
        table.add_row(what, f"{n:,}", _pflop(flops))
    yield rendered(table)
    samples = needs.flops / needs.sample / job.n_loras
    exact = f", {_pflop(needs.sums)} of them in float32" if needs.sums and job.dtype != torch.float32 else ""
    yield (
        f"cost: {_pflop(needs.flops)} PFLOP{exact}; as training each LoRA on {samples:,.0f} samples of that "
        f"size, {GOAL:.0%} of a training on {samples / GOAL:,.0f}"
    )


def _pflop(flops: int) -> str:
    value = flops / 1e15
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
