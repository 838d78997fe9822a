"""LoRA: W x + (alpha / rank) * up(down(x)).

arXiv 2106.09685; initialisation and scaling as in sd-scripts and musubi-tuner, whose files these become.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from hvtrain.adapters.layer import AdaptedLinear, Parts
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.rng import generator


class LoraLinear(AdaptedLinear):
    """down [rank, in], up [rows, rank]."""

    LABEL = "LoRA"
    PARTS: ClassVar = {"down": "lora_down.weight", "up": "lora_up.weight"}
    ROWS, RANK = ("up",), "down"
    ENDINGS: ClassVar = {
        ".lora_A.weight": "down", ".lora_A.default.weight": "down",
        ".lora_B.weight": "up", ".lora_B.default.weight": "up",
    }  # fmt: skip
    METADATA: ClassVar = {"ss_network_module": "networks.lora"}

    def make(self, n_rows: int, seed: int, device: torch.device | str) -> None:
        down = torch.empty(self.rank, self.in_features)
        draw = generator(seed, stream=f"lora-init/{self.name}")
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=draw)
        # Modules, not bare parameters: ZeRO-3 gathers a module's own parameters around its forward.
        self.lora_down = _linear(down, device)
        self.lora_up = _linear(torch.zeros(n_rows, self.rank), device)

    def delta(self, x: Tensor, scale: float) -> Tensor:
        inner = self.lora_down(x) * scale  # [B ... rank]: far fewer numbers than come out
        if self.training and self.dropout > 0:
            inner = inner * self.kept(inner)
        return self.lora_up(inner)

    @staticmethod
    def pair(parts: Parts, alpha: float) -> LoraPair:
        down, up = parts["down"], parts["up"]
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or len(down) == 0:
            shapes = f"{list(up.shape)} and {list(down.shape)}"
            raise ValueError(f"has up and down of shapes {shapes}, not [out, rank] and [rank, in]")
        return LoraPair(down, up, alpha)


def _linear(weight: Tensor, device: torch.device | str) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device))
    return layer
