"""What a merge really takes: every tensor's storage followed from its making to
its end, files' maps apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hvtrain.config import MergeConfig
from hvtrain.fit.merges.needs import Needs, of_merge
from hvtrain.fit.merges.run import Loras, job_of
from hvtrain.fit.trace import Ledger, Shape
from hvtrain.merge import run as merge
from hvtrain.weights.containers import Weights


class Meter(Ledger):
    """Also tensors that no operation has made: those that a LoRA's file or the journal gives."""

    def __init__(self) -> None:
        super().__init__(nn.Module())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _follow(self, x: Tensor) -> None:
        if x.device.type != "meta":
            super()._follow(x)


def live_bytes(cfg: MergeConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """The worst moment of a merge on the CPU."""
    meter, get = Meter(), Weights.get

    def mapped(self: Weights, name: str) -> Tensor:
        peak, value = meter.peak, get(self, name)
        meter._follow(value)
        meter.leave_out(value)  # the file's own pages, which are given back
        meter.peak = peak
        return value

    with monkeypatch.context() as patch, meter:
        patch.setattr(Weights, "get", mapped)
        merge.run(cfg)
    return meter.peak


def predicted(cfg: MergeConfig, shape: Shape) -> Needs:
    return of_merge(job_of(replace(cfg, device="cpu"), Loras()), shape)
