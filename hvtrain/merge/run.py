"""`hvtrain merge`: LoRAs into a model file, or into one LoRA, with the proof that none overwrote another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import MergeConfig, ParallelConfig, asset
from hvtrain.config.rules import check_merge
from hvtrain.errors import ConfigError
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.lowrank import factor, shrink
from hvtrain.lorafiles.metadata import (
    BASE_LORA_KEY,
    EXPERT_KEY,
    LORA_FLAVOR_KEY,
    json_tables,
    lora_metadata,
)
from hvtrain.lorafiles.overlap import Contribution, by_layer
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.tools import blocks, open_any
from hvtrain.lorafiles.whole import summed
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge.choose import choose
from hvtrain.merge.inputs import (
    RATE_KEY,
    Inputs,
    PlanSlices,
    as_trained,
    expert_told,
    flavors_told,
    learning_rate,
    lora_in,
    open_inputs,
    owners_note,
)
from hvtrain.merge.journal import noted
from hvtrain.merge.policies import POLICIES, Dense, Options, Result, combine
from hvtrain.merge.report import Report, save_report
from hvtrain.merge.write import (
    Addition,
    Target,
    check_room,
    plan_parts,
    plan_whole,
    refuse_scaled,
    signature,
    write_model,
)
from hvtrain.models.load import Identified, identify, whole_model
from hvtrain.models.spec import ModelSpec
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.registry import Registry
from hvtrain.weights.containers import Weights, fingerprint, open_weights
from hvtrain.weights.outputs import check_place

MERGED_KEY = "hvtrain.merged"  # metadata: what has been merged into a model, oldest first
_STALE = ("sshs_", "modelspec.hash_sha256")  # metadata that describes the bytes as they were
RECONCILERS: Registry[None] = Registry(
    "way", dict.fromkeys(("auto", "none", "fit", "distill", "fit+distill"))
)
PLAIN = ("auto", "none")  # so long as nothing is chosen
_DTYPES = Registry("dtype", {n: getattr(torch, n) for n in ("bfloat16", "float16", "float32")})


@dataclass(frozen=True)
class Base:
    """The model that LoRAs are merged into; without a file only its layers are known."""

    found: Identified | None
    shapes: dict[str, tuple[int, int]]
    fingerprint: str | None


def run(cfg: MergeConfig) -> None:
    """Check, combine, write, report. A merged model has the input's names, layout,
    dtypes and metadata, as safetensors.

    Collective where samples are looked at (--reconcile, --evaluate); rank 0 writes.
    """
    _check(cfg)
    plain = cfg.reconcile.how in PLAIN
    computes = not plain or bool(cfg.evaluate)
    ctx = _start(cfg) if computes else ParallelContext()
    base, spec = _open_base(cfg)
    inputs = _open_inputs(cfg, base, spec)
    layers = by_layer(inputs.loras)
    policy = cfg.on_overlap != "error" or cfg.density is not None
    chosen = choose(cfg.reconcile, inputs, policy=policy, model=base.found is not None)
    how = chosen.how
    if chosen.by_itself:
        cfg, computes = replace(cfg, reconcile=replace(cfg.reconcile, how=how)), True
        ctx = _start(cfg)
    cfg = replace(cfg, device=ctx.device.type) if cfg.device == "auto" else cfg
    if cfg.target == "lora" or computes:
        _refuse_whole(inputs)
    if computes and base.found is not None and cfg.flavor is None:
        base = replace(base, found=as_trained(base.found, inputs))
    options = Options(cfg.density, cfg.seed, chosen.why_not)
    combined = combine(layers, cfg.on_overlap, options) if how == "none" else {}
    report = Report.of(inputs, layers, cfg.on_overlap if how == "none" else how)
    if ctx.is_main:
        for lora, multiplier in inputs.loras:
            off = "" if multiplier else " (off)"
            print(f"{lora.summary()}, times {multiplier:g}{off}; {blocks(lora.pairs)}")
        for line in (*inputs.notes(), *report.lines(), *chosen.lines(bool(cfg.reconcile.keep))):
            print(line)
    if how != "none":
        from hvtrain.merge.reconcile import Wanted, reconcile

        assert base.found is not None
        about = repr(replace(cfg, parallel=ParallelConfig()))
        if cfg.target == "model":
            _check_writable(cfg, base, inputs, layers)
        wanted = Wanted(Path(cfg.output), cfg.target == "model", cfg.rank, cfg.seed, about, cfg.expert)
        reconciled = reconcile(cfg.reconcile, inputs, report, base.found, ctx, wanted)
        combined = reconciled.changes
    if ctx.is_main:
        _write(cfg, base, spec, inputs, combined, report)
    ctx.barrier()
    if how != "none" and ctx.is_main:
        reconciled.journal.remove()
    if cfg.evaluate:
        from hvtrain.merge.evaluate import losses_of

        assert base.found is not None
        report.losses = losses_of(base.found, inputs, combined, cfg.evaluate, ctx, cfg.expert)
        for name, loss in report.losses.items() if ctx.is_main else ():
            print(f"held-out loss {loss:.5f}  {name}")
    for path in save_report(report, Path(cfg.output)) if ctx.is_main else ():
        print(f"report: {path}")
    if ctx.world > 1:
        shutdown()


def _refuse_whole(inputs: Inputs) -> None:
    for lora in (lora for lora, _ in inputs.loras if lora.whole):
        raise ConfigError(
            f"{lora.path}: adds to {len(lora.whole)} whole tensors, for which a LoRA has no place; merge it "
            "into a model, without --reconcile and --evaluate"
        )


def _start(cfg: MergeConfig) -> ParallelContext:
    """On a GPU if there is one, unless told otherwise: a large model's passes take hours on a CPU."""
    return start(cfg.parallel.ulysses, cfg.parallel.ring, device=None if cfg.device == "auto" else cfg.device)


