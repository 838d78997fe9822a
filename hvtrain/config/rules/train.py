"""What a training run is asked for goes together."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from hvtrain.config import AdapterConfig, DataConfig, TrainConfig
from hvtrain.config.model import EXPERT
from hvtrain.config.rules.values import (
    SAMPLED,
    check_exists,
    check_files,
    check_given,
    check_sampling,
    check_share,
)
from hvtrain.config.sparse import check_values
from hvtrain.errors import ConfigError


def check_train(cfg: TrainConfig) -> None:
    run = cfg.run
    check_given(run.output_dir, "run.output_dir", "a directory for this run")
    if (
        not run.name.isprintable() or not run.name or Path(run.name).name != run.name
        or len(run.name.encode()) > 200
    ):
        raise ConfigError(
            f"run.name is {run.name[:200]!r}, expected the name of a file without a directory, as in my-lora"
        )
    if "\0" in run.output_dir:
        raise ConfigError(f"run.output_dir is {run.output_dir!r}, expected a path")
    _check_data(cfg.data)
    if (run.steps is None) == (run.epochs is None):
        raise ConfigError("run: give either run.steps or run.epochs")
    if run.epochs is not None and any(e.from_step or e.until_step for e in cfg.data.mixture):
        raise ConfigError(
            "run.epochs: data.mixture changes with the steps, and its epochs too; give run.steps"
        )
    _check_ranges(cfg)
    _check_subject(cfg)
    if run.ema_decay and cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3:
        raise ConfigError("run.ema_decay: ZeRO-3 keeps no whole weights to average; use zero.stage 0, 1 or 2")
    _check_memory(cfg)
    check_values(cfg.sparse, ring=cfg.parallel.ring)
    if run.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "run.wandb: the package wandb is not installed: pip install wandb, or leave run.wandb out"
        )
    if run.keep_best and not cfg.eval.every_steps:
        raise ConfigError(
            "run.keep_best: the best is told by the held-out loss; set eval.every_steps and eval.shards"
        )
    if cfg.eval.every_steps:
        _check_eval(cfg)
    if cfg.preview.wanted:
        _check_preview(cfg)


def _check_data(data: DataConfig) -> None:
    if not data.sets:
        raise ConfigError("data.shards is empty: give the shard sets that `hvtrain encode` wrote")
    if data.shards and data.mixture:
        raise ConfigError("data: give either data.shards or data.mixture")
    if data.batch_tokens is not None and data.batch_size != 1:
        raise ConfigError("data: give either data.batch_size or data.batch_tokens")
    _sets(data.shards, "data.shards")
    for i, entry in enumerate(data.mixture):
        key = f"data.mixture[{i}]"
        check_given(entry.path, f"{key}.path", "a shard set")
        _sets([entry.path], f"{key}.path")
        if entry.weight is not None and not entry.weight > 0:
            raise ConfigError(f"{key}.weight is {entry.weight}, expected more than 0")
        if (entry.weight is None) != (data.mixture[0].weight is None):
            raise ConfigError(
                f"{key}.weight: weights are relative to each other; give one for every set, or none"
            )
        if entry.from_step < 0:
            raise ConfigError(f"{key}.from_step is {entry.from_step}, expected 0 or more")
        if entry.until_step is not None and entry.until_step <= entry.from_step:
            raise ConfigError(
                f"{key}.until_step is {entry.until_step}, expected more than its from_step, {entry.from_step}"
            )


def _check_ranges(cfg: TrainConfig) -> None:
    run, optim, flow = cfg.run, cfg.optim, cfg.flow
    for key, value in {
        "run.steps": run.steps, "run.epochs": run.epochs, "run.grad_accum": run.grad_accum,
        "run.log_every": run.log_every, "data.batch_size": cfg.data.batch_size,
        "adapter.rank": cfg.adapter.rank, "data.batch_tokens": cfg.data.batch_tokens,
        "adapter.alpha": cfg.adapter.alpha, "flow.shift": flow.shift,
        "flow.sigmoid_scale": flow.sigmoid_scale, "run.expert_turn": run.expert_turn,
        "flow.logit_std": flow.logit_std, "flow.huber_c": flow.huber_c, "flow.snr_gamma": flow.snr_gamma,
        "run.peak_tflops": run.peak_tflops,
    }.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{key} is {value}, expected more than 0")
    for key, value in {
        "optim.lr": optim.lr, "optim.eps": optim.eps, "optim.weight_decay": optim.weight_decay,
        "optim.max_grad_norm": optim.max_grad_norm, "run.save_every_steps": run.save_every_steps or 0,
        "run.save_every_epochs": run.save_every_epochs, "run.keep_last": run.keep_last,
        "run.blocks_to_swap": run.blocks_to_swap, "run.hang_timeout_s": run.hang_timeout_s,
        "run.max_bad_steps": run.max_bad_steps, "run.profile_every": run.profile_every,
        "data.workers": cfg.data.workers, "data.calibration": cfg.data.calibration,
        "eval.every_steps": cfg.eval.every_steps, "preview.every_steps": cfg.preview.every_steps,
        "preview.every_epochs": cfg.preview.every_epochs,
        "flow.noise_offset": flow.noise_offset,
    }.items():
        if not value >= 0:
            raise ConfigError(f"{key} is {value}, expected 0 or more")
    if not -1 <= flow.mode_scale <= 1.75:
        raise ConfigError(
            f"flow.mode_scale is {flow.mode_scale}, expected -1 to 1.75: beyond that it is no distribution"
        )
    for key, value in {
        "data.caption_dropout": cfg.data.caption_dropout, "run.ema_decay": run.ema_decay,
        "optim.betas[0]": optim.betas[0], "optim.betas[1]": optim.betas[1],
    }.items():
        check_share(value, key)
    if cfg.data.image_share is not None and not 0 <= cfg.data.image_share <= 1:
        raise ConfigError(f"data.image_share is {cfg.data.image_share}, expected a number from 0 to 1")


def _check_subject(cfg: TrainConfig) -> None:
    """What is trained, and in which precision."""
    model, adapter = cfg.model, cfg.adapter
    check_files(model)
    if adapter.type != "none" and model.dit is None and model.experts is None:
        raise ConfigError("model.dit: a LoRA needs the weights it adapts; give the DiT's file")
    if adapter.type == "none" and model.dit is None and model.flavor is None:
        raise ConfigError("model.flavor: training from scratch (model.dit: null) needs the flavor to build")
    if adapter.type == "none" and adapter.init_from is not None:
        raise ConfigError("adapter.init_from: a full fine-tune has no adapter; give model.dit instead")
    _check_slice(adapter)
    _check_adapter(adapter, scratch=model.dit is None and model.experts is None)
    if adapter.init_from is not None and (EXPERT not in adapter.init_from or model.experts is None):
        check_exists(adapter.init_from, "adapter.init_from")
    if cfg.run.precision == "fp32" and adapter.type != "none" and model.dtype != "float32":
        raise ConfigError(f"run.precision fp32 needs model.dtype float32, it is {model.dtype}")
    if model.dtype == "float16":
        raise ConfigError(
            "model.dtype float16 is not for training: gradients would underflow; use bfloat16 or float32"
        )


_LORA_S_OWN = (
    "rank_stable", "ranks", "alphas", "dropout", "rank_dropout", "module_dropout", "scale_weight_norms",
    "include", "exclude",
)  # fmt: skip


def _check_adapter(a: AdapterConfig, *, scratch: bool) -> None:
    """Keys of another kind of training, and numbers that mean nothing."""
    for key in _LORA_S_OWN if a.type == "none" else ("train", "freeze"):
        if getattr(a, key):
            what = (
                "a full fine-tune has no adapter"
                if a.type == "none" else f"it is for adapter.type none, it is {a.type}"
            )
            raise ConfigError(f"adapter.{key} is given, but {what}; leave it away")
    if scratch and (a.train or a.freeze or a.base_lora):
        raise ConfigError(
            "adapter.train, freeze and base_lora need weights that are there already; give model.dit"
        )
    if a.init_balance and a.init_from is None:
        raise ConfigError("adapter.init_balance is for adapter.init_from; give a file to start from")
    if a.init_from is not None and a.init != "zero":
        raise ConfigError(f"adapter.init {a.init} and adapter.init_from are two starts; keep one")
    if a.slice_type != "lora" and a.type != "loraid":
        raise ConfigError(
            f"adapter.slice_type is for adapter.type loraid, it is {a.type}; set adapter.type={a.slice_type}"
        )
    for key, share in {
        "dropout": a.dropout, "rank_dropout": a.rank_dropout, "module_dropout": a.module_dropout
    }.items():
        check_share(share, f"adapter.{key}")
    numbers = [*((f"adapter.{key}[{pattern}]", value) for key in ("ranks", "alphas", "lr_ratios")
                 for pattern, value in getattr(a, key).items())]  # fmt: skip
    for key, value in numbers:
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} is {value}, expected more than 0")
    if not 0 <= a.scale_weight_norms < math.inf:
        raise ConfigError(f"adapter.scale_weight_norms is {a.scale_weight_norms}, expected 0 or more")
    if a.factor != -1 and a.factor < 1:
        raise ConfigError(f"adapter.factor is {a.factor}, expected -1 or a size from 1")
    for one in a.base_lora:
        if EXPERT not in one.path:
            check_exists(one.path, "adapter.base_lora")
        if not math.isfinite(one.multiplier):
            raise ConfigError(
                f"adapter.base_lora: the multiplier of {one.path} is {one.multiplier}, expected a finite "
                "number"
            )


def _check_memory(cfg: TrainConfig) -> None:
    """Savers of memory that do not go together, and what to use instead."""
    whole, stage3 = cfg.adapter.type == "none", cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3
    if cfg.run.compile != "none" and stage3:
        raise ConfigError(
            "run.compile: ZeRO-3 gathers a block's weights in the middle of it; use zero.stage 0 to 2, or "
            "none"
        )
    if cfg.run.compile != "none" and cfg.adapter.dropout:
        raise ConfigError(
            "run.compile: what adapter.dropout draws cannot be compiled; use adapter.dropout=0, or none"
        )
    if cfg.run.blocks_to_swap:
        if whole:
            raise ConfigError(
                "run.blocks_to_swap: a full fine-tune changes all weights; use zero.offload_param"
            )
        if stage3:
            raise ConfigError(
                "run.blocks_to_swap: ZeRO-3 cuts the weights up; use zero.stage 0 to 2, or zero.offload_param"
            )
        if cfg.run.recompute == "none":
            raise ConfigError(
                "run.blocks_to_swap: the backward needs the weights again; use run.recompute full, selective "
                "or offload"
            )
    if cfg.model.quantize != "none":
        if whole:
            raise ConfigError(
                "model.quantize: a full fine-tune cannot train float8 weights; use model.quantize=none"
            )
        if stage3:
            raise ConfigError(
                "model.quantize: ZeRO-3 does not cut float8 weights up; use zero.stage 0, 1 or 2"
            )
    if cfg.run.idle_expert == "host":
        if whole or stage3:
            what = "a full fine-tune changes all weights" if whole else "ZeRO-3 cuts the weights up"
            raise ConfigError(
                f"run.idle_expert: {what}, so none is kept aside; use zero.stage=3 with zero.offload_param"
            )
        if cfg.model.experts is None:
            raise ConfigError(
                "run.idle_expert: is for a run of several experts; set model.experts, or leave it auto"
            )
    for key, path in {"zero.deepspeed": cfg.zero.deepspeed, "zero.nvme_path": cfg.zero.nvme_path}.items():
        if path is not None:
            check_exists(path, key)


def _check_slice(adapter: AdapterConfig) -> None:
    given = {"adapter.plan": adapter.plan, "adapter.blocks_per_loraid": adapter.blocks_per_loraid}
    if adapter.type != "loraid":
        for key, value in {**given, "adapter.loraid": adapter.loraid}.items():
            if value is not None:
                raise ConfigError(f"{key} is for adapter.type loraid, it is {adapter.type}")
        return
    if (adapter.plan is None) == (adapter.blocks_per_loraid is None):
        raise ConfigError(
            "adapter.type loraid: give adapter.plan (from `hvtrain slices plan`) or adapter.blocks_per_loraid"
        )
    if adapter.plan is not None:
        check_exists(adapter.plan, "adapter.plan")
        if adapter.include or adapter.exclude:
            raise ConfigError(
                "adapter.include and adapter.exclude: a plan says which layers; give them to `hvtrain slices "
                "plan`"
            )
    if adapter.loraid is None:
        raise ConfigError("adapter.loraid: which slice of the plan? a number from 1")


def _sets(paths: Sequence[str], key: str) -> None:
    for path in paths:
        if "://" not in path:
            check_exists(path, key)


def _check_eval(cfg: TrainConfig) -> None:
    if not cfg.eval.shards:
        raise ConfigError(
            "eval.shards is empty but eval.every_steps is set; give shard sets that are not trained on"
        )
    _sets(cfg.eval.shards, "eval.shards")
    if not cfg.eval.quantiles or any(not 0 < q < 1 for q in cfg.eval.quantiles):
        raise ConfigError(f"eval.quantiles is {list(cfg.eval.quantiles)}, expected numbers between 0 and 1")
    if cfg.eval.max_batches < 1:
        raise ConfigError(f"eval.max_batches is {cfg.eval.max_batches}, expected 1 or more")


def _check_preview(cfg: TrainConfig) -> None:
    if not cfg.preview.prompts and cfg.preview.prompt_file is None:
        raise ConfigError(
            "preview.prompts is empty but previews are asked for; give a prompt, or preview.prompt_file"
        )
    if cfg.preview.prompt_file is not None:
        check_exists(cfg.preview.prompt_file, "preview.prompt_file")
    if cfg.preview.ema and not cfg.run.ema_decay:
        raise ConfigError("preview.ema: the run keeps no moving average; set run.ema_decay, as in 0.99")
    check_files(cfg.model, columns=SAMPLED, needed_for="preview videos")
    check_sampling(cfg.preview, "preview.")
    for i, prompt in enumerate(cfg.preview.prompts):
        check_sampling(prompt, f"preview.prompts[{i}].")
