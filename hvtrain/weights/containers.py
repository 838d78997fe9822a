"""Weights files: open any container as a lazy mapping, without reading the values and without running a
pickle.

Values come out of a memory map, and what has been copied is given back to the system
(`Weights.release`), so that loading costs one converted copy of the model, not two. Which model a file
holds is the concern of models/load.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.weights.stream import read_header
from shards.tensors import Extent

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("module", "ema", "state_dict", "model")  # keys under which training programs keep the weights
_SAMPLE_BYTES = 64
_SHARD = re.compile(r"(?P<name>.*)-\d+-of-(?P<total>\d+)\.\w+")


@dataclass(frozen=True)
class Mapped:
    """One tensor of a file: what is known without touching its values, and how to map them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    map: Callable[[], Tensor]  # a view of the file; read-only by agreement
    file: Path
    start: int | None = None  # where its bytes begin in the file, if they lie there as they are


@dataclass(frozen=True)
class Weights:
    """Names to tensors of one or several files."""

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Mapped]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def keys(self) -> list[str]:
        return list(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def get(self, name: str) -> Tensor:
        """The values, mapped from the file: copy them before changing them."""
        return self.entries[name].map()

    def release(self, tensor: Tensor) -> None:
        """Give the pages of a tensor from `get` back. Reading it again is allowed and reads the file
        again."""
        drop_pages(tensor)

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The tensors that `names` (present name -> new name) mentions, under their new names."""
        return replace(self, entries={new: self.entries[old] for old, new in names.items()})


def open_weights(path: str | Path) -> Weights:
    """A safetensors file, a .pt file (or .pth, .bin, .ckpt), an index of shards, or a
    directory with one of these."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_dir():
        found = _find_in(path)
    elif path.name.endswith(".index.json"):
        found = _files_of_index(path)
    else:
        if (shard := _SHARD.fullmatch(path.name)) and int(shard["total"]) > 1:
            raise CheckpointError(
                f"{path}: one of {int(shard['total'])} shards; name their directory or their .index.json file"
            )
        found = [path]
    entries: dict[str, Mapped] = {}
    metadata: dict[str, str] = {}
    for file in found:
        opened, info = _open_file(file)
        if double := entries.keys() & opened.keys():
            raise CheckpointError(f"{file}: '{min(double)}' is also in {entries[min(double)].file}")
        entries |= opened
        metadata |= info
    if not entries:
        raise CheckpointError(f"{path}: no tensors in it")
    return Weights(path, tuple(found), entries, metadata)


def fingerprint(weights: Weights) -> str:
    """Tells files with other weights apart: sha256 over names, dtypes, shapes and
    three samples of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(weights.entries):
        entry = weights.entries[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
        mapped = weights.get(name)
        flat = mapped.reshape(-1).view(torch.uint8)
        for start in (0, len(flat) // 2, max(len(flat) - _SAMPLE_BYTES, 0)):
            digest.update(flat[start : start + _SAMPLE_BYTES].numpy().tobytes())
        weights.release(mapped)
    return digest.hexdigest()


# --- which files --------------------------------------------------------------------------------------------


def _find_in(folder: Path) -> list[Path]:
    """The weights of a directory: an index, else the only file (or the only complete set of shards)."""
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return _files_of_index(indices[0])
    for endings in ((".safetensors",), _PICKLES):
        files = sorted(f for f in folder.iterdir() if f.suffix in endings and f.is_file())
        if len(files) == 1 or (files and _is_set_of_shards(files)):
            return files
        if files:
            names = ", ".join(f.name for f in files[:4])
            raise CheckpointError(f"{folder}: several weights files ({names}); name the one to use")
    raise CheckpointError(f"{folder}: no .safetensors, .pt or .index.json file in it")


def _is_set_of_shards(files: list[Path]) -> bool:
    found = [_SHARD.fullmatch(f.name) for f in files]
    totals = {(m["name"], int(m["total"])) for m in found if m}
    return all(found) and len(totals) == 1 and totals.pop()[1] == len(files)


def _files_of_index(index: Path) -> list[Path]:
    try:
        table = json.loads(index.read_text())["weight_map"]
        files = sorted({index.parent / str(name) for name in table.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not an index of shards (no readable 'weight_map': {error})"
        ) from None
    if missing := [f.name for f in files if not f.is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(files)} shards are missing: {', '.join(missing[:3])}"
        )
    return files


# --- containers ---------------------------------------------------------------------------------------------


def _open_file(path: Path) -> tuple[dict[str, Mapped], dict[str, str]]:
    if path.suffix in (".safetensors", ".sft"):
        return _open_safetensors(path)
    if path.suffix in _PICKLES:
        return _open_pickle(path), {}
    raise CheckpointError(
        f"{path}: not a weights file by its name; known: .safetensors, {', '.join(_PICKLES)}"
    )


def _open_safetensors(path: Path) -> tuple[dict[str, Mapped], dict[str, str]]:
    header = read_header(path)
    with open(path, "rb") as file:
        # Copy on write: torch wants a writable buffer, the file is never changed.
        # Tensors keep the mapping alive.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def entry(extent: Extent) -> Mapped:
        def view() -> Tensor:
            if extent.n_bytes == 0:
                return torch.empty(extent.shape, dtype=extent.dtype)
            n = extent.n_bytes // extent.dtype.itemsize
            return torch.frombuffer(
                mapped, dtype=extent.dtype, count=n, offset=extent.start
            ).reshape(extent.shape)

        return Mapped(extent.dtype, extent.shape, view, path, extent.start)

    return {name: entry(extent) for name, extent in header.extents.items()}, dict(header.metadata)


def _open_pickle(path: Path) -> dict[str, Mapped]:
    """A file of torch.save, mapped. Only tensors and plain containers are unpickled, never code."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(1)
        why = {
            b"P": "cut short: the end of the archive is missing; copy it again",
            b"\x80": "refused, a bare pickle may run code and cannot be mapped; if you trust it, load it "
            "elsewhere and save it as safetensors",
        }
        raise CheckpointError(f"{path}: {why.get(start, 'not a file of torch.save')}")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise CheckpointError(
                f"{path}: damaged, or a pickle of more than tensors; copy it again"
            ) from None
        what = f"'{found[1]}'"
        raise CheckpointError(
            f"{path}: refused, its pickle wants to run or build {what}, which weights do not need; if you "
            "trust the file, convert it to safetensors elsewhere"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or not a file of torch.save: {_first_line(error)}") from None
    tensors = _unwrap(content)
    if tensors is None:
        raise CheckpointError(f"{path}: no dict of tensors in it, nor under the keys {', '.join(_WRAPPERS)}")
    return {
        name: Mapped(value.dtype, tuple(value.shape), value.detach, path)
        for name, value in tensors.items()
    }


def _unwrap(content: Any) -> dict[str, Tensor] | None:
    """The dict of tensors itself, or inside a training program's wrapper."""
    if not isinstance(content, dict):
        return None
    for key in _WRAPPERS:
        if isinstance(content.get(key), dict):
            return _unwrap(content[key])
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors or None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- memory -------------------------------------------------------------------------------------------------


def drop_pages(tensor: Tensor) -> None:
    """Tell the system that the whole pages of this file-backed tensor are not needed now.

    Only for tensors of a memory map: their pages are unchanged, so dropping them loses nothing.
    """
    if sys.platform != "linux" or not tensor.is_contiguous() or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if stop > start:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(mmap.MADV_DONTNEED))
