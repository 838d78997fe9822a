"""Whose weights these are, of which sizes and flavor: told from names, shapes and
what the file says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

from hvtrain.config.load import build
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.spec import Flavor, ModelSpec, Shapes

ARCH_KEY = "hvtrain.arch"  # of a file's metadata: JSON of the architecture's sizes


def arch_of(spec: ModelSpec, shapes: Shapes, metadata: Mapping[str, str]) -> Any:
    """The sizes of a file under official names. Its metadata wins; else everything is in the shapes."""
    if ARCH_KEY not in metadata:
        return spec.sizes_from(shapes)
    try:
        return parse_arch(spec.arch, json.loads(metadata[ARCH_KEY]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"metadata '{ARCH_KEY}' is not JSON: {error}") from None


def parse_arch(kind: type, values: Any) -> Any:
    """An architecture's dataclass from the JSON of a file's metadata."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"metadata '{ARCH_KEY}' must be a JSON object, not {values!r}")
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise CheckpointError(f"metadata '{ARCH_KEY}' has unknown fields {unknown}; known: {sorted(known)}")
    if missing := [n for n, f in known.items() if f.default is MISSING and n not in values]:
        raise CheckpointError(f"metadata '{ARCH_KEY}' is incomplete: it lacks {', '.join(missing)}")
    try:
        return build(kind, values, where=f"metadata '{ARCH_KEY}'")
    except ConfigError as error:  # a value of another type
        raise CheckpointError(str(error)) from None


def flavor_of(
    spec: ModelSpec, arch: Any, name: str | None, *, hint: str | None = None, likely: str | None = None
) -> Flavor:
    """The flavor of a file's architecture, with exactly this architecture's sizes.

    `name` is what the user says and must fit; `hint` is what the file says of itself; `likely` is what
    its path speaks of, believed where it fits. Weights do not tell flavors of equal shapes apart: with
    none, the first that fits is taken.
    """
    flavors = spec.flavors
    if name is not None:
        flavor = spec.flavor(name)
        if different := differences(spec, flavor.arch, arch):
            field, (wanted, found) = next(iter(different.items()))
            raise CheckpointError(
                f"flavor '{name}' has {field} {wanted}, the file has {found}: it looks like "
                f"{_resembles(spec, arch)}"
            )
        return spec.fitted(flavor, replace(arch, **{key: getattr(flavor.arch, key) for key in spec.unseen}))
    if hint is not None and hint in flavors:
        return spec.fitted(flavors[hint], arch)
    same = [f for f in flavors.values() if not differences(spec, f.arch, arch)] or _related(spec, arch)
    if not same:
        kinds = "; ".join(f"{f.name} ({_kind(spec, f.arch)})" for f in flavors.values())
        raise CheckpointError(f"no flavor has {_kind(spec, arch)}; those here: {kinds}")
    told = [f for f in same if f.name == likely]
    told = told or [f for f in same if all(getattr(f.arch, key) == getattr(arch, key) for key in spec.unseen)]
    return spec.fitted((told or same)[0], arch)


def differences(spec: ModelSpec, a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two architectures' weights differ: name -> (of a, of b)."""
    left, right = asdict(a), asdict(b)
    ignored = (*spec.unseen, *spec.may_differ)
    return {key: (left[key], right[key]) for key in left if key not in ignored and left[key] != right[key]}


def count(names: Iterable[str], pattern: str) -> int:
    """How many blocks the names number, from 0; the pattern's group is the number."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return max(found, default=-1) + 1


def count_some(names: Iterable[str], blocks: str) -> int:
    """As `count`, of `blocks.N.`. Raises CheckpointError for none."""
    if not (n := count(names, re.escape(blocks) + r"\.(\d+)\.")):
        raise CheckpointError(
            f"missing keys '{blocks}.*': the file has no such block; is it one part of several?"
        )
    return n


def shape_of(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    """Of a tensor that tells a size. Raises CheckpointError."""
    if name not in shapes:
        raise CheckpointError(f"missing key '{name}', which tells the size of the model")
    if len(shapes[name]) != ndim or 0 in shapes[name]:
        raise CheckpointError(
            f"'{name}' has the shape {shapes[name]}, expected {ndim} dimensions, none of them 0"
        )
    return shapes[name]


def _related(spec: ModelSpec, arch: Any) -> list[Flavor]:
    """Flavors that do the same at other sizes."""
    return [
        f for f in spec.flavors.values() if all(getattr(f.arch, k) == getattr(arch, k) for k in spec.kind)
    ]


def _kind(spec: ModelSpec, arch: Any) -> str:
    return ", ".join(f"{key} {getattr(arch, key)}" for key in spec.kind)


def _resembles(spec: ModelSpec, arch: Any) -> str:
    names = [f"'{f.name}'" for f in spec.flavors.values() if not differences(spec, f.arch, arch)]
    if names:
        return " or ".join(names)
    related = [f"'{f.name}'" for f in _related(spec, arch)]
    like = f", with the {_kind(spec, arch)} of {' and '.join(related)}" if related else ""
    return f"a model of other sizes{like} (leave model.flavor empty to use the file's own)"
