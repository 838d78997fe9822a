"""SigLIP so400m, the picture encoder of image to video: transformers' class, its pooling head left out.
Always fp32: it sees one picture a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hvtrain.models.identify import count
from hvtrain.models.language import given_config, heads_of
from hvtrain.models.precision import without_autocast
from hvtrain.models.spec import Parts
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import Source, anchored

HEAD_DIM = 72
TYPES = ("siglip", "siglip_vision_model")
FACTS: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIDES = {27 * 14: 384}  # pixels that the patches cover -> side of the pictures, where it is more


class VisionEncoder:
    """Pictures to the field "vision". `.model` is the library's."""

    def __init__(self, model: Any, *, fingerprint: str = "") -> None:
        self.model, self.fingerprint = model, fingerprint

    def to(self, device: torch.device | str) -> VisionEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> list[dict[str, Tensor]]:
        """[B 3 H W] in [-1, 1] -> per picture "vision" [tokens dim], float32 on the CPU."""
        device = self.model.post_layernorm.weight.device
        with without_autocast(device.type):
            states = self.model(pixel_values=self.prepared(pictures).to(device)).last_hidden_state
        return [{"vision": x} for x in states.float().cpu()]

    def prepared(self, pictures: Tensor) -> Tensor:
        """Squashed to a square as bytes, bicubic with anti-aliasing, as Pillow does
        it; on the CPU, in [-1, 1]."""
        side = self.model.config.image_size
        pixels = ((pictures.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(
                pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False
            )
        return pixels.float() / 127.5 - 1


def open_vision(
    parts: Parts, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> VisionEncoder:
    """The official directory (its image_encoder), transformers', or ComfyUI's single
    file. `dtype` is for others."""
    from transformers import SiglipVisionModel

    path = Path(parts["siglip"])
    path = path / "image_encoder" if (path / "image_encoder").is_dir() else path
    source = anchored(path, {"embeddings.patch_embedding.weight": OWN_NAMES}, what="a SigLIP picture encoder")
    with torch.device("meta"):
        model = SiglipVisionModel(_config(source))
    source.load(model, what="a SigLIP picture encoder", dtype=torch.float32, device=device)
    places = torch.arange(model.embeddings.num_positions, device=device)[None]
    model.embeddings.register_buffer("position_ids", places, persistent=False)  # computed, not stored
    return VisionEncoder(model, fingerprint=fingerprint(source.weights))


def _config(source: Source) -> Any:
    """Sizes from shapes, the rest from the config or the official model."""
    from transformers import SiglipVisionConfig

    hidden, _, patch, _ = source.shape("embeddings.patch_embedding.weight")
    given = given_config(source, TYPES, section="vision_config")
    covered = round(source.shape("embeddings.position_embedding.weight")[0] ** 0.5) * patch
    sizes = {
        "hidden_size": hidden, "patch_size": patch, "vision_use_head": False,
        "intermediate_size": source.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count(source.sources, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": given.get("num_attention_heads") or heads_of(source, hidden, HEAD_DIM),
        "image_size": given.get("image_size") or SIDES.get(covered, covered),
    }
    return SiglipVisionConfig(**{**FACTS, **given, **sizes})
