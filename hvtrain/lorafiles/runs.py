"""The LoRA that a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import yaml

from hvtrain.config.model import BOTH
from hvtrain.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"


def lora_in(path: str | Path, expert: str | None = None) -> Path:
    """A LoRA file, or the finished one of a run's directory, of an expert where it trained several."""
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path} does not exist; give a LoRA file or a run's directory")
        return path
    found = finished(path, expert)
    if isinstance(found, str):
        raise CheckpointError(f"{path}: {found}")
    return found


def finished(folder: Path, expert: str | None = None) -> Path | str:
    """The LoRA of a run that has ended, of an expert where it trained several; or why there is none."""
    config = folder / CONFIG
    if not config.is_file():
        return f"{folder} holds no run"
    try:
        about = yaml.safe_load(config.read_text()) or {}
        name, experts = about.get("run", {}).get("name", "lora"), about.get("model", {}).get("experts")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return f"{config} is damaged: not the config of a run"
    if experts == BOTH and expert is None:
        return f"{folder} holds a LoRA for each of several experts; say which (expert)"
    path = folder / f"{name}-{expert}.safetensors" if experts == BOTH else folder / f"{name}.safetensors"
    return path if path.is_file() else f"{folder} is not finished (no {path.name} yet)"


