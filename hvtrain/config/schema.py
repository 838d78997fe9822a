"""A JSON Schema of a command's config, made of its dataclasses: editors complete keys, show what
they mean and mark mistakes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from hvtrain.config.load import field_notes, plain

_SCALARS: dict[Any, dict[str, Any]] = {
    # 007 is a name, too
    bool: {"type": "boolean"}, int: {"type": "integer"}, str: {"type": ["string", "number"]},
    # 1e-4, to YAML a text
    float: {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^[-+0-9.eE_]+$"}]},
}


def schema(cls: type, *, title: str) -> dict[str, Any]:
    """Draft 2020-12. Sections are under $defs, each once."""
    sections: dict[str, Any] = {}
    whole = _section(cls, sections)
    base = {"type": "string", "description": "Another config, on which this one builds"}
    whole["properties"] = {"base": base, **whole["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **whole, "$defs": sections
    }


def _section(cls: type, sections: dict[str, Any]) -> dict[str, Any]:
    hints, notes = typing.get_type_hints(cls), field_notes(cls)
    properties = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = hints[f.name] | None if f.default is None else hints[f.name]
        entry = {**_kind(kind, sections), "description": notes.get(f.name, "")}
        if not dataclasses.is_dataclass(kind):
            made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            entry["default"] = plain(made)
        properties[f.name] = entry
    rest = getattr(cls, "REST", None) is not None
    more = {"type": ["string", "null"], "description": "A file of the model by its name"} if rest else False
    return {"type": "object", "properties": properties, "additionalProperties": more}


def _kind(kind: Any, sections: dict[str, Any]) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [*(_kind(k, sections) for k in inner if k is not type(None)), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(inner)}
    if dataclasses.is_dataclass(kind):
        name = kind.__name__  # type: ignore[union-attr]
        if name not in sections:
            sections[name] = {}  # a section may hold itself
            sections[name] = _section(kind, sections)  # type: ignore[arg-type]
        return {"$ref": f"#/$defs/{name}"}
    if origin is Mapping:
        return {
            "type": "object", "additionalProperties": {"anyOf": [_kind(inner[1], sections), {"type": "null"}]}
        }
    if origin is tuple and inner[1:] == (Ellipsis,):
        one = _kind(inner[0], sections)
        return {"anyOf": [{"type": "array", "items": one}, one]}  # shards: PATH means one
    if origin is tuple:
        each, n = [_kind(k, sections) for k in inner], len(inner)
        return {"type": "array", "prefixItems": each, "minItems": n, "maxItems": n}
    return dict(_SCALARS[kind])
