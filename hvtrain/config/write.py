"""A config as YAML with a comment beside each value, for `hvtrain import`, `hvtrain
init` and `hvtrain config show`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hvtrain.config.load import plain

COLUMN = 44  # where comments begin, if the values leave room


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        below = found
        for section in sections:
            below = below.setdefault(section, {})
        below[last] = value
    return found


def commented(
    values: Mapping[str, Any], notes: Mapping[str, str], cls: type, *, head: Sequence[str] = ()
) -> str:
    """`values` and `notes` under dotted keys; sections in the order in which `cls` declares
    them. It loads as what it shows."""
    order = {f.name: i for i, f in enumerate(dataclasses.fields(cls))}  # type: ignore[arg-type]
    tree = nested(values)
    lines = [f"# {line}".rstrip() for text in head for line in text.splitlines()]
    for section in sorted(tree, key=lambda name: order.get(name, len(order))):
        lines += _lines(section, tree[section], notes, path=section, depth=0)
    return "\n".join(lines) + "\n"


def _lines(name: str, value: Any, notes: Mapping[str, str], *, path: str, depth: int) -> list[str]:
    pad, note = "  " * depth, " ".join(notes.get(path, "").split())
    if isinstance(value, Mapping) and path not in notes and any(key.startswith(f"{path}.") for key in notes):
        inner = [_lines(key, one, notes, path=f"{path}.{key}", depth=depth + 1) for key, one in value.items()]
        return [f"{pad}{name}:", *(line for lines in inner for line in lines)]
    several = isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)
    first = f"{pad}{name}:" if several else f"{pad}{name}: {_flow(value)}"
    return [
        f"{first:<{COLUMN}}  # {note}" if note else first,
        *(f"{pad}- {_flow(item)}" for item in (value if several else ()))
    ]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(
        plain(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9
    )
    return text.removesuffix("\n").removesuffix("\n...")
