"""What LoRAs change of each layer, and which of them change the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair


@dataclass(frozen=True)
class Contribution:
    """What one LoRA does to one layer."""

    lora: str  # its label
    pair: LoraPair
    multiplier: float

    @cached_property
    def rows(self) -> Tensor:
        """bool [out]: output rows that it changes, told from the tensors themselves."""
        return (
            self.pair.up.ne(0).any(dim=1)
            if self.pair.down.any() else torch.zeros(len(self.pair.up), dtype=torch.bool)
        )

    def delta(self) -> Tensor:
        return self.pair.delta() * self.multiplier


@dataclass(frozen=True)
class Overlap:
    """Two LoRAs in one layer."""

    module: str
    first: str
    second: str
    n_rows: int


def overlaps(layers: Mapping[str, Sequence[Contribution]]) -> Iterator[Overlap]:
    for module, found in layers.items():
        for a, b in combinations(found, 2):
            n = int((a.rows & b.rows).sum())
            if n:
                yield Overlap(module, a.lora, b.lora, n)


def by_layer(loras: Sequence[tuple[LoraFile, float]]) -> dict[str, list[Contribution]]:
    """Contributions to each layer. A multiplier of 0 switches a LoRA off completely."""
    layers: dict[str, list[Contribution]] = {}
    for name, (lora, multiplier) in zip(labels(loras), loras, strict=True):
        for module, pair in lora.pairs.items() if multiplier != 0.0 else ():
            layers.setdefault(module, []).append(Contribution(name, pair, multiplier))
    return layers


def labels(loras: Sequence[tuple[LoraFile, float]]) -> list[str]:
    """A name for each that no other has: the file's, with as many of its folders as that
    takes. Runs often share theirs."""
    parts = [lora.path.absolute().parts for lora, _ in loras]

    def label(number: int, own: tuple[str, ...]) -> str:
        for n in range(1, len(own) + 1):
            if sum(other[-n:] == own[-n:] for other in parts) == 1:
                return str(Path(*own[-n:]))
        return f"{own[-1]} ({number})"  # a file given twice

    return [label(number, own) for number, own in enumerate(parts, start=1)]


