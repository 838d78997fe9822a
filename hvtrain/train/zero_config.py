"""What DeepSpeed is told: its JSON, made from ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hvtrain.config import ZeroConfig
from hvtrain.train.engine import Step, own_settings

PREFETCH = 1 << 28  # elements of weights that ZeRO-3 gathers ahead: most of a large block


def ds_config(cfg: ZeroConfig, model: nn.Module, *, cuda: bool, step: Step) -> dict[str, Any]:
    """DeepSpeed's JSON. Bucket sizes follow the model: the default would reserve 2 GB for a LoRA of 20 MB."""
    largest = 1 << 28 if cfg.bucket_mb is None else int(cfg.bucket_mb * 2**18)
    bucket = max(1, min(sum(p.numel() for p in model.parameters() if p.requires_grad), largest))
    zero: dict[str, Any] = {
        "stage": cfg.stage,
        # On a stream of its own, which only a GPU has: only where there is much to hide. A LoRA's
        # gradients take milliseconds.
        "overlap_comm": cuda and cfg.stage > 0 and all(p.requires_grad for p in model.parameters()),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    for key, place in (("offload_optimizer", cfg.offload_optimizer), ("offload_param", cfg.offload_param)):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": cuda}
        if place == "nvme":
            zero[key]["nvme_path"] = cfg.nvme_path
    if cfg.offload_param == "nvme":
        # One buffer holds one partition, so the largest parameter decides; DeepSpeed's
        # default is made for its own models.
        zero["offload_param"]["buffer_size"] = max(p.numel() for p in model.parameters())
        zero["offload_param"]["buffer_count"] = 8
    if cfg.stage == 3:
        # Norms and biases stay whole on every rank: a gather for each costs more than it saves.
        vectors = max((p.numel() for p in model.parameters() if p.ndim < 2), default=0)
        zero |= {"stage3_param_persistence_threshold": vectors, "stage3_prefetch_bucket_size": PREFETCH}
        # DeepSpeed's own linear replaces torch's for good and everywhere; of frozen layers
        # it would keep the inputs too.
        zero["memory_efficient_linear"] = False
    made = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own counters read it
        "gradient_accumulation_steps": step.grad_accum,
        # Stage 0 has no clipping of its own that knows our groups, nor a check for
        # NaN: `accumulate` does both.
        "gradient_clipping": step.max_grad_norm if cfg.stage else 0.0,
        "communication_data_type": cfg.communication_dtype,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return made if cfg.deepspeed is None else _merged(made, own_settings(cfg.deepspeed))


def _merged(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key for key, value in over.items() if isinstance(value, dict) and isinstance(under.get(key), dict)
    }
    return {**under, **over, **{key: _merged(under[key], over[key]) for key in both}}
