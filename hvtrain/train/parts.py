"""Training state that every rank wrote a part of, read by any number of ranks as if it were whole.

`part-00003.safetensors` holds rank 3's pieces of the flat tensors, fp32, and in its metadata where each
begins and what it is a piece of. Nothing is gathered: a rank writes piece after piece, so that one tensor's
piece lies in host memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.weights.containers import drop_pages, open_weights
from hvtrain.weights.stream import lay_out, open_writer, read_header, tensor_bytes
from shards.tensors import Extent

SEPARATOR = "::"  # parameter name :: state name
_WHERE = "hvtrain.pieces"  # in the metadata: {key: [first element, shape of the whole]}


class Piece(NamedTuple):
    """What one rank has of a tensor of the training state."""

    key: str
    shape: tuple[int, ...]  # of the whole
    start: int  # its first element in the flat whole
    n: int
    read: Callable[[], Tensor]  # [n]


class SealedFile(NamedTuple):
    """A file, its size and checksum (checkpoint.seal)."""

    name: str
    seal: list


def write_part(folder: Path, pieces: Sequence[Piece], *, rank: int) -> SealedFile:
    """This rank's file in `folder`. Sealed from what is written, not from what the disk gives back."""
    path = folder / f"part-{rank:05d}.safetensors"
    slots = [Extent(p.key, torch.float32, (p.n,)) for p in pieces]
    metadata = {_WHERE: json.dumps({p.key: [p.start, p.shape] for p in pieces}, separators=(",", ":"))}
    head, placed = lay_out(slots, metadata)
    digest, size = xxhash.xxh3_64(head), placed[-1].stop if placed else len(head)
    with open_writer(path, slots, metadata=metadata) as writer:
        for piece in pieces:  # all of one dtype: the order of the file
            data = tensor_bytes(piece.read().reshape(-1).to("cpu", torch.float32))
            writer.write_bytes(piece.key, data)
            digest.update(data)
    return SealedFile(path.name, [size, digest.hexdigest()])


class _Span(NamedTuple):
    start: int
    stop: int
    map: Callable[[], Tensor]  # a view of the file


@dataclass(frozen=True)
class _Whole:
    shape: tuple[int, ...]
    spans: tuple[_Span, ...]  # in order, without gaps


class Parts(Mapping[str, Tensor]):
    """Tensors by name, put together when they are asked for."""

    def __init__(self, wholes: Mapping[str, _Whole]) -> None:
        self._wholes = wholes

    def __getitem__(self, name: str) -> Tensor:
        whole = self._wholes[name]
        return self.span(name, 0, torch.Size(whole.shape).numel()).view(whole.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wholes)

    def __len__(self) -> int:
        return len(self._wholes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._wholes[name].shape

    def span(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of elements `start` to `stop` of the flat tensor: nothing else is read."""
        out = torch.empty(max(0, stop - start))
        for span in self._wholes[name].spans:
            low, high = max(start, span.start), min(stop, span.stop)
            if low < high:
                mapped = span.map()
                out[low - start : high - start] = mapped[low - span.start : high - span.start]
                drop_pages(mapped)
        return out


def shape_of(values: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return values.shape(name) if isinstance(values, Parts) else tuple(values[name].shape)


def span_of(values: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Elements of a flat tensor, of which no more is read than these."""
    return values.span(name, start, stop) if isinstance(values, Parts) else values[name].flatten()[start:stop]


def has_parts(names: Iterable[str]) -> bool:
    """Whether these are the files of a checkpoint in parts."""
    return any(name.startswith("part-") for name in names)


def open_parts(folder: Path) -> tuple[Parts, dict[str, Parts]]:
    """Parameters, and the optimizer's state by parameter. Raises CheckpointError if a piece is missing."""
    found: dict[str, tuple[tuple[int, ...], list[_Span]]] = {}
    for file in sorted(folder.glob("part-*.safetensors")):
        if not read_header(file).extents:
            continue  # of a rank for which a small model left nothing
        weights = open_weights(file)
        for key, (start, shape) in json.loads(weights.metadata.get(_WHERE, "{}")).items():
            entry = weights.entries[key]
            found.setdefault(key, (tuple(shape), []))[1].append(
                _Span(start, start + entry.shape[0], entry.map)
            )
    params: dict[str, _Whole] = {}
    states: dict[str, dict[str, _Whole]] = {}
    for key, (shape, spans) in found.items():
        whole = _whole(folder, key, shape, spans)
        name, mark, state = key.rpartition(SEPARATOR)
        (states.setdefault(name, {}) if mark else params)[state] = whole
    return Parts(params), {name: Parts(state) for name, state in states.items()}


def _whole(folder: Path, key: str, shape: tuple[int, ...], spans: list[_Span]) -> _Whole:
    spans.sort(key=lambda span: span.start)
    ends = [0, *(span.stop for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != torch.Size(shape).numel():
        raise CheckpointError(f"{folder}: '{key}' is not whole: its parts do not join")
    return _Whole(shape, tuple(spans))
