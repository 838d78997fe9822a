"""A shard set, read: any sample at any time, from a directory (memory maps) or a URL (byte ranges)."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import ShardError
from shards.files import inside, read_plain
from shards.remote import Remote, is_url, shown
from shards.schema import EMPTY_TEXT, Chunk, Manifest, TarFile, load_manifest
from shards.tar import Tar, check_size, missing, open_local
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
        # the name is for people, the address may hold a password
        self.address, self.name = str(root), shown(root)
        self.manifest: Manifest = self.remote.manifest() if self.remote else load_manifest(self.root)
        chunks = self.manifest.chunks
        self._begins = [0, *accumulate(len(c.keys) * c.repeats for c in chunks)]
        self._tars: OrderedDict[str, Tar] = OrderedDict()
        self._lock = Lock()
        self._empty_text: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return self._begins[-1]

    def __getstate__(self) -> str:
        return self.address  # open maps do not travel to other processes

    def __setstate__(self, address: str) -> None:
        ShardSet.__init__(self, address)

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
        return _joined(chunk, key, [self.tar(chunk, column) for column in columns or self.manifest.columns])

    def walk(self, chunk: Chunk, columns: tuple[str, ...] | None = None) -> Iterator[Sample]:
        """A chunk's samples as they lie. Of a URL each tar is one request, not one for each sample."""
        columns = columns or self.manifest.columns
        with ExitStack() as files:
            if self.remote:
                tars = [
                    files.enter_context(self.remote.streamed(self._entry(chunk, column)))
                    for column in columns
                ]
            else:
                tars = [self.tar(chunk, column) for column in columns]
            for key in chunk.keys:
                yield _joined(chunk, key, tars)

    def some(self) -> Sample:
        """A sound sample of the first: one that is damaged is for `data.on_bad_sample` to judge."""
        fault: ShardError | None = None
        for index in range(min(len(self), 64)):
            try:
                return self.get(index)
            except ShardError as error:
                fault = fault or error
        raise fault or ShardError(f"{self.name}: holds no samples")

    @property
    def empty_text(self) -> dict[str, Tensor]:
        """The text fields of the empty caption."""
        if self._empty_text is not None:
            return self._empty_text
        where = f"{self.name}/{EMPTY_TEXT}"
        try:
            data = self.remote.read(EMPTY_TEXT) if self.remote else read_bytes(inside(self.root, EMPTY_TEXT))
        except FileNotFoundError:
            raise ShardError(
                f"{where} is missing: caption dropout needs it; encode column 'text' again"
            ) from None
        except (ShardError, OSError) as error:
            raise ShardError(f"{where} cannot be read ({error}): caption dropout needs it") from None
        self._empty_text = parse(data, where)
        return self._empty_text

    def tar(self, chunk: Chunk, column: str) -> Tar:
        """The tar of a chunk's column; the last ones used stay open."""
        entry = self._entry(chunk, column)
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

    def _entry(self, chunk: Chunk, column: str) -> TarFile:
        if column not in chunk.tars:
            raise ShardError(
                f"{self.name}: no column '{column}' for the {len(chunk.keys)} samples from {chunk.keys[0]}"
            )
        return chunk.tars[column]

    def _open(self, entry: TarFile) -> Tar:
        return self.remote.tar(entry) if self.remote else open_local(self.path(entry), entry)

    def path(self, entry: TarFile) -> Path:
        """Where a tar of a local set lies; a ShardError if that is outside the set."""
        return inside(self.root, entry.path)

    def check_tars(self) -> None:
        """Every sample has its columns, and every tar of a local set is there, inside it, and has its
        size: a run that would miss one after hours ends now. Contents are compared when they are
        read; of a URL nothing is asked."""
        faults: list[str] = []
        folders: dict[str, Path] = {}
        for chunk in self.manifest.chunks:
            for column in self.manifest.columns:
                entry = self._entry(chunk, column)
                try:
                    if not self.remote:
                        self._check_tar(entry, folders)
                except ShardError as error:
                    faults.append(str(error))
        if faults:
            more = (
                f" ({len(faults) - 1} more tars are missing or have another size)" if len(faults) > 1 else ""
            )
            raise ShardError(faults[0] + more)

    def _check_tar(self, tar: TarFile, folders: dict[str, Path]) -> None:
        """One system call for a tar: there may be ten thousand, on a network's disk."""
        folder = tar.path.rpartition("/")[0]
        if folder not in folders:
            folders[folder] = inside(self.root, folder)
        path = self.root / tar.path
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                found = self.path(tar).stat()
        except FileNotFoundError:
            raise missing(path) from None
        except OSError as error:
            raise ShardError(f"{path}: cannot be looked at ({error.strerror})") from None
        check_size(path, found.st_size, tar)


def _joined(chunk: Chunk, key: str, tars: Sequence[Tar]) -> Sample:
    """A sample out of its columns' tars."""
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for tar in tars:
        values, row = tar.sample(key)
        tensors |= values
        meta |= row
    if chunk.caption_dropout is not None:
        meta["caption_dropout"] = chunk.caption_dropout
    return Sample(key, tensors, meta)


def read_bytes(path: Path) -> Tensor:
    """uint8 [n]: the contents of a small file."""
    return torch.frombuffer(bytearray(read_plain(path)), dtype=torch.uint8)


def open_set(path: str | Path) -> ShardSet:
    """A set whose tars are all there."""
    found = ShardSet(path)
    found.check_tars()
    return found
