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
from hvtrain.weights.float8 import DEQUANTISED, Fp8Linear, linear

Parts = Mapping[str, Tensor]  # of one layer's adapter, by part


@dataclass(frozen=True)
class DropoutKey:
    """Where in the run a forward pass is. Equal on sequence-parallel peers, so that they drop the same."""

    seed: int
    step: int
    micro: int
    dp_rank: int


@dataclass(frozen=True)
class How:
    """What an adapter may be told besides its rank and alpha."""

    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    max_norm: float = 0.0  # of what it adds to the weight; 0: any
    start: str = "zero"  # of a LoRA: see lora.STARTS
    factor: int = -1  # of a LoKr


class AdaptedLinear(nn.Linear):
    """A frozen Linear and its adapter, which is float32 whatever the base is; autocast casts it per use."""

    LABEL: ClassVar[str]  # what people call it
    PARTS: ClassVar[Mapping[str, str]]  # part -> its parameter's name, in files after the layer's
    FORMS: ClassVar[tuple[tuple[str, ...], ...]] = ()  # which parts make one; none: all
    ROWS: ClassVar[tuple[str, ...]]  # parts whose first dimension is the output rows; the last starts at zero
    RANK: ClassVar[str]  # the part whose first dimension is the rank
    ENDINGS: ClassVar[Mapping[str, str]] = {}  # what others' files call the parts: ending of a name -> part
    METADATA: ClassVar[Mapping[str, object]]  # of its files
    DROPS: ClassVar[bool] = True  # its rank components can be dropped; else its rows are
    WITHOUT: ClassVar[Mapping[str, str]] = {}  # field of How, or "rows" of a slice -> why it cannot have it

    def __init__(
        self, base: nn.Linear, *, name: str, rank: int, alpha: float, dropout: float, seed: int,
        rows: tuple[int, int] | None = None, how: How = How(),
    ) -> None:
        nn.Module.__init__(self)  # not Linear's own: it would allocate and initialise weights to throw away
        self.in_features, self.out_features = base.in_features, base.out_features
        if isinstance(base, Fp8Linear):
            self.register_buffer("weight", base.weight)
            self.register_buffer("scale_weight", base.scale_weight)
        else:
            self.weight, self.scale_weight = base.weight, None
        self.products = getattr(base, "products", DEQUANTISED)  # of a float8 weight
        self.bias = base.bias
        self.name, self.rank, self.alpha, self.dropout, self.how = name, rank, alpha, dropout, how
        # Only these output rows are adapted: the others have no parameters, so nothing can move them.
        self.rows = rows or (0, self.out_features)
        if not 0 <= self.rows[0] < self.rows[1] <= self.out_features:
            raise ConfigError(f"adapter target '{name}': rows {self.rows} of {self.out_features}")
        self.dropout_key: DropoutKey | None = None
        self.off = False  # the layer is its base alone: see attach.without_adapters
        # Made on the CPU by name, not in order: equal on every rank without a broadcast, and a layer's start
        # does not depend on which other layers are trained.
        self.make(self.rows[1] - self.rows[0], seed, "cpu" if base.weight.is_meta else base.weight.device)

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        """The parameters, at their start: the delta is zero."""
        raise NotImplementedError

    def delta(self, x: Tensor, scale: float | Tensor) -> Tensor:  # [B ... in] -> [B ... rows]
        raise NotImplementedError

    @classmethod
    def pair(cls, parts: Parts, alpha: float) -> LoraPair:
        """What a file's parts add to a weight. Raises ValueError for shapes that make no adapter."""
        raise NotImplementedError

    @staticmethod
    def norm(parts: Parts) -> Tensor:
        """Of what the parts make, for a scale of 1."""
        raise NotImplementedError

    @classmethod
    def n_rank(cls, parts: Parts) -> int:
        return (*parts[cls.RANK].shape, 0)[0]

    @classmethod
    def scale_of(cls, parts: Parts, alpha: float) -> float:
        return alpha / cls.n_rank(parts)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its parameters, each by its attribute: that is how ZeRO-3 sees that they are needed here."""
        found = {}
        for part, name in self.PARTS.items():
            owner, _, leaf = name.rpartition(".")
            holder = getattr(self, owner) if owner else self
            if leaf in holder._parameters:
                found[part] = getattr(holder, leaf)
        return found

    @property
    def kind_rank(self) -> int:
        """As of a file with its parts."""
        return self.n_rank(self.parts)

    @property
    def file_alpha(self) -> float:
        return self.alpha

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def cap(self, parts: Parts) -> Tensor | float:
        """The factor that brings what is added to the weight down to `max_norm`.
        No gradient goes through it."""
        if not self.how.max_norm:
            return 1.0
        norm = self.norm(parts) * (self.alpha / self.rank)
        return (self.how.max_norm / norm.clamp(min=1e-30)).clamp(max=1.0)

    def exported(self, parts: Parts) -> dict[str, Tensor]:
        """Its parameters as a file of the whole layer has them: what is capped made smaller, of a slice with
        zeros in the rows that are not its."""
        held, last = dict(parts), self.ROWS[-1]
        if last in held:
            held[last] = held[last] * self.cap(parts)
        return {part: self.padded(t) if part in self.ROWS else t for part, t in held.items()}

    def padded(self, tensor: Tensor, outside: Tensor | None = None) -> Tensor:
        """[rows ...] -> [out ...]: zeros, or what is `outside` [out ...], in the rows that are not its
        own."""
        begin, end = self.rows
        if (begin, end) == (0, self.out_features):
            return tensor
        whole = (
            tensor.new_zeros(self.out_features, *tensor.shape[1:])
            if outside is None else outside.to(tensor).clone()
        )
        whole[begin:end] = tensor
        return whole

    def forward(self, x: Tensor) -> Tensor:  # [B ... in] -> [B ... out]
        if self.off:
            return self.plain(x)
        scale = self.alpha / self.rank * (self.cap(self.parts) if self.how.max_norm else 1.0)
        drops = self.training and bool(self.how.module_dropout or (self.how.rank_dropout and not self.DROPS))
        begin, end = self.rows
        if not drops and end - begin == self.out_features and (joined := self.joined(x, scale)) is not None:
            return joined
        base = self.plain(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.get_parameter(self.PARTS[self.ROWS[-1]]).dtype)
        added = self.added(base, self.delta(x, scale).to(base.dtype))
        if drops:
            added = added * self.module_kept(added)
        return base + (
            added if end - begin == self.out_features else F.pad(added, (begin, self.out_features - end))
        )

    def plain(self, x: Tensor) -> Tensor:
        return linear(
            x, self.weight, self.bias, self.scale_weight, products=self.products, fast=not self.training
        )

    def joined(self, x: Tensor, scale: float | Tensor) -> Tensor | None:  # [B ... in] -> [B ... out]
        """The layer's whole output made in one buffer; None where the kind, or
        this dtype, has no such way."""
        return None

    def added(self, base: Tensor, delta: Tensor) -> Tensor:  # [B ... out], [B ... rows] -> [B ... rows]
        """To the base's output."""
        return delta

    def kept(self, inner: Tensor) -> Tensor:  # [B ... rank] -> [B 1.. rank]
        """0 or 1 / (1 - p) for each sample and rank component, one draw for all tokens of a sample.

        Not one per token: a token's place in the sequence then never matters, so any split of the sequence
        over ranks, and the recomputation in a checkpointed backward, drop what one plain process drops.
        """
        kept = self._chance("lora-dropout", inner.shape[0], self.rank, p=self.dropout)
        return kept.to(inner).view(inner.shape[0], *[1] * (inner.ndim - 2), self.rank)

    def rank_kept(self, inner: Tensor) -> Tensor:  # [... n] -> [n], of rank components or of rows
        """The same, one draw for all samples of a micro-step."""
        return self._chance("rank-dropout", inner.shape[-1], p=self.how.rank_dropout).to(inner)

    def module_kept(self, delta: Tensor) -> Tensor:  # [B ... rows] -> [] or [rows]
        """0 or 1 for the layer; 1, not more: a layer without its adapter is what training without LoRA is,
        too. A product and not a branch: every parameter then has a gradient in every step. With it the rows
        of what has no rank components."""
        kept = (self._chance("module-dropout", p=self.how.module_dropout) > 0).to(delta)
        return kept * self.rank_kept(delta) if self.how.rank_dropout and not self.DROPS else kept

    def _chance(self, stream: str, *shape: int, p: float) -> Tensor:
        if self.dropout_key is None:
            raise RuntimeError(f"{self.name}: adapter dropout needs seed_dropout(model, ...) before it")
        key = self.dropout_key
        draw = generator(
            key.seed, step=key.step, micro=key.micro, dp_rank=key.dp_rank, stream=f"{stream}/{self.name}"
        )
        return (torch.rand(shape, generator=draw) >= p) / (1 - p)


@dataclass(frozen=True)
class Delta:
    """One layer's adapter as a file holds it."""

    kind: type[AdaptedLinear]
    parts: Parts
    alpha: float

    @property
    def rank(self) -> int:
        return self.kind.n_rank(self.parts)

    @property
    def scale(self) -> float:
        return self.kind.scale_of(self.parts, self.alpha)

    def pair(self) -> LoraPair:
        """The same as a pair, exactly. Raises ValueError."""
        return self.kind.pair(self.parts, self.alpha)
