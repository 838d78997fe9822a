"""The architectures. A model is a sub-folder that defines SPEC: it is found, never listed."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from hvtrain.errors import ConfigError, suggest
from hvtrain.models.spec import ModelSpec


@cache
def all_specs() -> tuple[ModelSpec, ...]:
    folders = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)
    return tuple(importlib.import_module(f"{__name__}.{folder}").SPEC for folder in folders)


def find(name: str) -> ModelSpec:
    specs = {spec.name: spec for spec in all_specs()}
    if name not in specs:
        raise ConfigError(f"model.name: no model '{name}'; {suggest(name, specs)}")
    return specs[name]
