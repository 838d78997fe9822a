"""DoRA: m * (W + s up down) / |W + s up down|, where m and the norms are of output rows.

arXiv 2402.09353, with the norm without a gradient as there; the axis of PEFT and of
LyCORIS, whose files these become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from hvtrain.adapters.layer import Parts
from hvtrain.adapters.lora import LoraLinear
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.weights.float8 import dequantize


class DoraLinear(LoraLinear):
    """A LoRA's parts, and the length of each output row [rows] that the weight is to have."""

    dora_scale: nn.Parameter
    LABEL = "DoRA"
    PARTS: ClassVar = {**LoraLinear.PARTS, "magnitude": "dora_scale"}
    ROWS: ClassVar[tuple[str, ...]] = ("magnitude", "up")
    ENDINGS: ClassVar = {".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
                         ".lora_magnitude_vector.default.weight": "magnitude"}  # fmt: skip
    METADATA: ClassVar = {
        "ss_network_module": "lycoris.kohya", "ss_network_args": {"algo": "lora", "dora_wd": True}
    }
    WITHOUT: ClassVar[Mapping[str, str]] = {
        "max_norm": "its rows have the lengths that it learns", "start": "its start is the weight's own rows",
    }

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        super().make(n_rows, seed, device)
        norms = torch.ones(self.out_features)
        if not self.weight.is_meta:
            norms = torch.linalg.vector_norm(self._weight(slice(None)), dim=1)
        begin, end = self.rows
        # a slice's file holds the other rows too
        self.outside = norms.cpu() if end - begin < self.out_features else None
        # a vector: weight decay leaves it alone
        self.dora_scale = nn.Parameter(norms[begin:end].clone().to(device))

    def _weight(self, rows: slice) -> Tensor:  # [rows, in] float32
        scale = self.scale_weight
        if scale is not None and scale.ndim:
            scale = scale[rows] if len(scale) == self.out_features else scale
        return dequantize(self.weight.detach()[rows], scale, torch.float32)

    def joined(self, x: Tensor, scale: float | Tensor) -> None:
        """No such way: what is added depends on the base's product."""

    def added(self, base: Tensor, delta: Tensor) -> Tensor:
        """g (W x + delta) - W x, where g is what the rows lack in length."""
        plain = base[..., slice(*self.rows)]
        if self.bias is not None:
            plain = plain - self.bias[slice(*self.rows)].to(base.dtype)
        return (self.dora_scale / self._lengths()).to(base.dtype) * (plain + delta) - plain

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def _lengths(self) -> Tensor:
        """[rows]: of the rows of W + s up down, without making it: |w|^2 + 2 s (w down^T) .
        u + s^2 u (down down^T) . u."""
        up, down = self.lora_up.weight, self.lora_down.weight
        weight = self._weight(slice(*self.rows)).to(down)
        scaled = up * (self.alpha / self.rank)
        squares = torch.linalg.vector_norm(weight, dim=1).square()
        cross = ((weight @ down.T) * scaled).sum(1)
        own = ((scaled @ (down @ down.T)) * scaled).sum(1)
        return (squares + 2 * cross + own).clamp(min=1e-24).sqrt()

    def exported(self, parts: Parts) -> dict[str, Tensor]:
        """The rows of others have the length that they have. As a column: LyCORIS
        tells by it which axis is meant."""
        held = super().exported({part: t for part, t in parts.items() if part != "magnitude"})
        if "magnitude" in parts:
            held["magnitude"] = self.padded(parts["magnitude"], self.outside)[:, None]
        return held

    @classmethod
    def pair(cls, parts: Parts, alpha: float) -> LoraPair:
        pair, magnitude = LoraLinear.pair(parts, alpha), parts["magnitude"]
        if magnitude.numel() != len(pair.up) or magnitude.shape[0] != len(pair.up):
            shape = list(magnitude.shape)
            raise ValueError(
                f"has lengths of shape {shape}, expected one for each of its {len(pair.up)} output rows"
            )
        return replace(pair, magnitude=magnitude.flatten())
