"""Reading: every member indexed once, values straight out of a memory map."""

from __future__ import annotations

import json
import mmap
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import ShardError
from shards.schema import EMPTY_TEXT, Chunk, Manifest, load_manifest

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 1 << 20
_OPEN_TARS = 256


@dataclass(frozen=True)
class Sample:
    key: str
    tensors: Mapping[str, Tensor]  # views of the memory map: copy before you change them
    meta: Mapping[str, Any]


class ShardSet:
    """A shard set, in the manifest's order."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest: Manifest = load_manifest(self.root)
        self._place = [
            (c, i)
            for c, chunk in enumerate(self.manifest.chunks)
            for _ in range(chunk.repeats)
            for i in range(len(chunk.keys))
        ]

    def __len__(self) -> int:
        return len(self._place)

    @property
    def keys(self) -> list[str]:
        return [self.manifest.chunks[c].keys[i] for c, i in self._place]

    @property
    def buckets(self) -> list[str]:
        """Each sample's bucket."""
        return [self.manifest.chunks[c].bucket for c, _ in self._place]

    def get(self, index: int, columns: tuple[str, ...] | None = None) -> Sample:
        number, inside = self._place[index]
        chunk: Chunk = self.manifest.chunks[number]
        key = chunk.keys[inside]
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        for column in columns or self.manifest.columns:
            tar = self._tar(chunk, column)
            tensors |= tar.tensors(key)
            meta |= tar.meta(key)
        return Sample(key, tensors, meta)

    @property
    def empty_text(self) -> dict[str, Tensor]:
        """The text fields of the empty caption."""
        path = self.root / EMPTY_TEXT
        if not path.is_file():
            raise ShardError(f"{path} is missing: caption dropout needs it; encode column 'text' again")
        return _tensors(memoryview(path.read_bytes()), str(path))

    def _tar(self, chunk: Chunk, column: str) -> TarMap:
        if column not in chunk.tars:
            raise ShardError(f"{self.root}: no column '{column}' for the {len(chunk.keys)} samples from {chunk.keys[0]}")
        entry = chunk.tars[column]
        return open_tar(self.root / entry.path, entry.n_bytes)


def open_set(path: str | Path) -> ShardSet:
    return ShardSet(path)


@dataclass(frozen=True)
class Member:
    offset: int
    size: int


class TarMap:
    """A tar in memory: member name -> where its bytes are."""

    def __init__(self, path: Path, n_bytes: int | None) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if n_bytes is not None and size != n_bytes:
                raise ShardError(f"{path}: {size} bytes, the manifest says {n_bytes}; the tar is damaged, encode it again")
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.members = _index(path, size)
        except FileNotFoundError:
            raise ShardError(f"{path}: the manifest lists this tar but it is missing; restore it or encode again") from None
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ShardError(f"{path}: not a readable tar ({error}); encode it again") from None

    def tensors(self, key: str) -> dict[str, Tensor]:
        return _tensors(self._bytes(f"{key}.safetensors"), f"{self.path}: {key}.safetensors")

    def meta(self, key: str) -> dict[str, Any]:
        try:
            return json.loads(bytes(self._bytes(f"{key}.json")))
        except ValueError as error:
            raise ShardError(f"{self.path}: {key}.json is damaged ({error})") from None

    def _bytes(self, name: str) -> memoryview:
        if name not in self.members:
            raise ShardError(f"{self.path}: no member {name}; the tar does not fit the manifest, encode it again")
        m = self.members[name]
        return memoryview(self.map)[m.offset : m.offset + m.size]


@lru_cache(maxsize=_OPEN_TARS)
def open_tar(path: Path, n_bytes: int | None = None) -> TarMap:
    return TarMap(path, n_bytes)


def _index(path: Path, size: int) -> dict[str, Member]:
    """Members of a tar that may come from anyone: plain files with plain names, each once, inside the tar's bytes."""
    members: dict[str, Member] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            name = info.name
            if not info.isreg():
                raise ShardError(f"{path}: member {name!r} is not a plain file; refused")
            if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                raise ShardError(f"{path}: member {name!r} points outside the set; refused")
            if name in members:
                raise ShardError(f"{path}: member {name!r} occurs twice; refused")
            if info.offset_data + info.size > size:
                raise ShardError(f"{path}: member {name!r} claims {info.size} bytes beyond the end of the tar; it is cut off")
            members[name] = Member(info.offset_data, info.size)
    return members


def _tensors(data: memoryview, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file without a copy. Checked by hand: the file may come from anyone."""
    if len(data) < 8:
        raise ShardError(f"{where}: too short for safetensors")
    n = int.from_bytes(data[:8], "little")
    if n > min(_MAX_HEADER, len(data) - 8):
        raise ShardError(f"{where}: its header claims {n} bytes; refused")
    try:
        header = json.loads(bytes(data[8 : 8 + n]))
        body, found = data[8 + n :], {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            n_bytes = dtype.itemsize
            for d in shape:
                n_bytes *= d
            if not 0 <= begin <= end <= len(body) or end - begin != n_bytes:
                raise ShardError(f"{where}: tensor '{name}' does not fit its bytes; the file is damaged")
            found[name] = _view(body[begin:end], dtype, shape)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{where}: damaged safetensors header ({type(error).__name__}: {error})") from None


def _view(data: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": true, and documented on Sample
        flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # a member need not begin where its dtype is aligned
    return flat.view(dtype).view(shape)
