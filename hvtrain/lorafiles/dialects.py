"""LoRA pairs between the official layers and those of other programs, by the model's key maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.lorafiles.pairs import LoraPair, cut_rows, join_rows
from hvtrain.models.spec import ModelSpec
from hvtrain.weights.keymap import KeyMap, Rule

Shapes: TypeAlias = Mapping[str, tuple[int, int]]  # official layer name -> [out, in]


def key_map(spec: ModelSpec, dialect: str) -> KeyMap:
    if dialect not in spec.key_maps:
        raise ConfigError(f"{spec.name} has no dialect '{dialect}'; {suggest(dialect, spec.key_maps)}")
    return spec.key_maps[dialect]


def pieces(key: KeyMap, module: str, n_out: int) -> dict[str, torch.Tensor]:
    """The dialect's layers that make up an official one, each with its rows' places among the n_out official rows."""
    rule = key.rule_of_official(module)
    if rule is None:
        if not key.passthrough:
            raise CheckpointError(f"the dialect has no name for the layer '{module}'")
        return {module: torch.arange(n_out)}
    return dict(zip(rule.dialect, _rows(rule, n_out), strict=True))


def _rows(rule: Rule, n_out: int) -> list[torch.Tensor]:
    rows = torch.arange(n_out)
    if rule.swap:  # a rule either swaps or cuts
        return [torch.cat(rows.chunk(2)[::-1])]
    return list(rows.split(rule.split(n_out))) if len(rule.dialect) > 1 else [rows]


def spread(pairs: Mapping[str, LoraPair], key: KeyMap) -> dict[str, LoraPair]:
    """Official layers' pairs as pairs of the dialect's layers. Undone exactly by `gather`."""
    out = {}
    for module, pair in pairs.items():
        places = pieces(key, module, pair.up.shape[0])
        parts = cut_rows(pair, list(places.values()))
        out.update({name: part for name, part in zip(places, parts, strict=True) if part is not None})
    return out


def gather(
    path: Path, pairs: Mapping[str, LoraPair], spec: ModelSpec | None, shapes: Shapes
) -> dict[str, LoraPair]:
    """Pairs of any dialects' layers as pairs of official ones, in the order of `shapes`."""
    keys = list(spec.key_maps.values()) if spec else []
    left, out = dict(pairs), {}
    for module, shape in shapes.items():
        if module in left:
            out[module] = left.pop(module)
            continue
        for key in keys:
            places = pieces(key, module, shape[0]) if key.rule_of_official(module) else {}
            if not any(name in left for name in places):
                continue
            parts = [left.pop(name, None) for name in places]
            for (name, rows), part in zip(places.items(), parts, strict=True):
                if part is not None:
                    part.check_shape(path, name, (len(rows), shape[1]))
            out[module] = join_rows(parts, list(places.values()))
            break
    if left:
        raise CheckpointError(f"{path}: adapts '{next(iter(left))}' twice, under names of two dialects")
    return out


def known_names(spec: ModelSpec | None, modules: Iterable[str]) -> dict[str, str]:
    """Every spelling of every layer, dotted or with underscores -> the layer's dotted name in its dialect."""
    names: set[str] = set()
    for module in modules:
        names.add(module)
        for key in spec.key_maps.values() if spec else ():
            rule = key.rule_of_official(module)
            names.update(rule.dialect if rule else ())
    return {spelling: name for name in names for spelling in (name.replace(".", "_"), name)}
