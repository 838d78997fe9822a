"""The LoRA that a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import yaml

from hvtrain.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"


def lora_in(path: str | Path) -> Path:
    """A LoRA file, or the finished one of a run's directory."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path} does not exist; give a LoRA file or a run's directory")
        return path
    found = finished(path)
    if isinstance(found, str):
        raise CheckpointError(f"{path}: {found}")
    return found


def finished(folder: Path) -> Path | str:
    """The LoRA of a run that has ended, or why there is none."""
    config = folder / CONFIG
    if not config.is_file():
        return f"{folder} holds no run"
    try:
        name = (yaml.safe_load(config.read_text()) or {}).get("run", {}).get("name", "lora")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return f"{config} is damaged: not the config of a run"
    path = folder / f"{name}.safetensors"
    return path if path.is_file() else f"{folder} is not finished (no {path.name} yet)"


