"""Memory for batches, used again: fresh pages cost the kernel as much time as filling them.

A buffer comes back when the last tensor that views it is gone, so a batch may be kept as long as one likes.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

KEPT = 16  # free buffers of one size; a training run has a few buckets, each with a few fields
_SMALL = 1 << 16  # below, malloc has warm memory
_free: dict[int, deque[np.ndarray]] = {}


def empty(shape: tuple[int, ...], dtype: torch.dtype, *, pin: bool = False) -> Tensor:
    """Uninitialised. `pin`: page-locked, which torch keeps a pool of by itself."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if pin or n_bytes < _SMALL:
        return torch.empty(shape, dtype=dtype, pin_memory=pin)
    waiting = _free.setdefault(n_bytes, deque(maxlen=KEPT))
    try:
        owner = waiting.pop()
    except IndexError:
        owner = np.empty(n_bytes, dtype=np.uint8)
    view = owner.view()  # the tensor holds this view, and nobody else does
    weakref.finalize(view, waiting.append, owner).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)
