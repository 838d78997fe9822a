"""Safetensors files written tensor by tensor, so that a 26 GB model passes
through one tensor's worth of memory.

The library's own writer wants every tensor at once. The format is simple enough to stream: 8 bytes of header
length, a JSON header with every name, dtype, shape and byte range, then the bytes. All ranges follow from
names, dtypes and shapes, so the header goes out first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from hvtrain.errors import CheckpointError
from hvtrain.weights.outputs import writing
from shards.atomic import atomic_path, sync, write_text
from shards.tensors import DTYPES, Extent, read_layout

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 2**20  # the library refuses longer ones


@dataclass(frozen=True)
class Header:
    extents: dict[str, Extent]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Names, dtypes, shapes, byte ranges and metadata of a safetensors file, in file
    order; its values stay on disk."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: not a safetensors file (or cut short: {size} bytes)")
        try:
            extents, metadata = read_layout(file.read(length))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged, or not a safetensors file: {error}") from None
    found = {}
    for extent in sorted(extents, key=lambda extent: extent.start):
        start, stop = (8 + length + place for place in extent[3:])
        if stop > size:
            raise CheckpointError(
                f"{path}: cut short or damaged: '{extent.name}' should end at byte {stop}, the file has "
                f"{size}; copy it again"
            )
        found[extent.name] = extent._replace(start=start, stop=stop)
    return Header(found, metadata)


def data_sum(path: str | Path) -> str:
    """SHA-256 of all that follows the header: of the tensors' bytes, whatever the metadata say."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def lay_out(
    extents: Iterable[Extent], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[Extent]]:
    """The header's bytes and the extents with their places in the file.

    Widest dtypes come first (given order among equals), which keeps every tensor aligned for memory mapping.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    placed, offset = [], 0
    for extent in sorted(extents, key=lambda extent: -extent.dtype.itemsize):
        placed.append(extent._replace(start=offset, stop=offset + extent.n_bytes))
        offset = placed[-1].stop
        ends = list(placed[-1][3:])
        table[extent.name] = {
            "dtype": _CODES[extent.dtype], "shape": list(extent.shape), "data_offsets": ends
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return (
        head,
        [extent._replace(start=len(head) + extent.start, stop=len(head) + extent.stop) for extent in placed]
    )


_PROGRESS_BYTES = 1 << 30  # written between two notes of how far a resumable file is


class TensorWriter:
    """Takes each declared tensor once, in any order, from any threads; see `open_writer`. Tensors that are
    `done` already it does not wait for; from time to time it has `note` say which are safely on the disk."""

    def __init__(
        self, file: BinaryIO, extents: Iterable[Extent], *, done: Iterable[str] = (),
        note: Callable[[list[str]], None] | None = None,
    ) -> None:
        self._file, self._note, self._done, self._since, self._lock = (
            file, note, list(done), 0, threading.Lock()
        )
        self._waiting = {extent.name: extent for extent in extents}
        for name in self._done:
            del self._waiting[name]

    @property
    def waiting(self) -> list[str]:
        """Names not yet written, in file order: following it makes the writing sequential."""
        return list(self._waiting)

    def finish(self) -> None:
        """Raises ValueError unless all that was declared is written."""
        if self._waiting:
            raise ValueError(
                f"{self._file.name}: {len(self._waiting)} declared tensors not written: {self.waiting[:3]}"
            )

    def write(self, name: str, tensor: torch.Tensor) -> None:
        extent = self._waiting[name]
        if tensor.dtype != extent.dtype or tuple(tensor.shape) != extent.shape:
            raise ValueError(
                f"{name}: declared {extent.dtype} {extent.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        self.write_bytes(name, tensor_bytes(tensor))

    def write_bytes(self, name: str, data: memoryview) -> None:
        """The same for bytes that are already in the file's form: a copy without a detour through tensors."""
        extent = self._waiting.pop(name)
        if data.nbytes != extent.n_bytes:
            raise ValueError(f"{name}: declared {extent.n_bytes} bytes, got {data.nbytes}")
        self._pieces(extent, lambda done: os.pwrite(self._file.fileno(), data[done:], extent.start + done))

    def copy(self, name: str, source: int, start: int) -> None:
        """The same from a place in another file (a descriptor), without a way through this process."""
        extent, target = self._waiting.pop(name), self._file.fileno()
        self._pieces(
            extent,
            lambda done: _copy_range(source, target, extent.n_bytes - done, start + done, extent.start + done)
        )

    def _pieces(self, extent: Extent, piece: Callable[[int], int]) -> None:
        """As many as it takes: the system may write less than it is asked to."""
        done = 0
        while done < extent.n_bytes:
            if not (n := piece(done)):
                raise CheckpointError(
                    f"the file with '{extent.name}' ends too early; it was changed while it was read"
                )
            done += n
        if self._note is None:
            return
        with self._lock:
            self._done.append(extent.name)
            self._since += extent.n_bytes
            if self._since >= _PROGRESS_BYTES:
                self._since = 0
                os.fsync(self._file.fileno())
                self._note(list(self._done))


