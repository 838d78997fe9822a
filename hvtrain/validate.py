"""Rules that span several keys of a config. Besides a command's run(cfg), the only code that sees all of it.

No torch here, so that `hvtrain launch` refuses a bad config before it starts a process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hvtrain.config import EncodeConfig, GenerateConfig, ModelConfig, TrainConfig, asset
from hvtrain.errors import ConfigError


def check_train(cfg: TrainConfig) -> None:
    run = cfg.run
    _required(cfg.run.output_dir, "run.output_dir", "a directory for this run")
    if not cfg.data.shards:
        raise ConfigError("data.shards is empty: give the shard sets that `hvtrain encode` wrote")
    for path in (*cfg.data.shards, *cfg.eval.shards):
        _exists(path, "data.shards")
    if (run.steps is None) == (run.epochs is None):
        raise ConfigError("run: give either run.steps or run.epochs")
    for key, value in {
        "run.steps": run.steps, "run.epochs": run.epochs, "run.grad_accum": run.grad_accum,
        "data.batch_size": cfg.data.batch_size, "run.log_every": run.log_every,
    }.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{key} is {value}, expected more than 0")
    _share(cfg.data.caption_dropout, "data.caption_dropout")
    _share(run.ema_decay, "run.ema_decay")
    _files(cfg.model, ("dit",))
    if cfg.adapter.type == "lora" and cfg.model.dit is None:
        raise ConfigError("model.dit: a LoRA needs the weights it adapts; give the DiT's file")
    if cfg.adapter.type == "none" and cfg.model.dit is None and cfg.model.flavor is None:
        raise ConfigError("model.flavor: training from scratch (model.dit: null) needs the flavor to build")
    if cfg.adapter.type == "none" and cfg.adapter.init_from is not None:
        raise ConfigError("adapter.init_from: a full fine-tune has no adapter; give model.dit instead")
    if run.precision == "fp32" and cfg.adapter.type == "lora" and cfg.model.dtype != "float32":
        raise ConfigError(f"run.precision fp32 needs model.dtype float32, it is {cfg.model.dtype}")
    if run.ema_decay and cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3:
        raise ConfigError("run.ema_decay: ZeRO-3 keeps no whole weights to average; use zero.stage 0, 1 or 2")
    if cfg.preview.every_steps:
        _check_preview(cfg)


def _check_preview(cfg: TrainConfig) -> None:
    if not cfg.preview.prompts:
        raise ConfigError("preview.prompts is empty but preview.every_steps is set; give a prompt")
    _files(cfg.model, ("vae", "llm", "clip"), needed_for="preview videos")
    for i, p in enumerate(cfg.preview.prompts):
        check_size(f"preview.prompts[{i}].", width=p.width, height=p.height, frames=p.frames)


def check_encode(cfg: EncodeConfig) -> None:
    _required(cfg.dataset, "dataset", "a dataset file (TOML)")
    _exists(cfg.dataset, "dataset")
    _required(cfg.output, "output", "a directory for the shard set")
    legal = ("latents", "text")
    for column in cfg.columns:
        if column not in legal:
            raise ConfigError(f"columns: no column '{column}'; choose from {', '.join(legal)}")
    needed = (("vae",) if "latents" in cfg.columns else ()) + (("llm", "clip") if "text" in cfg.columns else ())
    _files(cfg.model, needed, needed_for="encoding")
    for key, value in {"batch_size": cfg.batch_size, "samples_per_tar": cfg.samples_per_tar}.items():
        if value < 1:
            raise ConfigError(f"{key} is {value}, expected 1 or more")


def check_generate(cfg: GenerateConfig) -> None:
    if (cfg.prompt is None) == (cfg.prompt_file is None):
        raise ConfigError("give either prompt or prompt_file")
    if cfg.prompt_file is not None:
        _exists(cfg.prompt_file, "prompt_file")
    _required(cfg.output, "output", "the .mp4 file to write (a directory with prompt_file)")
    check_size("", width=cfg.width, height=cfg.height, frames=cfg.frames)
    _files(cfg.model, ("dit", "vae", "llm", "clip"), needed_for="generation")
    for lora in cfg.lora:
        _exists(lora.path, "lora.path")
    for key, value in {"steps": cfg.steps, "fps": cfg.fps, "batch_size": cfg.batch_size, "shift": cfg.shift}.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{key} is {value}, expected more than 0")


def check_size(prefix: str, *, width: int | None, height: int | None, frames: int | None) -> None:
    """What the VAE's 4 x 8 x 8 cells and the DiT's 2 x 2 patches can hold."""
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value <= 0 or value % 16):
            near = max(16, round(value / 16) * 16)
            raise ConfigError(f"{prefix}{name} is {value}, expected a multiple of 16, for example {near}")
    if frames is not None and (frames < 1 or frames % 4 != 1):
        near = max(1, (frames - 1) // 4 * 4 + 1)
        raise ConfigError(f"{prefix}frames is {frames}, expected 4n + 1, for example {near} or {near + 4}")


def _files(model: ModelConfig, needed: Iterable[str], *, needed_for: str = "") -> None:
    for name in ("dit", "vae", "llm", "llm_tokenizer", "clip", "clip_tokenizer"):
        value = getattr(model, name)
        if value is not None:
            _exists(value, f"model.{name}")
        elif name in needed and needed_for:
            raise ConfigError(f"model.{name} is not set; {needed_for} needs it")


def _required(value: str, key: str, what: str) -> None:
    if not value:
        raise ConfigError(f"{key} is not set; give {what}")


def _exists(path: str, key: str) -> None:
    if not Path(asset(path)).exists():
        raise ConfigError(f"{key}: {path} does not exist")


def _share(value: float, key: str) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key} is {value}, expected at least 0 and below 1")
