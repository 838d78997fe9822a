"""What several checks need: kernels that run here, memory, errors."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from hvtrain.models.kernels import KERNELS, Kernel
from tests.gpu.report import Setup

GIB = 2**30


def dtype_of(here: Setup) -> torch.dtype:
    return torch.bfloat16 if here.cuda else torch.float32


def trained(here: Setup) -> list[Kernel]:
    """Kernels with a backward that run here."""
    return [k for k in KERNELS.values() if k.trains and k.missing(here.device, dtype_of(here)) is None]


def peak(here: Setup, work: Callable[[], object]) -> float | None:
    """GiB, beyond nothing; None on the CPU."""
    gc.collect()
    if not here.cuda:
        work()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(here.device)
    work()
    torch.cuda.synchronize(here.device)
    return torch.cuda.max_memory_allocated(here.device) / GIB


def relative(have: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value; NaN where anything is."""
    return float((have.double() - want.double()).abs().max() / want.double().abs().max())
