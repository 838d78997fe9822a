"""The architecture that the embedded models are small copies of: the default of `model.name`."""

from __future__ import annotations

from hvtrain.config import ModelConfig
from hvtrain.models import find
from hvtrain.models.spec import TinyParts


def embedded_parts() -> TinyParts:
    spec = find(ModelConfig().name)
    assert spec.tiny is not None, f"{spec.name} says nothing of small copies"
    return spec.tiny
