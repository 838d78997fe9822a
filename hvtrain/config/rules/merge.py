"""What a merge is asked for."""

from __future__ import annotations

import math
from pathlib import Path

from hvtrain.config import MergeConfig, asset
from hvtrain.errors import ConfigError


def check_merge(cfg: MergeConfig) -> None:
    if cfg.target not in ("model", "lora"):
        raise ConfigError(f"target (--as): '{cfg.target}', expected model or lora")
    if cfg.target == "model" and not cfg.dit:
        raise ConfigError("dit: the model to merge into; or give target=lora for one LoRA of all")
    if cfg.reconcile.how not in ("auto", "none") and not cfg.dit:
        raise ConfigError(
            f"dit: --reconcile {cfg.reconcile.how} compares with the model; give it, also for --as lora"
        )
    check_merge_values(cfg)
    if not cfg.output:
        raise ConfigError("output is required: the file to write")
    if not cfg.lora and cfg.plan is None:
        raise ConfigError("lora: nothing to merge; give at least one LoRA file (--lora), or a plan (--plan)")
    for key, places in (
        ("evaluate", cfg.evaluate), ("samples", cfg.reconcile.samples), ("keep", cfg.reconcile.keep)
    ):
        for place in places:
            if not Path(place).is_dir() and not (key == "keep" and Path(place).is_file()):
                raise ConfigError(
                    f"{key}: {place}: no such shard set{' or file of captions' if key == 'keep' else ''}"
                )
    output = Path(cfg.output)
    for path in ([Path(asset(cfg.dit))] if cfg.dit else []) + [Path(entry.path) for entry in cfg.lora]:
        if output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"output: {output} is one of the inputs; choose another name")
    if output.suffix != ".safetensors" and (output.suffix or cfg.target == "lora"):
        raise ConfigError(
            f"output: {output} must end in .safetensors (or name a directory, for a sharded model)"
        )


def check_merge_values(cfg: MergeConfig) -> None:
    """What can be wrong with a merge of which no file is known yet."""
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
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: '{cfg.device}', expected auto, cpu or cuda")
    _check_reconcile(cfg)


def _check_reconcile(cfg: MergeConfig) -> None:
    c = cfg.reconcile
    if c.how == "none":
        if c.samples or c.keep:
            raise ConfigError(
                f"{'samples' if c.samples else 'keep'} is for --reconcile fit, distill or fit+distill"
            )
        return
    if c.how != "auto":
        _check_reconciling(cfg)
    for key in ("states", "held_out", "steps", "batch_size", "ridge", "host_gb"):
        value = getattr(c, key)
        if value is not None and not value > 0:
            raise ConfigError(f"reconcile.{key} is {getattr(c, key)}, expected more than 0")
    if c.keep_weight < 0 or (c.lr is not None and not c.lr > 0):
        raise ConfigError(
            f"reconcile: keep_weight {c.keep_weight} and lr {c.lr}, expected 0 or more, and more than 0"
        )


def _check_reconciling(cfg: MergeConfig) -> None:
    """What a way that was asked for does not go with; one that is chosen
    (merge/choose.py) is chosen where it can be."""
    c = cfg.reconcile
    if cfg.on_overlap != "error" or cfg.density is not None:
        raise ConfigError(
            f"--reconcile {c.how} decides what becomes of shared rows: leave --on-overlap and --density away"
        )
    if off := [entry.path for entry in cfg.lora if entry.multiplier == 0]:
        raise ConfigError(f"{off[0]}: a multiplier of 0 leaves nothing to reconcile; leave it out")
    if cfg.rank is not None and c.how == "distill":
        raise ConfigError(
            "rank: distill trains the LoRAs' own pairs, whose ranks add up; use fit+distill to have fewer"
        )
