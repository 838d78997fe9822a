"""One tar, read: members indexed once, values straight out of a memory map or by byte ranges of a URL."""

from __future__ import annotations

import json
import mmap
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from shards.errors import ShardError
from shards.schema import TarFile
from shards.tensors import parse
from shards.writer import CHECKSUM

_MAX_JSON = 1 << 20


@dataclass(frozen=True)
class Member:
    offset: int
    size: int
    checksum: str = ""  # "": KEY.json has it


class Tar:
    """Samples of a tar by key. `fetch(offset, size)` hands out bytes."""

    def __init__(self, where: str, members: dict[str, Member], fetch: Callable[[int, int], memoryview]) -> None:
        self.where, self.members, self.fetch = where, members, fetch

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a sample, after its checksum was compared."""
        name = f"{key}.safetensors"
        return parse(self.checked(key), f"{self.where}: {name}")

    def checked(self, key: str) -> memoryview:
        """The bytes of KEY.safetensors; a ShardError if they are not what was written."""
        name = f"{key}.safetensors"
        data, member = self.bytes(name), self.members[name]
        wanted = member.checksum or (self._row(key).get(CHECKSUM) if f"{key}.json" in self.members else "")
        if wanted and xxhash.xxh3_64_hexdigest(data) != wanted:
            raise ShardError(
                f"{self.where}: {name} (bytes {member.offset} to {member.offset + member.size}) is damaged: its checksum "
                "is not the one it was written with; encode it again, or restore the tar"
            )
        return data

    def meta(self, key: str) -> dict[str, Any]:
        row = dict(self._row(key))
        row.pop(CHECKSUM, None)
        return row

    def keys(self) -> list[str]:
        """Of the samples, in the tar's order."""
        return [name.removesuffix(".safetensors") for name in self.members if name.endswith(".safetensors")]

    def bytes(self, name: str) -> memoryview:
        if name not in self.members:
            raise ShardError(f"{self.where}: no member {name}; the tar does not fit the manifest, encode it again")
        member = self.members[name]
        return self.fetch(member.offset, member.size)

    def _row(self, key: str) -> dict[str, Any]:
        try:
            data = self.bytes(f"{key}.json")
            if len(data) > _MAX_JSON:
                raise ValueError(f"{len(data)} bytes")
            row = json.loads(bytes(data))
            if not isinstance(row, dict):
                raise ValueError(f"expected keys and values, found {type(row).__name__}")
            return row
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{self.where}: {key}.json is damaged ({error}); encode it again") from None


def open_local(path: Path, entry: TarFile | None) -> Tar:
    """Map a tar. With the manifest's entry, its size and everything but the tensors' bytes are compared with it."""
    where = str(path)
    try:
        size = path.stat().st_size
        if entry is not None and size != entry.n_bytes:
            raise ShardError(
                f"{path}: {size} bytes, the manifest says {entry.n_bytes}; the tar is damaged or another one, encode it again"
            )
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(content)
        members = scan(path, size)
    except FileNotFoundError:
        raise ShardError(f"{path}: the manifest lists this tar but it is missing; restore it or encode again") from None
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(f"{path}: not a readable tar ({error}); encode it again") from None
    if entry is not None and entry.skeleton and skeleton(view, members) != entry.skeleton:
        raise ShardError(
            f"{path}: its headers or JSON are not those that were written: the tar is damaged or was swapped with another; "
            "restore it or encode again"
        )
    return Tar(where, members, lambda offset, size: view[offset : offset + size])


def scan(path: Path, size: int) -> dict[str, Member]:
    """Members of a tar that may come from anyone: plain files with plain names, each once, inside the tar's bytes."""
    members: dict[str, Member] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            name = info.name
            if not info.isreg() or info.issparse():
                raise ShardError(f"{path}: member {name!r} is not a plain file; refused")
            if name.startswith("/") or ".." in name.split("/") or "\\" in name:
                raise ShardError(f"{path}: member {name!r} points outside the set; refused")
            if name in members:
                raise ShardError(f"{path}: member {name!r} occurs twice; refused")
            if info.offset_data + info.size > size:
                raise ShardError(f"{path}: member {name!r} claims {info.size} bytes beyond the end of the tar; it is cut off")
            members[name] = Member(info.offset_data, info.size)
    return members


def skeleton(data: memoryview, members: dict[str, Member]) -> str:
    """xxh3-64 of every byte that is not a tensor file's: what shards.writer computes while it writes."""
    digest, at = xxhash.xxh3_64(), 0
    for begin, end in _bodies(members):
        digest.update(data[at:begin])
        at = end
    digest.update(data[at:])
    return digest.hexdigest()


def describe(path: Path, name: str) -> TarFile:
    """The manifest entry of a tar that is there."""
    tar = open_local(path, None)
    data = tar.fetch(0, path.stat().st_size)
    return TarFile(name, len(data), xxhash.xxh3_128_hexdigest(data), skeleton(data, tar.members))


def _bodies(members: dict[str, Member]) -> Iterator[tuple[int, int]]:
    for name, member in sorted(members.items(), key=lambda item: item[1].offset):
        if name.endswith(".safetensors"):
            yield member.offset, member.offset + member.size
