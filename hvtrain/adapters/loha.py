"""LoHa: W + (alpha / rank) * (w1_a w1_b) ∘ (w2_a w2_b), the Hadamard product of two low-rank matrices.

FedPara, arXiv 2108.06098; names, initialisation and scaling as in LyCORIS, whose files these become.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvtrain.adapters.layer import AdaptedLinear, Parts
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.rng import generator

_STARTS = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}  # standard deviations


class LohaLinear(AdaptedLinear):
    """w1_a and w2_a [rows, rank], w1_b and w2_b [rank, in]: up to rank², for twice a LoRA's parameters.

    The delta is made whole in each forward, a matrix of the layer's size; three are kept for the backward.
    """

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    LABEL = "LoHa"
    PARTS: ClassVar = {part: f"hada_{part}" for part in _STARTS}
    ROWS: ClassVar = ("w1_a", "w2_a")
    RANK = "w1_b"
    METADATA: ClassVar = {"ss_network_module": "lycoris.kohya", "ss_network_args": {"algo": "loha"}}
    DROPS = False  # of what? A rank component is no sum's term here

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        for part, std in _STARTS.items():
            shape = (n_rows, self.rank) if part in self.ROWS else (self.rank, self.in_features)
            draw = generator(seed, stream=f"loha-init/{part}/{self.name}")
            start = torch.randn(shape, generator=draw) * std
            self.register_parameter(f"hada_{part}", nn.Parameter(start.to(device)))

    def delta(self, x: Tensor, scale: float | Tensor) -> Tensor:
        return F.linear(x, (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b) * scale)

    @staticmethod
    def norm(parts: Parts) -> Tensor:
        a1, b1, a2, b2 = (parts[part].float() for part in _STARTS)
        return torch.linalg.matrix_norm((a1 @ b1) * (a2 @ b2))

    @classmethod
    def pair(cls, parts: Parts, alpha: float) -> LoraPair:
        """Of rank², for a product of two terms of rank 1 has rank 1: (a1 b1) ∘ (a2 b2) = (a1 ∘ a2)(b1 ∘
        b2)."""
        a1, b1, a2, b2 = (parts[part].float() for part in _STARTS)
        fits = [a.ndim == b.ndim == 2 and a.shape[1] == len(b) > 0 for a, b in ((a1, b1), (a2, b2))]
        if not all(fits) or (a1.shape, b1.shape) != (a2.shape, b2.shape):
            found = ", ".join(str(list(parts[part].shape)) for part in _STARTS)
            what = ", ".join(_STARTS)
            raise ValueError(f"has {what} of shapes {found}, not twice [out, rank] and [rank, in]")
        rank = len(b1)
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # [out, rank²]
        down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # [rank², in]
        return LoraPair(down, up, alpha * rank)  # scaled by alpha / rank, not by alpha / rank²
