"""The embedded models: which architectures have a small copy, and where its files and configs lie."""

from __future__ import annotations

from pathlib import Path

from hvtrain.config import ModelConfig
from hvtrain.errors import ConfigError
from hvtrain.models import find
from hvtrain.models.spec import TinyParts

ASSETS = Path(__file__).parent / "assets"
DEFAULT = ModelConfig().name


def embedded_parts(model: str = DEFAULT, *, key: str = "model") -> TinyParts:
    """Raises ConfigError, naming the option `key`, for a model that is not there, or has no small copy."""
    spec = find(model, key=key)
    if spec.tiny is None:
        raise ConfigError(f"{key}: {model} has no tiny copy that ships with hvtrain")
    return spec.tiny()
