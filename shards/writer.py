"""Writing: one tar at a time, under its final name only when it is whole and on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
from safetensors.torch import save
from torch import Tensor

from shards.atomic import create_temporary, sync, write_text
from shards.errors import ShardError
from shards.names import check_key
from shards.schema import TarFile, index_path

CHECKSUM = "xxh3"  # the key in KEY.json: xxh3-64 of KEY.safetensors
_BLOCK = 512
_RECORD = 10240  # tars end at a multiple of this, as GNU tar writes them


class TarWriter:
    """A tar under a temporary name until `finish`; leaving the context without it removes it.

    Hashes while it writes: nothing is read back. Out of disk space is a
    ShardError, and nothing is left behind.
    """

    def __init__(self, root: Path, column: str) -> None:
        self.root, self.folder = root, root / column
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.temporary, handle = create_temporary(self.folder / "tar")
        except OSError as error:
            raise full(error, self.folder) from None
        self.file = os.fdopen(handle, "wb", buffering=0)
        self.whole, self.skeleton = xxhash.xxh3_128(), xxhash.xxh3_64()
        self.at = 0
        self.members: list[list[Any]] = []

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # what it could not write goes away
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def add(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """KEY.safetensors and KEY.json, as webdataset reads them."""
        self.add_bytes(key, save({k: t.contiguous() for k, t in tensors.items()}), meta)

    def add_bytes(self, key: str, data: bytes | memoryview, meta: Mapping[str, Any]) -> None:
        check_key(key)
        row = {**meta, CHECKSUM: xxhash.xxh3_64_hexdigest(data)}
        self._member(f"{key}.safetensors", data, tensors=True)
        self._member(f"{key}.json", json.dumps(row, ensure_ascii=False).encode(), tensors=False)

    def finish(self, name: str) -> TarFile:
        """Give it its name, relative to the set."""
        self._write(bytes(2 * _BLOCK + (-(self.at + 2 * _BLOCK)) % _RECORD))
        path = self.root / name
        try:
            self.file.close()  # where NFS says that a quota is used up
            sync(self.temporary)
            # first: a tar that is there has its index
            write_text(index_path(path), json.dumps({"members": self.members}))
            os.replace(self.temporary, path)
            sync(path.parent)
        except OSError as error:
            raise full(error, path) from None
        return TarFile(name, self.at, self.whole.hexdigest(), self.skeleton.hexdigest())

    def _member(self, name: str, data: bytes | memoryview, *, tensors: bool) -> None:
        info = tarfile.TarInfo(name)  # no owner, no time: equal samples make equal tars
        info.size = len(data)
        self._write(
            info.tobuf(tarfile.USTAR_FORMAT if len(name) <= tarfile.LENGTH_NAME else tarfile.GNU_FORMAT)
        )
        self.members.append([name, self.at, len(data), xxhash.xxh3_64_hexdigest(data)])
        self._write(data, skeleton=not tensors)
        self._write(bytes(-len(data) % _BLOCK))

    def _write(self, data: bytes | memoryview, *, skeleton: bool = True) -> None:
        self.whole.update(data)
        if skeleton:
            self.skeleton.update(data)
        self.at += len(data)
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise full(error, self.folder) from None


def write_tar(
    root: Path, name: str, samples: Iterable[tuple[str, Mapping[str, Tensor], Mapping[str, Any]]]
) -> TarFile:
    """Write `root/name` from (key, tensors, meta) triples."""
    with TarWriter(root, str(Path(name).parent)) as out:
        for key, tensors, meta in samples:
            out.add(key, tensors, meta)
        return out.finish(name)


def full(error: OSError, path: Path) -> ShardError:
    """What a failed write says."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free
        return ShardError(
            f"{path}: the disk is full ({free / 2**20:.0f} MiB left); nothing half-written was kept: make "
            "room and run the same command again, it continues"
        )
    return ShardError(
        f"{path}: cannot be written ({error.strerror or error}); mend that and run the same command again"
    )


def remove_tar(path: Path) -> None:
    path.unlink(missing_ok=True)
    index_path(path).unlink(missing_ok=True)
