"""`hvtrain merge`: LoRAs into a model file, or into one LoRA, with the proof that none overwrote another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import MergeConfig, asset
from hvtrain.errors import ConfigError
from hvtrain.lorafiles.files import LoraFile, write_lora
from hvtrain.lorafiles.lowrank import factor, shrink
from hvtrain.lorafiles.metadata import EXPERT_KEY, lora_metadata
from hvtrain.lorafiles.overlap import Contribution, by_layer
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.tools import blocks, open_any
from hvtrain.lorafiles.whole import summed
from hvtrain.merge.inputs import Inputs, lora_in, open_inputs, owners_note
from hvtrain.merge.policies import POLICIES, Dense, Options, Result, combine
from hvtrain.merge.report import Report, save_report
from hvtrain.merge.write import Target, plan_parts, plan_whole, refuse_scaled, signature, write_model
from hvtrain.models.load import Identified, identify, whole_model
from hvtrain.models.spec import ModelSpec
from hvtrain.registry import Registry
from hvtrain.weights.containers import Weights, fingerprint, open_weights
from hvtrain.weights.outputs import check_place

MERGED_KEY = "hvtrain.merged"  # metadata: what has been merged into a model, oldest first
_STALE = ("sshs_", "modelspec.hash_sha256")  # metadata that describes the bytes as they were
RECONCILERS: Registry[None] = Registry("way", dict.fromkeys(("none", "fit", "distill", "fit+distill")))
_DTYPES = Registry("dtype", {n: getattr(torch, n) for n in ("bfloat16", "float16", "float32")})

Evaluate = Callable[[Inputs, Mapping[str, Result]], dict[str, float]]


@dataclass(frozen=True)
class Base:
    """The model that LoRAs are merged into; without a file only its layers are known."""

    found: Identified | None
    shapes: dict[str, tuple[int, int]]
    fingerprint: str | None


def run(cfg: MergeConfig, evaluate: Evaluate | None = None) -> None:
    """Check, combine, write, report. A merged model has the input's names, layout, dtypes and metadata, as safetensors."""
    _check(cfg)
    base, spec = _open_base(cfg)
    inputs = open_inputs(cfg, base.shapes, spec, base=base.fingerprint)
    layers, how = by_layer(inputs.loras), cfg.reconcile.how
    whole = next((lora for lora, _ in inputs.loras if lora.whole), None)
    if whole is not None and (cfg.target == "lora" or how != "none" or evaluate):
        raise ConfigError(
            f"{whole.path}: adds to {len(whole.whole)} whole tensors, for which a LoRA has no place; merge it into a model, "
            "without --reconcile and --evaluate"
        )
    combined = combine(layers, cfg.on_overlap, Options(cfg.density, cfg.seed)) if how == "none" else {}
    for lora, multiplier in inputs.loras:
        print(f"{lora.summary()}, times {multiplier:g}{'' if multiplier else ' (off)'}; {blocks(lora.pairs)}")
    report = Report.of(inputs, layers, cfg.on_overlap if how == "none" else how)
    for line in report.lines():
        print(line)
    if how != "none":
        from hvtrain.merge.reconcile import leave_calibration, reconcile, write_slices

        reconciled = reconcile(cfg, inputs, report)
        combined = reconciled.changes
    if cfg.target == "lora":
        report.errors = _write_lora(cfg, inputs, combined, spec.name)
        if how != "none":
            print(f"{leave_calibration(cfg.reconcile, inputs, Path(cfg.output))}: to add LoRAs to this merge later")
    else:
        assert base.found is not None
        _write_model(cfg, base.found, inputs, combined, base.shapes)
    if how != "none":
        if folder := write_slices(Path(cfg.output), inputs, combined):
            print(f"{folder}: the slices as they are in this merge (generate slices={folder} --loraid ...)")
        reconciled.journal.remove()
    if evaluate is not None:
        report.losses = evaluate(inputs, combined)
        for name, loss in report.losses.items():
            print(f"held-out loss {loss:.5f}  {name}")
    for path in save_report(report, Path(cfg.output)):
        print(f"report: {path}")


