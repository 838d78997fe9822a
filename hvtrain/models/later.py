"""Functions that are imported when they are first called: diffusers and transformers take seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any


def later(module: str, name: str) -> Callable[..., Any]:
    return partial(_call, module, name)  # no closure: it can be sent to another process


def _call(module: str, name: str, /, *args: Any, **options: Any) -> Any:
    return getattr(import_module(module), name)(*args, **options)
