"""The architectures. A model is a sub-folder that defines SPEC: it is found, never listed, here or
elsewhere on Python's path."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from hvtrain.models.spec import ModelSpec
from hvtrain.registry import Registry

__path__ = pkgutil.extend_path(__path__, __name__)


@cache
def all_specs() -> tuple[ModelSpec, ...]:
    folders = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)
    return tuple(importlib.import_module(f"{__name__}.{folder}").SPEC for folder in folders)


def find(name: str, *, key: str = "model.name") -> ModelSpec:
    return Registry("model", {spec.name: spec for spec in all_specs()}).find(name, key=key)
