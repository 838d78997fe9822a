"""One tar, read: members indexed once, values straight out of a memory map or by byte ranges of a URL."""

from __future__ import annotations

import mmap
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from shards.errors import ShardError
from shards.files import open_plain, parse_json, parse_row, read_plain
from shards.names import check_member
from shards.schema import TarFile, check_int, index_path
from shards.tensors import not_finite, parse
from shards.writer import CHECKSUM

_MAX_JSON = 1 << 20
_NEAR = 1 << 16  # bytes between two members that are cheaper to fetch than to ask for twice


@dataclass(frozen=True)
class Member:
    offset: int
    size: int
    checksum: str = ""  # "": KEY.json has it


class Tar:
    """Samples of a tar by key. `fetch(offset, size)` hands out bytes, as a uint8 tensor [size].

    A sample's checksum is compared, and its values are looked at, when it is read for the first time: later
    epochs read at the speed of memory.
    """

    def __init__(self, where: str, members: dict[str, Member], fetch: Callable[[int, int], Tensor]) -> None:
        self.where, self.members, self.fetch = where, members, fetch
        self._sound: set[str] = set()
        self._finite: set[str] = set()

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a sample, after its checksum was compared."""
        return parse(self._checked(key), f"{self.where}: {key}.safetensors")

    def sample(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and meta, for training: NaN and infinity are a ShardError. The JSON is read once."""
        data, text = self._both(key)
        row = self._row(key, text)
        tensors = parse(self._checked(key, data, row), f"{self.where}: {key}.safetensors")
        if key not in self._finite:
            for name in not_finite(tensors):
                raise ShardError(
                    f"{self.where}: {key}: '{name}' holds NaN or infinite values; encode it again, or leave "
                    "it out with data.on_bad_sample=skip"
                )
            self._finite.add(key)
        row.pop(CHECKSUM, None)
        return tensors, row

    def checked(self, key: str) -> memoryview:
        """The bytes of KEY.safetensors; a ShardError if they are not what was written."""
        return memoryview(self._checked(key).numpy())  # type: ignore[arg-type]

    def _checked(self, key: str, data: Tensor | None = None, row: dict[str, Any] | None = None) -> Tensor:
        name = f"{key}.safetensors"
        data = self._fetch(name) if data is None else data
        member = self.members[name]
        if key in self._sound:
            return data
        wanted = member.checksum
        if not wanted and f"{key}.json" in self.members:
            wanted = (row or self._row(key)).get(CHECKSUM, "")
        if wanted and xxhash.xxh3_64_hexdigest(data.numpy()) != wanted:  # type: ignore[arg-type]
            raise ShardError(
                f"{self.where}: {name} (bytes {member.offset} to {member.offset + member.size}) is damaged: "
                "its checksum is not the one it was written with; encode it again, or restore the tar"
            )
        self._sound.add(key)
        return data

    def meta(self, key: str) -> dict[str, Any]:
        row = self._row(key)
        row.pop(CHECKSUM, None)
        return row

    def keys(self) -> list[str]:
        """Of the samples, in the tar's order."""
        return [name.removesuffix(".safetensors") for name in self.members if name.endswith(".safetensors")]

    def bytes(self, name: str) -> memoryview:
        return memoryview(self._fetch(name).numpy())  # type: ignore[arg-type]

    def _fetch(self, name: str) -> Tensor:
        member = self._member(name)
        return self.fetch(member.offset, member.size)

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise ShardError(
                f"{self.where}: no member {name}; the tar does not fit the manifest, encode it again"
            )
        return self.members[name]

    def _both(self, key: str) -> list[Tensor]:
        """KEY.safetensors and KEY.json: neighbours, so one request of a URL brings both."""
        pair = [self._member(f"{key}.{kind}") for kind in ("safetensors", "json")]
        begin, end = min(m.offset for m in pair), max(m.offset + m.size for m in pair)
        # another program wrote them, with others in between
        if end - begin > sum(m.size for m in pair) + _NEAR:
            return [self.fetch(m.offset, m.size) for m in pair]
        data = self.fetch(begin, end - begin)
        return [data[m.offset - begin : m.offset - begin + m.size] for m in pair]

    def _row(self, key: str, text: Tensor | None = None) -> dict[str, Any]:
        try:
            if text is None:
                data = self.bytes(f"{key}.json")
            else:
                data = memoryview(text.numpy())  # type: ignore[arg-type]
            if len(data) > _MAX_JSON:
                raise ValueError(f"{len(data)} bytes")
            return parse_row(bytes(data))
        except ValueError as error:
            raise ShardError(f"{self.where}: {key}.json is damaged ({error}); encode it again") from None


