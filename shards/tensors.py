"""Tensors out of safetensors bytes without a copy. Checked by hand: the bytes may come from anyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shards.errors import ShardError
from shards.files import parse_json
from shards.names import check_field

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 1 << 20
_MAX_DIMS = 8
_MAX_LENGTH = 1 << 40  # of a dimension: strides of an empty tensor must be numbers, too


class Extent(NamedTuple):
    """What a safetensors file says of one tensor before its values; `start` and
    `stop` count its bytes' places."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse(data: Tensor, where: str) -> dict[str, Tensor]:
    """name -> view of `data` (uint8 [n]); `where` names the file in errors."""
    if len(data) < 8:
        raise ShardError(f"{where}: too short for safetensors")
    n = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if n > min(_MAX_HEADER, len(data) - 8):
        raise ShardError(f"{where}: its header claims {n} bytes; refused")
    try:
        entries = _fields(data[8 : 8 + n].numpy().tobytes())
    except ShardError as error:
        raise ShardError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{where}: damaged safetensors header ({type(error).__name__}: {error})") from None
    body = data[8 + n :]
    found = {}
    for entry in entries:
        if entry.stop > len(body):
            raise ShardError(f"{where}: tensor '{entry.name}' does not fit its bytes; the file is damaged")
        flat = body[entry.start : entry.stop]
        if flat.data_ptr() % entry.dtype.itemsize:
            flat = flat.clone()  # a member need not begin where its dtype is aligned
        found[entry.name] = flat.view(entry.dtype).view(entry.shape)
    return found


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity. At the speed of memory: a sum is finite
    only if all that it adds is."""
    wide = {n: t.float() if t.itemsize == 1 else t for n, t in tensors.items() if t.is_floating_point()}
    # else it was the sum: too large
    return [n for n, t in wide.items() if not t.sum().isfinite() and not t.isfinite().all()]


@lru_cache(maxsize=1024)
def _fields(header: bytes) -> tuple[Extent, ...]:
    """Samples of one bucket have equal headers: each is read once."""
    found, _ = read_layout(header)
    for extent in found:
        check_field(extent.name)
    return tuple(found)


def read_layout(header: bytes) -> tuple[list[Extent], dict[str, str]]:
    """The tensors that a header lists, with the places that it gives them, and its metadata.

    Raises ValueError, TypeError, KeyError or AttributeError for what is no header.
    """
    table = parse_json(header)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not a table of texts")
    found = []
    for name, entry in table.items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"tensor {ascii(name)[:100]} has the dtype {entry['dtype']}, which is not supported"
            )
        extent = Extent(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop)
        if (
            any(type(d) is not int or not 0 <= d <= _MAX_LENGTH for d in extent.shape)
            or len(extent.shape) > _MAX_DIMS
        ):
            raise ValueError(f"shape {ascii(extent.shape)[:80]}")
        if (
            type(start) is not int or type(stop) is not int or not 0 <= start <= stop
            or stop - start != extent.n_bytes
        ):
            raise ValueError(
                f"tensor '{name}' has {stop - start} bytes, its shape and dtype make {extent.n_bytes}"
            )
        found.append(extent)
    return found, metadata
