"""Rules that span several keys of a config. Besides a command's run(cfg), the only code that sees all of it.

No torch here, so that `hvtrain launch` refuses a bad config before it starts a process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from hvtrain.config import (
    AdapterConfig,
    DataConfig,
    EncodeConfig,
    GenerateConfig,
    ModelConfig,
    Sampling,
    TrainConfig,
    asset,
)
from hvtrain.config.parts import parts_of
from hvtrain.config.sampling import check_limits
from hvtrain.errors import ConfigError

SAMPLED = ("latents", "text")  # columns whose encoders make a video of a prompt


def check_train(cfg: TrainConfig) -> None:
    run = cfg.run
    _required(run.output_dir, "run.output_dir", "a directory for this run")
    if not run.name.isprintable() or not run.name or Path(run.name).name != run.name or len(run.name.encode()) > 200:
        raise ConfigError(f"run.name is {run.name[:200]!r}, expected the name of a file without a directory, as in my-lora")
    if "\0" in run.output_dir:
        raise ConfigError(f"run.output_dir is {run.output_dir!r}, expected a path")
    _check_data(cfg.data)
    if (run.steps is None) == (run.epochs is None):
        raise ConfigError("run: give either run.steps or run.epochs")
    if run.epochs is not None and any(e.from_step or e.until_step for e in cfg.data.mixture):
        raise ConfigError("run.epochs: data.mixture changes with the steps, and its epochs too; give run.steps")
    _check_ranges(cfg)
    _check_subject(cfg)
    if run.ema_decay and cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3:
        raise ConfigError("run.ema_decay: ZeRO-3 keeps no whole weights to average; use zero.stage 0, 1 or 2")
    _check_memory(cfg)
    if run.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("run.wandb: the package wandb is not installed: pip install wandb, or leave run.wandb out")
    if run.keep_best and not cfg.eval.every_steps:
        raise ConfigError("run.keep_best: the best is told by the held-out loss; set eval.every_steps and eval.shards")
    if cfg.eval.every_steps:
        _check_eval(cfg)
    if cfg.preview.every_steps:
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
            raise ConfigError(f"{key}.weight: weights are relative to each other; give one for every set, or none")
        if entry.from_step < 0:
            raise ConfigError(f"{key}.from_step is {entry.from_step}, expected 0 or more")
        if entry.until_step is not None and entry.until_step <= entry.from_step:
            raise ConfigError(f"{key}.until_step is {entry.until_step}, expected more than its from_step, {entry.from_step}")


def _check_ranges(cfg: TrainConfig) -> None:
    run, optim, flow = cfg.run, cfg.optim, cfg.flow
    for key, value in {
        "run.steps": run.steps, "run.epochs": run.epochs, "run.grad_accum": run.grad_accum,
        "run.log_every": run.log_every, "data.batch_size": cfg.data.batch_size, "adapter.rank": cfg.adapter.rank,
        "data.batch_tokens": cfg.data.batch_tokens,
        "adapter.alpha": cfg.adapter.alpha, "flow.shift": flow.shift, "flow.sigmoid_scale": flow.sigmoid_scale,
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
    }.items():
        if not value >= 0:
            raise ConfigError(f"{key} is {value}, expected 0 or more")
    for key, value in {
        "data.caption_dropout": cfg.data.caption_dropout, "run.ema_decay": run.ema_decay,
        "optim.betas[0]": optim.betas[0], "optim.betas[1]": optim.betas[1],
    }.items():
        _share(value, key)


def _check_subject(cfg: TrainConfig) -> None:
    """What is trained, and in which precision."""
    model, adapter = cfg.model, cfg.adapter
    _files(model)
    if adapter.type != "none" and model.dit is None and model.expert is None:
        raise ConfigError("model.dit: a LoRA needs the weights it adapts; give the DiT's file")
    if adapter.type == "none" and model.dit is None and model.flavor is None:
        raise ConfigError("model.flavor: training from scratch (model.dit: null) needs the flavor to build")
    if adapter.type == "none" and adapter.init_from is not None:
        raise ConfigError("adapter.init_from: a full fine-tune has no adapter; give model.dit instead")
    _check_slice(adapter)
    if adapter.init_from is not None:
        _exists(adapter.init_from, "adapter.init_from")
    if cfg.run.precision == "fp32" and adapter.type != "none" and model.dtype != "float32":
        raise ConfigError(f"run.precision fp32 needs model.dtype float32, it is {model.dtype}")
    if model.dtype == "float16":
        raise ConfigError("model.dtype float16 is not for training: gradients would underflow; use bfloat16 or float32")


def _check_memory(cfg: TrainConfig) -> None:
    """Savers of memory that do not go together, and what to use instead."""
    whole, stage3 = cfg.adapter.type == "none", cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3
    if cfg.run.blocks_to_swap:
        if whole:
            raise ConfigError("run.blocks_to_swap: a full fine-tune changes all weights; use zero.offload_param")
        if stage3:
            raise ConfigError("run.blocks_to_swap: ZeRO-3 cuts the weights up; use zero.stage 0 to 2, or zero.offload_param")
        if cfg.run.recompute == "none":
            raise ConfigError(
                "run.blocks_to_swap: the backward needs the weights again; use run.recompute full, selective or offload"
            )
    if cfg.model.quantize != "none":
        if whole:
            raise ConfigError("model.quantize: a full fine-tune cannot train float8 weights; use model.quantize=none")
        if stage3:
            raise ConfigError("model.quantize: ZeRO-3 does not cut float8 weights up; use zero.stage 0, 1 or 2")
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
        raise ConfigError("adapter.type loraid: give adapter.plan (from `hvtrain slices plan`) or adapter.blocks_per_loraid")
    if adapter.plan is not None:
        _exists(adapter.plan, "adapter.plan")
        if adapter.include or adapter.exclude:
            raise ConfigError("adapter.include and adapter.exclude: a plan says which layers; give them to `hvtrain slices plan`")
    if adapter.loraid is None:
        raise ConfigError("adapter.loraid: which slice of the plan? a number from 1")


def _sets(paths: Sequence[str], key: str) -> None:
    for path in paths:
        if "://" not in path:
            _exists(path, key)


def _check_eval(cfg: TrainConfig) -> None:
    if not cfg.eval.shards:
        raise ConfigError("eval.shards is empty but eval.every_steps is set; give shard sets that are not trained on")
    _sets(cfg.eval.shards, "eval.shards")
    if not cfg.eval.quantiles or any(not 0 < q < 1 for q in cfg.eval.quantiles):
        raise ConfigError(f"eval.quantiles is {list(cfg.eval.quantiles)}, expected numbers between 0 and 1")
    if cfg.eval.max_batches < 1:
        raise ConfigError(f"eval.max_batches is {cfg.eval.max_batches}, expected 1 or more")


def _check_preview(cfg: TrainConfig) -> None:
    if not cfg.preview.prompts:
        raise ConfigError("preview.prompts is empty but preview.every_steps is set; give a prompt")
    _files(cfg.model, columns=SAMPLED, needed_for="preview videos")
    _check_sampling(cfg.preview, "preview.")
    for i, prompt in enumerate(cfg.preview.prompts):
        _check_sampling(prompt, f"preview.prompts[{i}].")


def check_encode(cfg: EncodeConfig) -> None:
    _required(cfg.dataset, "dataset", "a dataset file (TOML or YAML)")
    _exists(cfg.dataset, "dataset")
    _required(cfg.output, "output", "a directory for the shard set")
    legal = list(dict.fromkeys(c for part in parts_of(cfg.model.name).values() for c in part.makes))
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
    if cfg.model.expert is not None:
        raise ConfigError(f"model.expert is '{cfg.model.expert}': it is for training, sampling takes all of them; leave it out")
    if cfg.slices is not None:
        _exists(cfg.slices, "slices")
    elif cfg.loraid or cfg.lora_multiplier:
        raise ConfigError("loraid and lora_multiplier choose among the slices of a run: give slices, its directory")
    if len(cfg.lora_multiplier) > 1 and len(cfg.lora_multiplier) != len(cfg.loraid):
        raise ConfigError(
            f"lora_multiplier has {len(cfg.lora_multiplier)} values for {len(cfg.loraid)} slices in loraid; give one each, or one"
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
    if cfg.batch_size <= 0:
        raise ConfigError(f"batch_size is {cfg.batch_size}, expected more than 0")
    _check_sampling(cfg)


def _check_sampling(values: Sampling, prefix: str = "") -> None:
    check_limits(values, prefix=prefix)
    for key, path in {"image": values.image, "end_image": values.end_image}.items():
        if path is not None:
            _exists(path, prefix + key)


def _files(model: ModelConfig, *, columns: Iterable[str] = (), dit: bool = False, needed_for: str = "") -> None:
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
