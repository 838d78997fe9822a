"""What every adapter is: a frozen Linear with something trained beside it, W x + scale * delta(x).

Its parameters are called as in files (`X.lora_down.weight`, `X.hada_w1_a`), and the base checkpoint still
loads by its own names beside them. A file's adapter is, whatever its kind, exactly a low-rank pair
(lorafiles/pairs.py): merging, cutting and joining it then need to know no kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvtrain.errors import ConfigError
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.rng import generator
from hvtrain.weights.float8 import Fp8Linear, linear

Parts = Mapping[str, Tensor]  # of one layer's adapter, by part


@dataclass(frozen=True)
class DropoutKey:
    """Where in the run a forward pass is. Equal on sequence-parallel peers, so that they drop the same."""

    seed: int
    step: int
    micro: int
    dp_rank: int


class AdaptedLinear(nn.Linear):
    """A frozen Linear and its adapter, which is float32 whatever the base is; autocast casts it per use."""

    LABEL: ClassVar[str]  # what people call it
    PARTS: ClassVar[Mapping[str, str]]  # part -> its parameter's name, in files after the layer's
    ROWS: ClassVar[tuple[str, ...]]  # parts whose first dimension is the output rows; the last starts at zero
    RANK: ClassVar[str]  # the part whose first dimension is the rank
    ENDINGS: ClassVar[Mapping[str, str]] = {}  # what others' files call the parts: ending of a name -> part
    METADATA: ClassVar[Mapping[str, object]]  # of its files
    DROPS: ClassVar[bool] = True  # has a dropout

    def __init__(
        self, base: nn.Linear, *, name: str, rank: int, alpha: float, dropout: float, seed: int,
        rows: tuple[int, int] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Linear's own: it would allocate and initialise weights to throw away
        self.in_features, self.out_features = base.in_features, base.out_features
        if isinstance(base, Fp8Linear):
            self.register_buffer("weight", base.weight)
            self.register_buffer("scale_weight", base.scale_weight)
        else:
            self.weight, self.scale_weight = base.weight, None
        self.matmul = getattr(base, "matmul", True)  # of a float8 weight
        self.bias = base.bias
        self.name, self.rank, self.alpha, self.dropout = name, rank, alpha, dropout
        # Only these output rows are adapted: the others have no parameters, so nothing can move them.
        self.rows = rows or (0, self.out_features)
        if not 0 <= self.rows[0] < self.rows[1] <= self.out_features:
            raise ConfigError(f"adapter target '{name}': rows {self.rows} of {self.out_features}")
        self.dropout_key: DropoutKey | None = None
        # Made on the CPU by name, not in order: equal on every rank without a broadcast, and a layer's start
        # does not depend on which other layers are trained.
        self.make(self.rows[1] - self.rows[0], seed, "cpu" if base.weight.is_meta else base.weight.device)

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        """The parameters, at their start: the delta is zero."""
        raise NotImplementedError

    def delta(self, x: Tensor, scale: float) -> Tensor:  # [B ... in] -> [B ... rows]
        raise NotImplementedError

    @staticmethod
    def pair(parts: Parts, alpha: float) -> LoraPair:
        """What a file's parts add to a weight. Raises ValueError for shapes that make no adapter."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # [B ... in] -> [B ... out]
        base = linear(x, self.weight, self.bias, self.scale_weight, matmul=self.matmul)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.get_parameter(self.PARTS[self.RANK]).dtype)
        delta = self.delta(x, self.alpha / self.rank).to(base.dtype)
        begin, end = self.rows
        if end - begin < self.out_features:
            delta = F.pad(delta, (begin, self.out_features - end))
        return base + delta

    def kept(self, inner: Tensor) -> Tensor:  # [B ... rank] -> [B 1.. rank]
        """0 or 1 / (1 - p) for each sample and rank component, one draw for all tokens of a sample.

        Not one per token: a token's place in the sequence then never matters, so any split of the sequence
        over ranks, and the recomputation in a checkpointed backward, drop what one plain process drops.
        """
        if self.dropout_key is None:
            raise RuntimeError(f"{self.name}: adapter dropout needs seed_dropout(model, ...) before it")
        key, stream = self.dropout_key, f"lora-dropout/{self.name}"
        draw = generator(key.seed, step=key.step, micro=key.micro, dp_rank=key.dp_rank, stream=stream)
        kept = torch.rand(inner.shape[0], self.rank, generator=draw) >= self.dropout
        mask = (kept / (1 - self.dropout)).to(inner.device, inner.dtype)
        return mask.view(inner.shape[0], *[1] * (inner.ndim - 2), self.rank)


@dataclass(frozen=True)
class Delta:
    """One layer's adapter as a file holds it."""

    kind: type[AdaptedLinear]
    parts: Parts
    alpha: float

    @property
    def rank(self) -> int:
        return (*self.parts[self.kind.RANK].shape, 0)[0]

    def pair(self) -> LoraPair:
        """The same as a pair, exactly. Raises ValueError."""
        return self.kind.pair(self.parts, self.alpha)
