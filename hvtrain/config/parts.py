"""The files that each model is made of, from the `parts.yaml` in its folder: data, so that no
config needs torch to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

import hvtrain
from hvtrain.registry import Registry

FILE = "parts.yaml"
MASK = "mask"  # the column that no part makes: of pictures alone, for any model


@dataclass(frozen=True)
class Part:
    """A file (or directory) of a model: what it is, and which columns of a shard set are encoded with it."""

    about: str
    makes: tuple[str, ...] = ()
    optional: bool = False
    flavors: tuple[str, ...] = ()  # that sample with it; none: all do


@dataclass(frozen=True)
class PartsList:
    """A model's parts besides `dit` and `vae`, which every model has, and what keys of
    older configs are called now."""

    parts: Mapping[str, Part]
    renamed: Mapping[str, str]


def folders() -> list[Path]:
    """Where architectures lie: in this package, and where Python's path has more of it."""
    return [Path(folder) / "models" for folder in hvtrain.__path__]


@cache
def _lists(where: tuple[Path, ...]) -> dict[str, PartsList]:
    found = {}
    for path in (path for folder in reversed(where) for path in sorted(folder.glob(f"*/{FILE}"))):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = {name: _part(**part) for name, part in raw["parts"].items()}
        found[raw["name"]] = PartsList(parts, raw.get("renamed", {}))
    return found


def _part(about: str, makes: Sequence[str] = (), optional: bool = False, flavors: Sequence[str] = ()) -> Part:
    return Part(about, tuple(makes), optional, tuple(flavors))


def list_of(model: str) -> PartsList:
    """Raises ConfigError for a model that is not there."""
    return Registry("model", _lists(tuple(folders()))).find(model, key="model.name")


def parts_of(model: str) -> Mapping[str, Part]:
    return list_of(model).parts
