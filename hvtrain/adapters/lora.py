"""LoRA: W x + (alpha / rank) * up(down(x)).

arXiv 2106.09685; initialisation and scaling as in sd-scripts and musubi-tuner, whose files these become.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from hvtrain.adapters.layer import AdaptedLinear, Parts
from hvtrain.errors import ConfigError
from hvtrain.lorafiles.lowrank import factor
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.registry import Registry
from hvtrain.rng import generator
from hvtrain.weights.float8 import DTYPE as FLOAT8
from hvtrain.weights.float8 import dequantize

aten = torch.ops.aten
if aten.addmm_ not in flop_registry:  # counted by hvtrain.fit and the share of the peak that a run logs

    @register_flop_formula(aten.addmm_)
    def _(onto: Sequence[int], a: Sequence[int], b: Sequence[int], *args: object, **options: object) -> int:
        return 2 * a[0] * a[1] * b[1]



class LoraLinear(AdaptedLinear):
    """down [rank, in], up [rows, rank]."""

    LABEL = "LoRA"
    PARTS: ClassVar = {"down": "lora_down.weight", "up": "lora_up.weight"}
    ROWS: ClassVar[tuple[str, ...]] = ("up",)
    start_down: Tensor
    start_up: Tensor
    RANK = "down"
    ENDINGS: ClassVar = {
        ".lora_A.weight": "down", ".lora_A.default.weight": "down",
        ".lora_B.weight": "up", ".lora_B.default.weight": "up",
    }  # fmt: skip
    METADATA: ClassVar = {"ss_network_module": "networks.lora"}

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        start = STARTS[self.how.start](self, n_rows, seed)
        # Modules, not bare parameters: ZeRO-3 gathers a module's own parameters around its forward.
        self.lora_down = _linear(start.down, device)
        self.lora_up = _linear(torch.zeros(n_rows, self.rank) if start.up is None else start.up, device)
        # What a start adds to the weight is taken off again, by factors that stay: the layer begins
        # as it was, its base is nobody's but the model's, and the file is a LoRA of that. Buffers:
        # ZeRO-3 cuts frozen parameters up.
        self.taken = start.up is not None
        if self.taken:
            self.register_buffer("start_down", start.down.clone().to(device), persistent=False)
            self.register_buffer("start_up", self.lora_up.weight.detach().clone(), persistent=False)

    def delta(self, x: Tensor, scale: float | Tensor) -> Tensor:
        added = self.lora_up(self.inner(x, scale))
        return (
            added if not self.taken
            else added - nn.functional.linear(self.start(x, scale), self.start_up.to(x))
        )

    def inner(self, x: Tensor, scale: float | Tensor) -> Tensor:  # [B ... in] -> [B ... rank]
        inner = self.lora_down(x) * scale  # here, where there are far fewer numbers than come out
        if self.training and self.dropout > 0:
            inner = inner * self.kept(inner)
        if self.training and self.how.rank_dropout > 0:
            inner = inner * self.rank_kept(inner)
        return inner

    def start(self, x: Tensor, scale: float | Tensor) -> Tensor:  # [B ... in] -> [B ... rank]
        return nn.functional.linear(x, self.start_down.to(x)) * scale

    def joined(self, x: Tensor, scale: float | Tensor) -> Tensor | None:
        """Each product is added by the matrix multiplication itself: what is as large as the
        output is written once and added to.

        The base's product comes last. It is most of the work, and nothing that the backward needs is made
        after it begins: where a block ends with such a layer, recomputation stops before it
        (torch.utils.checkpoint's early stop).
        """
        amp = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if amp else self.lora_up.weight.dtype
        quantized = self.weight.dtype == FLOAT8
        if not amp and (x.dtype != dtype or not (quantized or self.weight.dtype == dtype)):
            return None  # the adapter is wider than the base, and is computed so
        shape, x = x.shape, x.to(dtype)
        flat, inner = x.reshape(-1, self.in_features), self.inner(x, scale).reshape(-1, self.rank).to(dtype)
        # an attribute of its module: ZeRO-3 gathers what is asked for so
        up = self.lora_up.weight.to(dtype).t()
        if quantized:
            out = self.plain(flat).addmm_(inner, up)
        else:
            out = inner @ up if self.bias is None else torch.addmm(self.bias.to(dtype), inner, up)
        if self.taken:
            out.addmm_(self.start(flat, scale).to(dtype), self.start_up.to(dtype).t(), alpha=-1)
        if not quantized:
            out.addmm_(flat, self.weight.to(dtype).t())
        return out.view(*shape[:-1], self.out_features)

    def exported(self, parts: Parts) -> dict[str, Tensor]:
        """Of a start that was taken off the weight, that too: twice the rank, and by
        `file_alpha` the same scale."""
        if self.taken:
            down, up = self.start_down.to(parts["down"]), self.start_up.to(parts["up"])
            parts = {"down": torch.cat([parts["down"], down]), "up": torch.cat([parts["up"], -up], dim=1)}
        return super().exported(parts)

    @property
    def file_alpha(self) -> float:
        return self.alpha * (2 if self.taken else 1)

    @classmethod
    def pair(cls, parts: Parts, alpha: float) -> LoraPair:
        down, up = parts["down"], parts["up"]
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or len(down) == 0:
            shapes = f"{list(up.shape)} and {list(down.shape)}"
            raise ValueError(f"has up and down of shapes {shapes}, not [out, rank] and [rank, in]")
        return LoraPair(down, up, alpha)

    @staticmethod
    def norm(parts: Parts) -> Tensor:
        up, down = parts["up"].float(), parts["down"].float()
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()  # no larger than rank x rank


def _linear(weight: Tensor, device: torch.device | str) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device))
    return layer


# --- where it starts ----------------------------------------------------------------------------------------


class FirstFactors(NamedTuple):
    down: Tensor  # [rank, in]
    up: Tensor | None = None  # [rows, rank]; None: zeros


STARTS: Registry[Callable[[LoraLinear, int, int], FirstFactors]] = Registry("start")


@STARTS.add("zero")
def zero(layer: LoraLinear, n_rows: int, seed: int) -> FirstFactors:
    down = torch.empty(layer.rank, layer.in_features)
    nn.init.kaiming_uniform_(
        down, a=math.sqrt(5), generator=generator(seed, stream=f"lora-init/{layer.name}")
    )
    return FirstFactors(down)


@STARTS.add("svd")
def svd(layer: LoraLinear, n_rows: int, seed: int) -> FirstFactors:
    """The input directions that the weight answers to most, as long as chance would
    have made them; up is zero."""
    down = _principal(layer, n_rows).down
    usual = (layer.in_features / (3 * layer.in_features)) ** 0.5  # expected length of a row of `zero`
    return FirstFactors(down / down.norm(dim=1, keepdim=True).clamp(min=1e-12) * usual)


@STARTS.add("pissa")
def pissa(layer: LoraLinear, n_rows: int, seed: int) -> FirstFactors:
    """The weight's principal part, arXiv 2404.02948: it is trained, and the rest stays."""
    pair = _principal(layer, n_rows)
    scale = layer.alpha / layer.rank
    return FirstFactors(pair.down / scale**0.5, pair.up / scale**0.5)


def _principal(layer: LoraLinear, n_rows: int) -> LoraPair:
    begin, end = layer.rows
    if layer.rank > min(n_rows, layer.in_features):
        size = f"{layer.in_features} x {n_rows}"
        raise ConfigError(
            f"adapter.init {layer.how.start}: '{layer.name}' of {size} has no {layer.rank} directions; give "
            "it a lower rank by adapter.ranks, or init zero"
        )
    if layer.weight.is_meta:
        return LoraPair(torch.ones(layer.rank, layer.in_features), torch.ones(n_rows, layer.rank), layer.rank)
    weight = dequantize(layer.weight.data, layer.scale_weight, torch.float32)[begin:end]
    pair = factor(weight, rank=layer.rank).pair
    return LoraPair(pair.down.cpu(), pair.up.cpu(), pair.alpha)