def _check(cfg: MergeConfig) -> None:
    POLICIES.find(cfg.on_overlap, key="on_overlap")
    if cfg.dtype is not None:
        _DTYPES.find(cfg.dtype, key="dtype")
    if cfg.target not in ("model", "lora"):
        raise ConfigError(f"target (--as): '{cfg.target}', expected model or lora")
    if cfg.target == "model" and not cfg.dit:
        raise ConfigError("dit: the model to merge into; or give target=lora for one LoRA of all")
    if cfg.target == "model" and cfg.rank is not None:
        raise ConfigError("rank is for target lora; a model takes the whole change")
    if cfg.target == "lora" and (cfg.dtype or cfg.max_shard_gb):
        raise ConfigError("dtype and max_shard_gb are for target model")
    if cfg.rank is not None and cfg.rank < 1:
        raise ConfigError(f"rank is {cfg.rank}, expected 1 or more")
    if cfg.density is not None and not 0 < cfg.density <= 1:
        raise ConfigError(f"density is {cfg.density}, expected a share, more than 0 and at most 1")
    if cfg.max_shard_gb is not None and not 0 < cfg.max_shard_gb < math.inf:
        raise ConfigError(f"max_shard_gb is {cfg.max_shard_gb}, expected more than 0")
    for number, entry in enumerate(cfg.lora):
        if not math.isfinite(entry.multiplier):
            raise ConfigError(f"lora[{number}].multiplier is {entry.multiplier}, expected a finite number")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here; use cpu")
    if cfg.device not in ("cpu", "cuda"):
        raise ConfigError(f"device: '{cfg.device}', expected cpu or cuda")
    if not cfg.output:
        raise ConfigError("output is required: the file to write")
    if not cfg.lora and cfg.plan is None:
        raise ConfigError("lora: nothing to merge; give at least one LoRA file (--lora), or a plan (--plan)")
    for key, places in (("evaluate", cfg.evaluate), ("samples", cfg.reconcile.samples), ("keep", cfg.reconcile.keep)):
        for place in places:
            if not Path(place).is_dir() and not (key == "keep" and Path(place).is_file()):
                raise ConfigError(f"{key}: {place}: no such shard set{' or file of captions' if key == 'keep' else ''}")
    _check_reconcile(cfg)
    output = Path(cfg.output)
    for path in ([Path(asset(cfg.dit))] if cfg.dit else []) + [Path(entry.path) for entry in cfg.lora]:
        if output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"output: {output} is one of the inputs; choose another name")
    if output.suffix != ".safetensors" and (output.suffix or cfg.target == "lora"):
        raise ConfigError(f"output: {output} must end in .safetensors (or name a directory, for a sharded model)")
    check_place(output)


def _check_reconcile(cfg: MergeConfig) -> None:
    c = cfg.reconcile
    RECONCILERS.find(c.how, key="reconcile")
    if c.how == "none":
        if c.samples or c.keep:
            raise ConfigError(f"{'samples' if c.samples else 'keep'} is for --reconcile fit, distill or fit+distill")
        return
    if cfg.on_overlap != "error" or cfg.density is not None:
        raise ConfigError(f"--reconcile {c.how} decides what becomes of shared rows: leave --on-overlap and --density away")
    if not cfg.dit:
        raise ConfigError(f"dit: --reconcile {c.how} compares with the model; give it, also for --as lora")
    if off := [entry.path for entry in cfg.lora if entry.multiplier == 0]:
        raise ConfigError(f"{off[0]}: a multiplier of 0 leaves nothing to reconcile; leave it out")
    if cfg.rank is not None and c.how == "distill":
        raise ConfigError("rank: distill trains the LoRAs' own pairs, whose ranks add up; use fit+distill to have fewer")
    for key in ("states", "held_out", "steps", "batch_size", "ridge", "host_gb"):
        if not getattr(c, key) > 0:
            raise ConfigError(f"reconcile.{key} is {getattr(c, key)}, expected more than 0")
    if c.keep_weight < 0 or (c.lr is not None and not c.lr > 0):
        raise ConfigError(f"reconcile: keep_weight {c.keep_weight} and lr {c.lr}, expected 0 or more, and more than 0")


