"""Shard sets behind URLs (anything that fsspec opens: s3://, gs://, https://, memory://,
...): byte ranges, no files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader

import fsspec
import torch
from torch import Tensor

from shards.buffers import empty
from shards.errors import ShardError
from shards.schema import MANIFEST, Manifest, TarFile, parse_manifest
from shards.tar import Tar, as_tensor, parse_index

# user:password@ (where a password holds "/", up to the next "@"; :8080/ is a port), and the
# query, which may be a signature.
_SECRET = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s@]*:(?!\d+(?:/|$))\S*?@)|\?[^\s'\")]*")


_BUFFER = 1 << 20


def is_url(path: object) -> bool:
    return "://" in str(path)


def shown(address: object) -> str:
    """A text with addresses as they may be printed and kept: without passwords and signatures."""
    text = str(address)
    return re.sub(r"\S*://\S*", lambda url: _SECRET.sub("", url[0]), text) if is_url(text) else text


class Remote:
    """The files of a set under a URL."""

    def __init__(self, root: str) -> None:
        self.root = shown(root).rstrip("/")  # for people
        address, query, signature = root.rstrip("/").partition("?")
        self.query = query + signature  # belongs behind each file's name
        try:
            self.files, self.base = fsspec.core.url_to_fs(address.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise ShardError(
                f"{self.root}: this kind of address cannot be opened ({shown(error)}); install its fsspec "
                "package"
            ) from None

    def manifest(self) -> Manifest:
        return parse_manifest(self.read(MANIFEST).numpy().tobytes(), where=f"{self.root}/{MANIFEST}")

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        path = f"{self.base}/{name}{self.query}"
        try:
            data = self.files.cat_file(path, start=begin, end=end)
        except Exception as error:  # every backend has its own classes
            raise self._failed(name, error) from None
        if begin is not None and end is not None and len(data) != end - begin:
            raise self._cut_off(name, len(data), end - begin)
        return as_tensor(data) if data else torch.empty(0, dtype=torch.uint8)

    def _failed(self, name: str, error: Exception) -> ShardError:
        if isinstance(error, FileNotFoundError):
            return ShardError(f"{self.root}/{name}: no such file; is this the address of a shard set?")
        return ShardError(f"{self.root}/{name}: cannot be read ({type(error).__name__}: {shown(error)})")

    def _cut_off(self, name: str, n: int, wanted: int) -> ShardError:
        return ShardError(f"{self.root}/{name}: {n} bytes where {wanted} were asked for; the tar is cut off")

    @contextmanager
    def streamed(self, entry: TarFile) -> Iterator[Tar]:
        """As `tar`, but what is asked for in the order in which it lies comes out
        of one request for all of it."""
        tar, at = self.tar(entry), 0
        # fsspec's files of HTTP are byte ranges, too, unless their blocks have no size; it
        # asks for the file's unless told.
        http = {"block_size": 0, "size": entry.n_bytes, "read_bufsize": _BUFFER}
        options = http if "http" in str(self.files.protocol) else {}
        try:
            source = self.files.open(f"{self.base}/{entry.path}{self.query}", "rb", **options)
        except Exception as error:
            raise self._failed(entry.path, error) from None

        def fetch(offset: int, size: int) -> Tensor:
            nonlocal at
            if offset < at:  # another program's order
                return self.read(entry.path, offset, offset + size)
            n, skipped, at = offset - at + size, offset - at, offset + size
            data = empty((-(-n // _BUFFER) * _BUFFER,), torch.uint8)[:n]
            try:
                n_read = file.readinto(data.numpy())  # type: ignore[arg-type]
            except Exception as error:
                raise self._failed(entry.path, error) from None
            if n_read != n:
                raise self._cut_off(entry.path, n_read, n)
            return data[skipped:]

        with BufferedReader(source, _BUFFER) as file:
            tar.fetch = fetch
            yield tar

    def tar(self, entry: TarFile) -> Tar:
        """Through the index beside the tar."""
        name = entry.path.removesuffix(".tar") + ".idx"
        data = self.read(name).numpy().tobytes()
        try:
            members = parse_index(data, entry.n_bytes)
        except ShardError as error:
            raise ShardError(f"{self.root}/{name}: {error}; copy it from the set once more") from None
        return Tar(
            f"{self.root}/{entry.path}", members,
            lambda offset, size: self.read(entry.path, offset, offset + size),
        )
