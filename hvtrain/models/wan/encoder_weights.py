"""Weights of the encoders: a file of any dialect, under official names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from hvtrain.errors import CheckpointError
from hvtrain.models.foreign import looks_like
from hvtrain.weights.containers import open_weights
from hvtrain.weights.keymap import KeyMap
from hvtrain.weights.source import Shapes, Source, check, shapes_of


def translated(path: str | Path, anchors: Mapping[str, KeyMap], *, what: str) -> Source:
    """anchors: a name that tells a dialect -> its map; whatever prefix the file gives its names. Raises CheckpointError for a
    file without any of them."""
    weights = open_weights(path)
    found = [(key, anchor) for anchor in anchors for key in weights if key == anchor or key.endswith(f".{anchor}")]
    if not found:
        label = looks_like(weights)
        like = f"it looks like {label}" if label else f"its first keys are {', '.join(list(weights)[:3])}"
        raise CheckpointError(f"{path}: not {what}: {like}")
    key, anchor = min(found, key=lambda hit: len(hit[0]))
    prefix = key.removesuffix(anchor)
    read = anchors[anchor].read(name.removeprefix(prefix) for name in weights if name.startswith(prefix))
    sources = {name: replace(s, parts=tuple(prefix + part for part in s.parts)) for name, s in read.items()}
    return Source(weights, sources)


def compare(source: Source, model: nn.Module, *, what: str) -> None:
    """Raises CheckpointError where the file lacks a tensor of the model or has it in another shape; what the model lacks, such
    as another tower or a decoder, is left alone."""
    wanted, found = shapes_of(model), source.shapes
    known = {name: shape for name, shape in found.items() if name in wanted}
    check(source.path, _dense(wanted), _dense(known), what=f"not {what}")


def _dense(shapes: Shapes) -> Shapes:
    """Without dimensions of 1, which programs add and leave out."""
    return {name: tuple(n for n in shape if n != 1) for name, shape in shapes.items()}
