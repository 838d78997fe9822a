"""Rules that span several keys of a config. Besides a command's run(cfg), the only code that sees all of it.

No torch here, so that `hvtrain launch` refuses a bad config before it starts a process.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from hvtrain.config import (
    AdapterConfig,
    DataConfig,
    EncodeConfig,
    GenerateConfig,
    MergeConfig,
    ModelConfig,
    Sampling,
    TrainConfig,
    asset,
)
from hvtrain.config.model import EXPERT
from hvtrain.config.parts import MASK, parts_of
from hvtrain.config.sampling import check_limits
from hvtrain.config.sparse import check_values
from hvtrain.errors import ConfigError

SAMPLED = ("latents", "text")  # columns whose encoders make a video of a prompt


def check_train(cfg: TrainConfig) -> None:
    run = cfg.run
    _required(run.output_dir, "run.output_dir", "a directory for this run")
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
        _required(entry.path, f"{key}.path", "a shard set")
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
        _share(value, key)
    if cfg.data.image_share is not None and not 0 <= cfg.data.image_share <= 1:
        raise ConfigError(f"data.image_share is {cfg.data.image_share}, expected a number from 0 to 1")


def _check_subject(cfg: TrainConfig) -> None:
    """What is trained, and in which precision."""
    model, adapter = cfg.model, cfg.adapter
    _files(model)
    if adapter.type != "none" and model.dit is None and model.experts is None:
        raise ConfigError("model.dit: a LoRA needs the weights it adapts; give the DiT's file")
    if adapter.type == "none" and model.dit is None and model.flavor is None:
        raise ConfigError("model.flavor: training from scratch (model.dit: null) needs the flavor to build")
    if adapter.type == "none" and adapter.init_from is not None:
        raise ConfigError("adapter.init_from: a full fine-tune has no adapter; give model.dit instead")
    _check_slice(adapter)
    _check_adapter(adapter, scratch=model.dit is None and model.experts is None)
    if adapter.init_from is not None and (EXPERT not in adapter.init_from or model.experts is None):
        _exists(adapter.init_from, "adapter.init_from")
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
        _share(share, f"adapter.{key}")
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
            _exists(one.path, "adapter.base_lora")
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
            _exists(path, key)


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
        _exists(adapter.plan, "adapter.plan")
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
            _exists(path, key)


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
        _exists(cfg.preview.prompt_file, "preview.prompt_file")
    if cfg.preview.ema and not cfg.run.ema_decay:
        raise ConfigError("preview.ema: the run keeps no moving average; set run.ema_decay, as in 0.99")
    _files(cfg.model, columns=SAMPLED, needed_for="preview videos")
    _check_sampling(cfg.preview, "preview.")
    for i, prompt in enumerate(cfg.preview.prompts):
        _check_sampling(prompt, f"preview.prompts[{i}].")


def check_encode(cfg: EncodeConfig) -> None:
    _required(cfg.dataset, "dataset", "a dataset file (TOML or YAML)")
    _exists(cfg.dataset, "dataset")
    _required(cfg.output, "output", "a directory for the shard set")
    legal = list(
        dict.fromkeys([*(c for part in parts_of(cfg.model.name).values() for c in part.makes), MASK])
    )
    if not cfg.columns or len(set(cfg.columns)) < len(cfg.columns):
        raise ConfigError(f"columns is {list(cfg.columns)}, expected some of {', '.join(legal)}, each once")
    for column in cfg.columns:
        if column not in legal:
            raise ConfigError(f"columns: no column '{column}'; choose from {', '.join(legal)}")
    _files(cfg.model, columns=cfg.columns, needed_for="encoding")
    for key, value in {"batch_size": cfg.batch_size, "samples_per_tar": cfg.samples_per_tar}.items():
        if value < 1:
            raise ConfigError(f"{key} is {value}, expected 1 or more")


def check_generate(cfg: GenerateConfig) -> None:
    if cfg.model.experts is not None:
        raise ConfigError(
            f"model.experts is '{cfg.model.experts}': it is for training, sampling takes all of them; leave "
            "it out"
        )
    if cfg.slices is not None:
        _exists(cfg.slices, "slices")
    elif cfg.loraid or cfg.lora_multiplier:
        raise ConfigError(
            "loraid and lora_multiplier choose among the slices of a run: give slices, its directory"
        )
    if len(cfg.lora_multiplier) > 1 and len(cfg.lora_multiplier) != len(cfg.loraid):
        raise ConfigError(
            f"lora_multiplier has {len(cfg.lora_multiplier)} values for {len(cfg.loraid)} slices in loraid; "
            "give one each, or one"
        )
    if (cfg.prompt is None) == (cfg.prompt_file is None):
        raise ConfigError("give either prompt or prompt_file")
    if cfg.prompt_file is not None:
        _exists(cfg.prompt_file, "prompt_file")
    _required(cfg.output, "output", "the .mp4 file to write (a directory with prompt_file)")
    _files(cfg.model, columns=SAMPLED, dit=True, needed_for="generation")
    for lora in cfg.lora:
        _exists(lora.path, "lora.path")
    if cfg.blocks_to_swap < 0:
        raise ConfigError(f"blocks_to_swap is {cfg.blocks_to_swap}, expected 0 or more")
    if cfg.shard_weights and cfg.blocks_to_swap:
        raise ConfigError(
            "shard_weights and blocks_to_swap both say where the blocks' weights are; choose one"
        )
    if cfg.shard_weights and cfg.parallel.ulysses * cfg.parallel.ring == 1:
        how = "parallel.ulysses or parallel.ring, with hvtrain launch --nproc N"
        raise ConfigError(
            f"shard_weights: cuts them over the ranks that share a video; have them share one ({how})"
        )
    if cfg.batch_size <= 0:
        raise ConfigError(f"batch_size is {cfg.batch_size}, expected more than 0")
    check_values(cfg.sparse, ring=cfg.parallel.ring)
    _check_sampling(cfg)


def check_merge(cfg: MergeConfig) -> None:
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
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: '{cfg.device}', expected auto, cpu or cuda")
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
    _check_reconcile(cfg)
    output = Path(cfg.output)
    for path in ([Path(asset(cfg.dit))] if cfg.dit else []) + [Path(entry.path) for entry in cfg.lora]:
        if output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"output: {output} is one of the inputs; choose another name")
    if output.suffix != ".safetensors" and (output.suffix or cfg.target == "lora"):
        raise ConfigError(
            f"output: {output} must end in .safetensors (or name a directory, for a sharded model)"
        )


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
        if not getattr(c, key) > 0:
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
    if not cfg.dit:
        raise ConfigError(f"dit: --reconcile {c.how} compares with the model; give it, also for --as lora")
    if off := [entry.path for entry in cfg.lora if entry.multiplier == 0]:
        raise ConfigError(f"{off[0]}: a multiplier of 0 leaves nothing to reconcile; leave it out")
    if cfg.rank is not None and c.how == "distill":
        raise ConfigError(
            "rank: distill trains the LoRAs' own pairs, whose ranks add up; use fit+distill to have fewer"
        )


def _check_sampling(values: Sampling, prefix: str = "") -> None:
    check_limits(values, prefix=prefix)
    for key, path in {"image": values.image, "end_image": values.end_image, "video": values.video}.items():
        if path is not None:
            _exists(path, prefix + key)


def _files(
    model: ModelConfig, *, columns: Iterable[str] = (), dit: bool = False, needed_for: str = ""
) -> None:
    """What is given exists, and what makes these columns is given."""
    for name, part in parts_of(model.name).items():
        value = model.file(name)
        if value is not None:
            _exists(value, f"model.{name}")
        elif (name == "dit" and dit) or (set(part.makes) & set(columns) and not part.optional):
            raise ConfigError(f"model.{name} is not set; {needed_for} needs it ({part.about})")


def _required(value: str, key: str, what: str) -> None:
    if not value:
        raise ConfigError(f"{key} is not set; give {what}")


def _exists(path: str, key: str) -> None:
    try:
        there = Path(asset(path)).exists()
    except OSError as error:
        raise ConfigError(f"{key}: {path[:100]} cannot be looked at ({error.strerror})") from None
    if not there:
        raise ConfigError(f"{key}: {path} does not exist")


def _share(value: float, key: str) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key} is {value}, expected at least 0 and below 1")