def _open_inputs(cfg: MergeConfig, base: Base, spec: ModelSpec) -> Inputs:
    plan = None
    if cfg.plan is not None:
        plan = PlanSlices(Path(cfg.plan), Path(cfg.slices) if cfg.slices else None, cfg.allow_missing)
    known = None if cfg.any_base else base.fingerprint
    whole = cfg.target == "model" and cfg.reconcile.how in PLAIN
    found = open_inputs(
        cfg.lora, plan, base.shapes, spec, base=known, expert=cfg.expert, decomposed=whole
    )
    return replace(found, any_base=cfg.any_base)


def _write(
    cfg: MergeConfig, base: Base, spec: ModelSpec, inputs: Inputs, combined: Mapping[str, Result],
    report: Report
) -> None:
    if cfg.target == "lora":
        report.errors = _write_lora(cfg, inputs, combined, spec.name)
    else:
        assert base.found is not None
        _write_model(cfg, base.found, inputs, combined, base.shapes)
    if cfg.reconcile.how in PLAIN:
        return
    from hvtrain.merge.reconcile import leave_calibration, write_slices

    if cfg.target == "lora":
        print(
            f"{leave_calibration(cfg.reconcile, inputs, Path(cfg.output))}: to add LoRAs to this merge later"
        )
    if folder := write_slices(Path(cfg.output), inputs, combined):
        print(f"{folder}: the slices as they are in this merge (generate slices={folder} --loraid ...)")


def _check(cfg: MergeConfig) -> None:
    """What the rules cannot see without torch, then the rules."""
    POLICIES.find(cfg.on_overlap, key="on_overlap")
    RECONCILERS.find(cfg.reconcile.how, key="reconcile")
    if cfg.dtype is not None:
        _DTYPES.find(cfg.dtype, key="dtype")
    check_merge(cfg)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here; use cpu")
    check_place(Path(cfg.output))


def _open_base(cfg: MergeConfig) -> tuple[Base, ModelSpec]:
    if not cfg.dit:
        first = lora_in(cfg.lora[0].path, cfg.expert) if cfg.lora else None
        if first is None:
            raise ConfigError("dit: the model that the plan's slices were trained on is needed to read them")
        known = open_any(first, expert=cfg.expert)
        return Base(None, dict(known.shapes), None), known.spec
    found = identify(Path(asset(cfg.dit)), model=cfg.model, flavor=cfg.flavor)
    if cfg.target == "model":
        _history(found.weights)
    shapes = linear_shapes(whole_model(found))
    return Base(found, shapes, fingerprint(found.weights)), found.spec


# --- into the model -----------------------------------------------------------------------------------------


def _write_model(
    cfg: MergeConfig, found: Identified, inputs: Inputs, combined: Mapping[str, Result],
    shapes: Mapping[str, tuple[int, int]]
) -> None:
    weights, parts = _parts(cfg, found, inputs, combined, shapes)
    files = write_model(
        weights, parts, _target(cfg, weights, inputs), metadata=_metadata(weights, inputs.loras)
    )
    where = f" in {len(files)} files" if len(files) > 1 else ""
    print(f"{cfg.output}: {len(parts)} of {len(weights)} tensors changed{where}")


def _parts(
    cfg: MergeConfig, found: Identified, inputs: Inputs, combined: Mapping[str, Result],
    shapes: Mapping[str, tuple[int, int]]
) -> tuple[Weights, dict[str, Addition]]:
    """Every tensor under the file's own name, also those that are not the DiT's; and what is added to
    them."""
    added = summed(inputs.loras, found.shapes, once=cfg.on_overlap == "error")
    parts = plan_whole(found, added, plan_parts(found, combined, shapes))
    weights = open_weights(Path(asset(cfg.dit)))
    refuse_scaled(weights, parts)
    return weights, parts


