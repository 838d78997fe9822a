"""What a file that no model owns may be, by its names: foreign.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml


@cache
def _rows(kind: str) -> list[dict]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[kind]


def looks_like(names: Iterable[str]) -> str | None:
    """A file of weights, by the names of its tensors."""
    return _first("files", list(names))


def lora_looks_like(layers: Iterable[str]) -> str | None:
    """A LoRA's model, by the layers that it adapts."""
    return _first("loras", [layer.replace(".", "_") for layer in layers])


def _first(kind: str, names: list[str]) -> str | None:
    for row in _rows(kind):
        if all(any(re.search(pattern, name) for name in names) for pattern in row["names"]):
            return row["label"]
    return None