def _open_base(cfg: MergeConfig) -> tuple[Base, ModelSpec]:
    if not cfg.dit:
        first = lora_in(cfg.lora[0].path, cfg.expert) if cfg.lora else None
        if first is None:
            raise ConfigError("dit: the model that the plan's slices were trained on is needed to read them")
        known = open_any(first, expert=cfg.expert)
        return Base(None, dict(known.shapes), None), known.spec
    found = identify(Path(asset(cfg.dit)), model=cfg.model)
    shapes = linear_shapes(whole_model(found))
    return Base(found, shapes, fingerprint(found.weights)), found.spec


# --- into the model -------------------------------------------------------------------------------------------------


def _write_model(
    cfg: MergeConfig, found: Identified, inputs: Inputs, combined: Mapping[str, Result], shapes: Mapping[str, tuple[int, int]]
) -> None:
    added = summed(inputs.loras, found.shapes, once=cfg.on_overlap == "error")
    parts = plan_whole(found, added, plan_parts(found, combined, shapes))
    weights = open_weights(Path(asset(cfg.dit)))  # every tensor under the file's own name, also those that are not the DiT's
    refuse_scaled(weights, parts)
    target = Target(
        Path(cfg.output), _DTYPES[cfg.dtype] if cfg.dtype else None,
        int(cfg.max_shard_gb * 1e9) if cfg.max_shard_gb else None, cfg.device,
        signature([*weights.files, *(lora.path for lora, _ in inputs.loras)], repr(cfg)),
    )
    files = write_model(weights, parts, target, metadata=_metadata(weights, inputs.loras))
    where = f" in {len(files)} files" if len(files) > 1 else ""
    print(f"{cfg.output}: {len(parts)} of {len(weights)} tensors changed{where}")


def _metadata(weights: Weights, loras: Sequence[tuple[LoraFile, float]]) -> dict[str, str]:
    kept = {key: value for key, value in weights.metadata.items() if not key.startswith(_STALE)}
    history = json.loads(kept.get(MERGED_KEY, "[]"))
    for lora, multiplier in loras:
        entry: dict[str, object] = {"file": lora.path.name, "multiplier": multiplier}
        entry |= {key: lora.metadata[key] for key in ("sshs_model_hash", "ss_loraid") if key in lora.metadata}
        history.append(entry)
    return {**kept, MERGED_KEY: json.dumps(history)}


# --- into one LoRA --------------------------------------------------------------------------------------------------


def _write_lora(cfg: MergeConfig, inputs: Inputs, combined: Mapping[str, Result], architecture: str) -> dict[str, float]:
    """One pair per layer; the relative error of each that was cut."""
    pairs: dict[str, LoraPair] = {}
    errors: dict[str, float] = {}
    for module, result in combined.items():
        if isinstance(result, Dense):
            if cfg.rank is None:
                raise ConfigError(f"on_overlap {cfg.on_overlap} makes full matrices: give rank for the LoRA, or target=model")
            cut = factor(result.delta(), rank=cfg.rank)
        elif cfg.rank is not None:
            cut = shrink([(c.pair, c.multiplier) for c in result], rank=cfg.rank)
        else:
            pairs[module] = joined(result)
            continue
        pairs[module], errors[module] = cut.pair, cut.error
    rank = max(pair.rank for pair in pairs.values())
    first = inputs.loras[0][0].metadata
    said = ("hvtrain.base", "hvtrain.plan", EXPERT_KEY, "ss_sd_model_name", "modelspec.resolution")
    given: dict[str, object] = {key: first[key] for key in said if key in first}
    if ids := owners_note(inputs.loras):
        given["ss_loraid"] = ids
    given["ss_training_comment"] = "merged: " + ", ".join(lora.path.name for lora, _ in inputs.loras)
    write_lora(
        cfg.output, pairs, metadata=lora_metadata(Path(cfg.output), given, architecture=architecture, rank=rank, alpha=rank)
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