def _target(cfg: MergeConfig, weights: Weights, inputs: Inputs) -> Target:
    return Target(
        Path(cfg.output), _DTYPES[cfg.dtype] if cfg.dtype else None,
        int(cfg.max_shard_gb * 1e9) if cfg.max_shard_gb else None, cfg.device,
        signature([*weights.files, *(lora.path for lora, _ in inputs.loras)], repr(cfg)),
    )


def _check_writable(
    cfg: MergeConfig, base: Base, inputs: Inputs, layers: Mapping[str, Sequence[Contribution]]
) -> None:
    """What would stop the model from being written is said before what takes hours."""
    assert base.found is not None
    weights, _ = _parts(cfg, base.found, inputs, {n: list(own) for n, own in layers.items()}, base.shapes)
    whole = cfg.reconcile.how == "fit"  # its matrices lie beside the output until that is written
    also = sum(4 * math.prod(base.shapes[module]) for module in layers) if whole else 0
    target = _target(cfg, weights, inputs)
    check_room(weights, target, metadata=_metadata(weights, inputs.loras), also=also - noted(target.output))


def _history(weights: Weights) -> list[dict]:
    """What was merged into it before. Raises CheckpointError."""
    return json_tables(weights.files[0], weights.metadata, MERGED_KEY)


def _metadata(weights: Weights, loras: Sequence[tuple[LoraFile, float]]) -> dict[str, str]:
    kept = {key: value for key, value in weights.metadata.items() if not key.startswith(_STALE)}
    history = _history(weights)
    for lora, multiplier in loras:
        entry: dict[str, object] = {"file": lora.path.name, "multiplier": multiplier}
        entry |= {key: lora.metadata[key] for key in ("sshs_model_hash", "ss_loraid") if key in lora.metadata}
        history.append(entry)
    return {**kept, MERGED_KEY: json.dumps(history)}


# --- into one LoRA ------------------------------------------------------------------------------------------


def _write_lora(
    cfg: MergeConfig, inputs: Inputs, combined: Mapping[str, Result], architecture: str
) -> dict[str, float]:
    """One pair per layer; the relative error of each that was cut."""
    pairs: dict[str, LoraPair] = {}
    errors: dict[str, float] = {}
    for module, result in combined.items():
        if isinstance(result, Dense):
            if cfg.rank is None:
                raise ConfigError(
                    f"on_overlap {cfg.on_overlap} makes full matrices: give rank for the LoRA, or "
                    "target=model"
                )
            cut = factor(result.delta(), rank=cfg.rank)
        elif cfg.rank is not None:
            cut = shrink([(c.pair, c.multiplier) for c in result], rank=cfg.rank)
        else:
            pairs[module] = joined(result)
            continue
        pairs[module], errors[module] = cut.pair, cut.error
    rank = max(pair.rank for pair in pairs.values())
    first = inputs.loras[0][0].metadata
    said = ("hvtrain.base", "hvtrain.plan", "ss_sd_model_name", "modelspec.resolution")
    given: dict[str, object] = {key: first[key] for key in said if key in first}
    given[EXPERT_KEY] = cfg.expert or expert_told(inputs)
    given[LORA_FLAVOR_KEY] = cfg.flavor or next(iter(flavors_told(inputs)), None)
    if ids := owners_note(inputs.loras):
        given["ss_loraid"] = ids
    if rate := learning_rate(inputs.loras):  # by which a later merge with others may train it further
        given[RATE_KEY] = rate
    if under := inputs.built_on_others():
        given[BASE_LORA_KEY] = [one.entry for one in under]
    given["ss_training_comment"] = "merged: " + ", ".join(lora.path.name for lora, _ in inputs.loras)
    write_lora(
        cfg.output, pairs,
        metadata=lora_metadata(Path(cfg.output), given, architecture=architecture, rank=rank, alpha=rank)
    )
    worst = f", largest error of a layer {100 * max(errors.values()):.3g} %" if errors else ", exact"
    print(f"{cfg.output}: LoRA of {len(pairs)} layers, rank up to {rank}{worst}")
    return errors


def joined(result: Sequence[Contribution]) -> LoraPair:
    """Their sum as one pair: ranks add up, scales and multipliers go into the up-projections."""
    if len(result) == 1 and result[0].multiplier == 1.0:
        return result[0].pair
    up = torch.cat([c.pair.up.float() * (c.multiplier * c.pair.scale) for c in result], dim=1)
    down = torch.cat([c.pair.down.float() for c in result])
    return LoraPair(down, up, float(len(down)))
