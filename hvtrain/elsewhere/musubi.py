"""musubi-tuner: command lines (of caching and of training), its config TOML, or a
file with a command line in it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvtrain.elsewhere.source import (
    Foreign,
    Words,
    command_line,
    is_file,
    number,
    read_file,
    scalar,
    tables,
    words_of,
)
from hvtrain.errors import ConfigError

_LISTS = ("network_args", "optimizer_args", "lr_scheduler_args")  # of KEY=VALUE
_REX = {"lr_scheduler_args.rex_alpha": 0.1, "lr_scheduler_args.rex_beta": 0.9}
_DATASETS = "batch_size"


def read(given: Sequence[str]) -> Foreign:
    options: dict[str, Any] = {}
    called: list[str] = []
    gpus = 1
    for part in map(_words, given):
        if "config_file" in part.options:
            name = str(part.options.pop("config_file"))
            part.options = _config(name if Path(name).suffix == ".toml" else f"{name}.toml") | part.options
        if "num_processes" in part.launcher:
            gpus = number(part.launcher.pop("num_processes"), "--num_processes")
        options |= {f"accelerate.{key}": value for key, value in part.launcher.items()} | part.options
        called.append(part.program)
    called.append(str(options.get("network_module", "")))
    for name in _LISTS:
        options |= _pairs(name, options.pop(name, []))
    if _REX.keys() & options.keys():
        options["lr_scheduler_args.rex"] = [options.pop(key, default) for key, default in _REX.items()]
    if files := options.pop("base_weights", None):
        several = files if isinstance(files, list) else [files]
        given_factors = options.pop("base_weights_multiplier", [])
        factors = given_factors if isinstance(given_factors, list) else [given_factors]
        padded = [*factors, *[1.0] * (len(several) - len(factors))]
        options["base_lora"] = [{"path": str(f), "multiplier": x} for f, x in zip(several, padded)]
    warmup = options.get("lr_warmup_steps")
    if isinstance(warmup, float) or str(warmup).endswith("%"):
        options["lr_warmup_steps.share"] = scalar(str(options.pop("lr_warmup_steps")).rstrip("%"))
        options["lr_warmup_steps.share"] /= 100 if str(warmup).endswith("%") else 1
    if "dataset_config" in options:
        options |= _of_dataset(str(options["dataset_config"]))
    return Foreign(options, called, dash="--", gpus=gpus)


def _words(given: str) -> Words:
    if is_file(given) and given.endswith(".toml"):
        return Words(options=_config(given))
    if is_file(given):
        return command_line(words_of(Path(given).read_text(encoding="utf-8-sig", errors="replace")))
    if given.endswith((".toml", ".txt", ".sh", ".args")) and len(given.split()) == 1:
        raise ConfigError(f"{given}: no such file")
    return command_line(words_of(given))


def _config(path: str) -> dict[str, Any]:
    """Sections are only for the eye."""
    found: dict[str, Any] = {}
    for key, value in read_file(path).items():
        found |= value if isinstance(value, Mapping) else {key: value}
    return found


def _pairs(name: str, given: Any) -> dict[str, Any]:
    found = {}
    for item in given if isinstance(given, list) else [given]:
        key, sign, text = str(item).partition("=")
        if not sign:
            raise ConfigError(f"--{name} {item}: expected KEY=VALUE")
        text = text.strip("[]()") if key == "betas" else text
        several = [scalar(part.strip()) for part in text.split(",")] if "," in text else scalar(text)
        found[f"{name}.{key}"] = _patterns(key, text) if key.endswith("_patterns") else several
    return found


def _patterns(key: str, text: str) -> list[str]:
    """A Python list of what the names begin with; here a pattern is for the whole name."""
    try:
        given = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        given = None
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ConfigError(f"{key}={text}: expected a list of patterns, as in \"{key}=[r'.*mlp.*']\"")
    return [one if one.endswith(".*") else f"(?:{one}).*" for one in given]


def _of_dataset(path: str) -> dict[str, Any]:
    """What the dataset file says that is of training here. Our encode reads the rest of it."""
    if not is_file(path):
        return {}
    raw = read_file(path)
    parts = [raw.get("general") or {}, *tables(raw.get("datasets"), f"{path}: datasets")]
    sizes = [t[_DATASETS] for t in parts if isinstance(t, Mapping) and isinstance(t.get(_DATASETS), int)]
    return {f"dataset_config.{_DATASETS}": max(sizes)} if sizes else {}
