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

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 1 << 20
_MAX_DIMS = 8
_MAX_LENGTH = 1 << 40  # of a dimension: strides of an empty tensor must be numbers, too


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse(data: Tensor, where: str) -> dict[str, Tensor]:
    """name -> view of `data` (uint8 [n]); `where` names the file in errors."""
    if len(data) < 8:
        raise ShardError(f"{where}: too short for safetensors")
    n = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if n > min(_MAX_HEADER, len(data) - 8):
        raise ShardError(f"{where}: its header claims {n} bytes; refused")
    try:
        entries = _layout(data[8 : 8 + n].numpy().tobytes())
    except ShardError as error:
        raise ShardError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{where}: damaged safetensors header ({type(error).__name__}: {error})") from None
    body = data[8 + n :]
    found = {}
    for entry in entries:
        if entry.end > len(body):
            raise ShardError(f"{where}: tensor '{entry.name}' does not fit its bytes; the file is damaged")
        flat = body[entry.begin : entry.end]
        if flat.data_ptr() % entry.dtype.itemsize:
            flat = flat.clone()  # a member need not begin where its dtype is aligned
        found[entry.name] = flat.view(entry.dtype).view(entry.shape)
    return found


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity. At the speed of memory: a sum is finite only if all that it adds is."""
    wide = {n: t.float() if t.itemsize == 1 else t for n, t in tensors.items() if t.is_floating_point()}
    return [n for n, t in wide.items() if not t.sum().isfinite() and not t.isfinite().all()]  # else it was the sum: too large


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[_Entry, ...]:
    """Samples of one bucket have equal headers: each is read once."""
    found = []
    for name, entry in parse_json(header).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if any(type(d) is not int or not 0 <= d <= _MAX_LENGTH for d in shape) or len(shape) > _MAX_DIMS:
            raise ValueError(f"shape {ascii(shape)[:80]}")
        n_bytes = math.prod(shape) * dtype.itemsize
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end or end - begin != n_bytes:
            raise ValueError(f"tensor '{name}' has {end - begin} bytes, its shape and dtype make {n_bytes}")
        found.append(_Entry(check_field(name), dtype, shape, begin, end))
    return tuple(found)
