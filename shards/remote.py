"""Shard sets behind URLs (anything that fsspec opens: s3://, gs://, https://, memory://, ...): byte ranges, no files."""

from __future__ import annotations

import json

import fsspec
import torch
from torch import Tensor

from shards.errors import ShardError
from shards.schema import MANIFEST, Manifest, TarFile, parse_manifest
from shards.tar import Member, Tar


def is_url(path: object) -> bool:
    return "://" in str(path)


class Remote:
    """The files of a set under a URL."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        try:
            self.files, self.base = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise ShardError(f"{root}: this kind of address cannot be opened ({error}); install its fsspec package") from None

    def manifest(self) -> Manifest:
        return parse_manifest(self.read(MANIFEST).numpy().tobytes().decode("utf-8", "replace"), where=f"{self.root}/{MANIFEST}")

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        path = f"{self.base}/{name}"
        try:
            data = self.files.cat_file(path, start=begin, end=end)
        except FileNotFoundError:
            raise ShardError(f"{self.root}/{name}: no such file; is this the address of a shard set?") from None
        except Exception as error:  # every backend has its own classes
            raise ShardError(f"{self.root}/{name}: cannot be read ({type(error).__name__}: {error})") from None
        if begin is not None and end is not None and len(data) != end - begin:
            raise ShardError(f"{self.root}/{name}: {len(data)} bytes where {end - begin} were asked for; the tar is cut off")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def tar(self, entry: TarFile) -> Tar:
        """Through the index beside the tar."""
        name = entry.path.removesuffix(".tar") + ".idx"
        try:
            rows = json.loads(self.read(name).numpy().tobytes())["members"]
            members = {n: Member(int(offset), int(size), str(checksum)) for n, offset, size, checksum in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{self.root}/{name}: damaged index ({error}); copy it from the set once more") from None
        for found, member in members.items():
            if not 0 <= member.offset <= member.offset + member.size <= entry.n_bytes:
                raise ShardError(f"{self.root}/{name}: member {found!r} lies outside the tar; the index is not this tar's")
        return Tar(
            f"{self.root}/{entry.path}", members,
            lambda offset, size: self.read(entry.path, offset, offset + size),
        )