def _copy_range(source: int, target: int, n: int, start: int, to: int) -> int:
    try:
        return os.copy_file_range(source, target, n, start, to)
    except (AttributeError, OSError):  # not Linux, or file systems that cannot
        return os.pwrite(target, os.pread(source, min(n, 1 << 23), start), to)


@contextmanager
def open_writer(
    path: str | Path, extents: Iterable[Extent], *, metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """A writer for these tensors; the file appears under its name only when all of them are in it."""
    head, placed = lay_out(extents, metadata)
    with writing(path), atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        file.flush()
        writer = TensorWriter(file, placed)
        yield writer
        writer.finish()


@contextmanager
def open_resumable(
    path: str | Path, extents: Iterable[Extent], *, metadata: Mapping[str, str] | None = None, signature: str
) -> Iterator[TensorWriter]:
    """As `open_writer`, but a run that was killed is continued: `waiting` is what is left to write.

    `signature` stands for everything that the contents depend on; a half-written
    file of another one is begun anew.
    """
    path = Path(path)
    head, placed = lay_out(extents, metadata)
    own = hashlib.sha256(signature.encode() + head).hexdigest()
    partial, journal = partial_of(path), path.with_name(f"{partial_of(path).name}.json")

    def note(names: list[str]) -> None:
        write_text(journal, json.dumps({"signature": own, "done": names}))

    with writing(path):
        try:
            with _open_partial(partial) as file:
                done = _written(journal, own) if os.fstat(file.fileno()).st_size else []
                if not done:
                    journal.unlink(missing_ok=True)  # first: it must never speak of another file's bytes
                    file.truncate(0)
                    file.write(head)
                    file.flush()
                writer = TensorWriter(file, placed, done=done, note=note)
                yield writer
                writer.finish()
                os.fsync(file.fileno())
                os.replace(partial, path)
            sync(path.parent)
        except _Busy:
            raise
        except Exception:  # a mistake, not a kill: nothing to go on with
            partial.unlink(missing_ok=True)
            raise
        finally:
            if not partial.exists():
                journal.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The name under which a resumable file grows."""
    return path.with_name(f".{path.name}.partial")


class _Busy(CheckpointError):
    """Somebody else's file: leave it alone."""


def _open_partial(partial: Path) -> BinaryIO:
    """A regular file of this name and no other, held by this process alone: it is never written through a
    link that was laid there, and never while another merge writes it."""
    with suppress(FileNotFoundError):
        status = os.lstat(partial)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            partial.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = open(os.open(partial, flags, 0o666), "r+b")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = True
    except OSError:  # a file system without locks
        busy = False
    else:  # who held it may just have finished: then it has its final name
        busy = not partial.exists() or not os.path.samestat(os.lstat(partial), os.fstat(file.fileno()))
    if busy:
        file.close()
        raise _Busy(f"{partial}: another process is writing it; wait for it, or choose another --output")
    return file


def _written(journal: Path, own: str) -> list[str]:
    """Tensors that an earlier run of the same signature has written."""
    try:
        note = json.loads(journal.read_text())
        return list(note["done"]) if note["signature"] == own else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as bytes, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
