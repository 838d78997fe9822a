"""Tensors out of safetensors bytes without a copy. Checked by hand: the bytes may come from anyone."""

from __future__ import annotations

import json
import warnings

import torch
from torch import Tensor

from shards.errors import ShardError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 1 << 20


def parse(data: memoryview, where: str) -> dict[str, Tensor]:
    """name -> view of `data`; `where` names the file in errors."""
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
                if not isinstance(d, int) or d < 0:
                    raise ValueError(f"shape {shape}")
                n_bytes *= d
            if not 0 <= begin <= end <= len(body) or end - begin != n_bytes:
                raise ShardError(f"{where}: tensor '{name}' does not fit its bytes; the file is damaged")
            found[name] = _view(body[begin:end], dtype, shape)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{where}: damaged safetensors header ({type(error).__name__}: {error})") from None


def _view(data: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": true, and documented on Sample
        flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # a member need not begin where its dtype is aligned
    return flat.view(dtype).view(shape)
