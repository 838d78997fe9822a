"""What LoRAs do to a model's layers, added while it runs: one copy of the weights serves the base, each LoRA
alone, and what the merge will be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.lorafiles.overlap import Contribution
from hvtrain.lorafiles.pairs import changed_rows


@dataclass
class LowRank:
    """A change of the output rows from `begin` on: up [rows, r] @ down [r, in],
    scales and multipliers folded in."""

    down: Tensor
    up: Tensor
    begin: int = 0
    owner: str = ""  # the LoRA that it belongs to, if it is one's alone

    def of(self, x: Tensor) -> Tensor:  # [... in] -> [... rows]
        return F.linear(F.linear(x, self.down.to(x.device)), self.up.to(x.device))


@dataclass
class Full:
    """The same as a whole matrix [rows, in], which may lie on the disk."""

    matrix: Callable[[], Tensor]
    begin: int = 0

    def of(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.device))


Change = LowRank | Full
ByLayer = Mapping[str, Sequence[Change]]


class Changes:
    """Named sets of changes to a model's Linear layers, of which one counts at a time; none at first."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sets: dict[Hashable, dict[str, list[Change]]] = {}
        self.active: Hashable = None
        self._hooked: set[str] = set()

    def put(self, key: Hashable, changes: ByLayer) -> None:
        """Name a set, or add layers to one."""
        own = self.sets.setdefault(key, {})
        for module, parts in changes.items():
            own[module] = list(parts)
            if module not in self._hooked:
                self._hooked.add(module)
                self.model.get_submodule(module).register_forward_hook(self._hook(module))

    @contextmanager
    def using(self, key: Hashable) -> Iterator[None]:
        """The model with this set; None is the base."""
        before, self.active = self.active, key
        try:
            yield
        finally:
            self.active = before

    def _hook(self, module: str):
        def add(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            for change in self.sets.get(self.active, {}).get(module, ()):
                x = args[0] if torch.is_autocast_enabled(args[0].device.type) else args[0].float()
                delta = change.of(x).to(out.dtype)
                after = out.shape[-1] - change.begin - delta.shape[-1]
                out = out + (F.pad(delta, (change.begin, after)) if change.begin or after else delta)
            return out

        return add


def low_rank(c: Contribution) -> LowRank:
    """A LoRA's change of one layer, in the rows that it changes."""
    begin, end = changed_rows(c.pair.up)
    return LowRank(
        c.pair.down.float(), c.pair.up[begin:end].float() * (c.multiplier * c.pair.scale), begin, c.lora
    )
