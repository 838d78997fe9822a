"""A pretended GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from hvtrain.models import kernels, measure
from hvtrain.models.kernels import KERNELS
from tests.models.packages import SDPA


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """No packages, and a GPU of a capability with a cuDNN; what a trial computes is computed on the CPU."""
    little = kernels._little_attention
    monkeypatch.setattr(
        kernels, "_little_attention", lambda device, dtype: little(torch.device("cpu"), dtype)
    )
    for name in (
        "flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface", "sageattention", "xfuser"
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    find = kernels.importlib.util.find_spec
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda n: find(n) if n in sys.modules else None)

    def make(capability: tuple[int, int], cudnn: int = 91501) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)

    make((9, 0))
    kernels._trial.cache_clear()
    # nothing can be timed here
    monkeypatch.setattr(measure, "fastest", lambda candidates, device, dtype, work: candidates[0])
    parts = {"attend": SDPA.attend, "partial": SDPA.partial, "backward": SDPA.backward}
    # as if PyTorch had it for the CPU
    monkeypatch.setitem(KERNELS, "cudnn", replace(KERNELS["cudnn"], **parts))
    yield make
    kernels._trial.cache_clear()
