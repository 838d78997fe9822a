"""A shard set, read: any sample at any time, from a directory (memory maps) or a URL (byte ranges)."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import ShardError
from shards.remote import Remote, is_url
from shards.schema import EMPTY_TEXT, Chunk, Manifest, TarFile, load_manifest
from shards.tar import Tar, open_local
from shards.tensors import parse

_OPEN_TARS = 512


@dataclass(frozen=True)
class Sample:
    key: str
    tensors: Mapping[str, Tensor]  # views of the memory map: copy before you change them
    meta: Mapping[str, Any]


class ShardSet:
    """The samples of an epoch in the manifest's order; a sample with repeats occurs so often."""

    def __init__(self, root: str | Path) -> None:
        self.remote = Remote(str(root)) if is_url(root) else None
        self.root = Path(root)
        self.name = str(root)
        self.manifest: Manifest = self.remote.manifest() if self.remote else load_manifest(self.root)
        chunks = self.manifest.chunks
        self._begins = [0, *accumulate(len(c.keys) * c.repeats for c in chunks)]
        self._tars: OrderedDict[str, Tar] = OrderedDict()
        self._lock = Lock()
        self._empty_text: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return self._begins[-1]

    def __getstate__(self) -> str:
        return self.name  # open maps do not travel to other processes

    def __setstate__(self, name: str) -> None:
        ShardSet.__init__(self, name)

    @property
    def keys(self) -> list[str]:
        return [key for chunk in self.manifest.chunks for _ in range(chunk.repeats) for key in chunk.keys]

    def groups(self, offset: int = 0) -> dict[str, np.ndarray]:
        """bucket -> indices of its samples, plus `offset`: what shards.order takes."""
        found: dict[str, list[np.ndarray]] = {}
        for begin, end, chunk in zip(self._begins, self._begins[1:], self.manifest.chunks):
            found.setdefault(chunk.bucket, []).append(np.arange(begin + offset, end + offset, dtype=np.int64))
        return {bucket: np.concatenate(parts) for bucket, parts in found.items()}

    def place(self, index: int) -> tuple[Chunk, str]:
        """The chunk and the key of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._begins, index) - 1
        chunk = self.manifest.chunks[number]
        return chunk, chunk.keys[(index - self._begins[number]) % len(chunk.keys)]

    def get(self, index: int, columns: tuple[str, ...] | None = None) -> Sample:
        chunk, key = self.place(index)
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        for column in columns or self.manifest.columns:
            values, row = self.tar(chunk, column).sample(key)
            tensors |= values
            meta |= row
        if chunk.caption_dropout is not None:
            meta["caption_dropout"] = chunk.caption_dropout
        return Sample(key, tensors, meta)

    @property
    def empty_text(self) -> dict[str, Tensor]:
        """The text fields of the empty caption."""
        if self._empty_text is not None:
            return self._empty_text
        where = f"{self.name}/{EMPTY_TEXT}"
        try:
            data = self.remote.read(EMPTY_TEXT) if self.remote else read_bytes(self.root / EMPTY_TEXT)
        except (FileNotFoundError, ShardError):
            raise ShardError(f"{where} is missing: caption dropout needs it; encode column 'text' again") from None
        self._empty_text = parse(data, where)
        return self._empty_text

    def tar(self, chunk: Chunk, column: str) -> Tar:
        """The tar of a chunk's column; the last ones used stay open."""
        entry = chunk.tars.get(column)
        if entry is None:
            raise ShardError(f"{self.name}: no column '{column}' for the {len(chunk.keys)} samples from {chunk.keys[0]}")
        with self._lock:
            if entry.path in self._tars:
                self._tars.move_to_end(entry.path)
                return self._tars[entry.path]
        opened = self._open(entry)
        with self._lock:
            self._tars[entry.path] = opened
            if len(self._tars) > _OPEN_TARS:
                self._tars.popitem(last=False)
        return opened

    def _open(self, entry: TarFile) -> Tar:
        return self.remote.tar(entry) if self.remote else open_local(self.root / entry.path, entry)


def read_bytes(path: Path) -> Tensor:
    """uint8 [n]: the contents of a small file."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def open_set(path: str | Path) -> ShardSet:
    return ShardSet(path)
