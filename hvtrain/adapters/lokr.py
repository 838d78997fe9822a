"""LoKr: W + scale * (w1 ⊗ w2), the Kronecker product of a small matrix and a
large one, which may be w2_a w2_b.

Names, sizes, initialisation and scaling as in LyCORIS (arXiv 2309.14859), whose files these become.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvtrain.adapters.layer import AdaptedLinear, Parts
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.rng import generator

W1, W1A, W1B, W2, W2A, W2B = (f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))


def factorized(n: int, factor: int = -1) -> tuple[int, int]:
    """n = small * large with small <= large: `factor` and the rest where it divides n, else the largest
    divisor up to it and to the root of n; -1: up to the root."""
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    limit = math.isqrt(n) if factor < 0 else min(factor, math.isqrt(n))
    small = next(d for d in range(limit, 0, -1) if n % d == 0)
    return small, n // small


class LokrLinear(AdaptedLinear):
    """w1 [a, c] and w2 [b, d] for a weight of ab x cd. w2 is w2_a [b, rank] w2_b [rank, d] where
    that is at most half of it."""

    LABEL = "LoKr"
    PARTS: ClassVar = {part: part for part in (W1, W1A, W1B, W2, W2A, W2B)}
    FORMS: ClassVar = tuple(one + two for one, two in product(((W1,), (W1A, W1B)), ((W2,), (W2A, W2B))))
    ROWS: ClassVar = (W1,)
    RANK = W2B
    METADATA: ClassVar = {"ss_network_module": "lycoris.kohya", "ss_network_args": {"algo": "lokr"}}
    DROPS = False
    WITHOUT: ClassVar[Mapping[str, str]] = {
        "rows": "some rows of a Kronecker product are no Kronecker product; slices must hold whole layers",
    }

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        (a, b), (c, d) = factorized(n_rows, self.how.factor), factorized(self.in_features, self.how.factor)
        self.full = self.rank >= max(b, d) / 2
        if self.full:
            self.alpha = float(self.rank)  # there is no rank to divide by
        starts = {W1: (a, c)} | ({W2: (b, d)} if self.full else {W2A: (b, self.rank), W2B: (self.rank, d)})
        for part, shape in starts.items():
            start = torch.zeros(shape)
            if part not in (W2, W2B):
                draw = generator(seed, stream=f"init/{part}/{self.name}")
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=draw)
            self.register_parameter(part, nn.Parameter(start.to(device)))

    def delta(self, x: Tensor, scale: float | Tensor) -> Tensor:
        """(w1 ⊗ w2) x is w1 X w2^T for X [c, d], the same numbers as x: nothing
        of the weight's size is made."""
        own = self.parts
        w1 = own[W1]
        inner = x.unflatten(-1, (w1.shape[1], -1))  # [... c d]
        inner = F.linear(inner, own[W2]) if self.full else F.linear(F.linear(inner, own[W2B]), own[W2A])
        return (torch.einsum("...cb,ac->...ab", inner, w1.to(inner)) * scale).flatten(-2)

    @classmethod
    def n_rank(cls, parts: Parts) -> int:
        """Of a full w2 there is none: 1, as LyCORIS has it."""
        held = parts.get(W2B, parts.get(W1B))
        return 1 if held is None else (*held.shape, 0)[0]

    @classmethod
    def scale_of(cls, parts: Parts, alpha: float) -> float:
        low = W2B in parts or W1B in parts
        return alpha / cls.n_rank(parts) if low else 1.0

    @staticmethod
    def norm(parts: Parts) -> Tensor:
        w1, w2 = factors(parts)
        return torch.linalg.matrix_norm(w1.float()) * torch.linalg.matrix_norm(w2.float())

    @classmethod
    def pair(cls, parts: Parts, alpha: float) -> LoraPair:
        for part, tensor in parts.items():
            if tensor.ndim != 2 or not tensor.numel():
                raise ValueError(f"has {part} of shape {list(tensor.shape)}, not a matrix")
        for a, b in ((W1A, W1B), (W2A, W2B)):
            if a in parts and parts[a].shape[1] != len(parts[b]):
                raise ValueError(
                    f"has {a} and {b} of shapes {list(parts[a].shape)} and {list(parts[b].shape)}"
                )
        return KroneckerPair(*factors(parts), scale=cls.scale_of(parts, alpha), parts=parts)


def factors(parts: Parts) -> tuple[Tensor, Tensor]:
    """w1 and w2."""
    w1 = parts[W1] if W1 in parts else parts[W1A].float() @ parts[W1B].float()
    return w1, parts[W2] if W2 in parts else parts[W2A].float() @ parts[W2B].float()


class KroneckerPair(LoraPair):
    """A Kronecker product as the pair that it equals, w1 ⊗ (A B) = (w1 ⊗ A) (I ⊗ B) = (I ⊗ A) (w1 ⊗ B),
    whichever has less rank. That may be the layer's own: it is made when it is looked at, so that only one
    layer's is there at a time."""

    def __new__(cls, *args: Any, **values: Any) -> Any:  # dataclasses.replace makes an ordinary one
        return LoraPair(**values) if "down" in values else object.__new__(cls)

    def __init__(self, w1: Tensor, w2: Tensor, *, scale: float, parts: Parts) -> None:
        a, b = (parts[W2A], parts[W2B]) if W2B in parts else (w2, None)
        held = {"w1": w1.float(), "a": a.float(), "b": b if b is None else b.float()}
        rank = (a.shape[1] if b is not None else min(w2.shape)) * min(w1.shape)
        for name, value in (
            held | {"_rank": rank, "alpha": scale * rank, "magnitude": None, "parts": None}
        ).items():
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        return self._rank  # type: ignore[attr-defined]

    def _sides(self) -> tuple[Tensor, Tensor]:
        """up, down."""
        w1, a, b = self.w1, self.a, self.b  # type: ignore[attr-defined]
        if b is None:
            wide = a.shape[0] <= a.shape[1]
            a, b = (torch.eye(a.shape[0]), a) if wide else (a, torch.eye(a.shape[1]))
        if w1.shape[0] <= w1.shape[1]:
            return torch.kron(torch.eye(w1.shape[0]), a), torch.kron(w1, b)
        return torch.kron(w1, a), torch.kron(torch.eye(w1.shape[1]), b)

    @property
    def up(self) -> Tensor:  # type: ignore[override]
        return self._sides()[0]

    @property
    def down(self) -> Tensor:  # type: ignore[override]
        return self._sides()[1]
