"""Where each value of a config is from: a line of a file, the command line, or the default."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hvtrain.config.load import COMMAND_LINE, load, plain

DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Effective:
    """A config with every key: values under dotted names, and where each is from."""

    config: Any
    values: Mapping[str, Any]
    origins: Mapping[str, str]


def effective(cls: type, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Effective:
    """What `load` makes of them. Raises ConfigError as it does."""
    config: Any = load(cls, path, overrides)
    said = _lines(Path(path)) if path is not None else {}
    for item in overrides:
        _put(said, item.partition("=")[0], COMMAND_LINE)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key, value, aliases in _leaves(config):
        values[key] = value
        origins[key] = next((found for name in aliases if (found := _nearest(said, name))), DEFAULT)
    return Effective(config, values, origins)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, list[str]]]:
    """(dotted key, value, names under which it may have been given), with the keys of a REST
    field as its section's own."""
    rest = getattr(type(config), "REST", None)
    renamed: Mapping[str, str] = getattr(type(config), "renamed", lambda raw: {})(vars(config))
    old = {new: before for before, new in renamed.items()}
    for f in dataclasses.fields(config):
        value, key = getattr(config, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        elif f.name == rest:
            for name, inner in value.items():
                yield prefix + name, inner, [prefix + name, f"{key}.{name}", prefix + old.get(name, name)]
        else:
            yield key, plain(value), [key, prefix + old.get(f.name, f.name)]


def _nearest(said: Mapping[str, str], key: str) -> str | None:
    """Of the key itself, or of a section that was given whole."""
    while key not in said and "." in key:
        key = key.rpartition(".")[0]
    return said.get(key)


def _put(said: dict[str, str], key: str, where: str) -> None:
    for name in [name for name in said if name.startswith(f"{key}.")]:
        del said[name]
    said[key] = where


def _lines(path: Path) -> dict[str, str]:
    """Dotted key -> FILE:LINE, with those of `base:` below. The file has been loaded before: it is sound."""
    root = yaml.compose(path.read_bytes())
    if not isinstance(root, yaml.MappingNode):
        return {}
    base = next((value.value for key, value in root.value if key.value == "base"), None)
    said = _lines(Path(os.path.realpath(path.parent / base))) if base else {}
    for key, node in _nodes(root, ""):
        if key != "base":
            _put(said, key, f"{path}:{node.start_mark.line + 1}")
    return said


def _nodes(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    for key, value in node.value:
        merge = key.tag == "tag:yaml.org,2002:merge"
        for inner in value.value if merge and isinstance(value, yaml.SequenceNode) else [value]:
            name = prefix if merge else f"{prefix}{key.value}"
            if isinstance(inner, yaml.MappingNode) and inner.value:
                yield from _nodes(inner, name if merge else f"{name}.")
            elif not merge:
                yield name, key