def open_local(path: Path, entry: TarFile | None) -> Tar:
    """Map a tar. With the manifest's entry, its size and everything but the tensors'
    bytes are compared with it."""
    where = str(path)
    try:
        with open(open_plain(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if entry is not None:
                check_size(path, size, entry)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = as_tensor(content)
        members = _indexed(path, size, data, entry) or scan(path, size)
    except FileNotFoundError:
        raise missing(path) from None
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(f"{path}: not a readable tar ({error}); encode it again") from None
    if entry is not None and entry.skeleton and skeleton(data, members) != entry.skeleton:
        raise ShardError(
            f"{path}: its headers or JSON are not those that were written: the tar is damaged or was swapped "
            "with another; restore it or encode again"
        )
    return Tar(where, members, lambda offset, size: data[offset : offset + size])


def as_tensor(content: mmap.mmap | bytes) -> Tensor:
    """uint8 [n], not a copy. What nobody may write to is what we want; the views are documented as such."""
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    return torch.frombuffer(content, dtype=torch.uint8)


def _indexed(path: Path, size: int, data: Tensor, entry: TarFile | None) -> dict[str, Member] | None:
    """Members by the index beside the tar, if the manifest's checksum of headers and JSON
    proves that it is this tar's."""
    if entry is None or not entry.skeleton:
        return None
    try:
        members = parse_index(read_plain(index_path(path)), size)
    except (OSError, ShardError):
        return None  # the tar itself says the same, more slowly
    return members if skeleton(data, members) == entry.skeleton else None


def parse_index(data: bytes, size: int) -> dict[str, Member]:
    """Members of a tar of `size` bytes by what lies beside it. Raises ShardError for
    anything that no tar could be."""
    members: dict[str, Member] = {}
    try:
        for name, offset, n, checksum in parse_json(data)["members"]:
            if check_member(name) in members:
                raise ShardError(f"member {name!r} occurs twice; refused")
            check_int(f"offset of {name!r}", offset, 0, size)
            check_int(
                f"size of {name!r}, which begins at byte {offset} of a tar of {size},", n, 0, size - offset
            )
            if not isinstance(checksum, str):
                raise TypeError(f"checksum {ascii(checksum)[:80]}")
            members[name] = Member(offset, n, checksum)
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"damaged index ({error})") from None
    return members


def check_size(path: Path, size: int, entry: TarFile) -> None:
    if size != entry.n_bytes:
        raise ShardError(
            f"{path}: {size} bytes, the manifest says {entry.n_bytes}; the tar is damaged or another one, "
            "encode it again"
        )


def missing(path: Path) -> ShardError:
    return ShardError(f"{path}: the manifest lists this tar but it is missing; restore it or encode again")


def scan(path: Path, size: int) -> dict[str, Member]:
    """Members of a tar that may come from anyone: plain files with plain names, each
    once, inside the tar's bytes."""
    members: dict[str, Member] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            name = info.name
            if not info.isreg() or info.issparse():
                raise ShardError(f"{path}: member {name!r} is not a plain file; refused")
            try:
                check_member(name)
            except ShardError as error:
                raise ShardError(f"{path}: {error}") from None
            if name in members:
                raise ShardError(f"{path}: member {name!r} occurs twice; refused")
            if info.offset_data + info.size > size:
                raise ShardError(
                    f"{path}: member {name!r} claims {info.size} bytes beyond the end of the tar; it is cut "
                    "off"
                )
            members[name] = Member(info.offset_data, info.size)
    return members


def skeleton(data: Tensor, members: dict[str, Member]) -> str:
    """xxh3-64 of every byte that is not a tensor file's: what shards.writer computes while it writes."""
    digest, at, view = xxhash.xxh3_64(), 0, memoryview(data.numpy())  # type: ignore[arg-type]
    for begin, end in _bodies(members):
        digest.update(view[at:begin])
        at = end
    digest.update(view[at:])
    return digest.hexdigest()


def describe(path: Path, name: str) -> TarFile:
    """The manifest entry of a tar that is there."""
    tar = open_local(path, None)
    data = tar.fetch(0, path.stat().st_size)
    digest = xxhash.xxh3_128_hexdigest(data.numpy())  # type: ignore[arg-type]
    return TarFile(name, len(data), digest, skeleton(data, tar.members))


def _bodies(members: dict[str, Member]) -> Iterator[tuple[int, int]]:
    for name, member in sorted(members.items(), key=lambda item: item[1].offset):
        if name.endswith(".safetensors"):
            yield member.offset, member.offset + member.size
