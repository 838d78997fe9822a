"""What LLaVA's language model is shown of an image: CLIP's ViT-L/14 at 336 pixels and a
projector into the LLM's width.

From a Hugging Face LLaVA directory, which holds both beside the language model, or ComfyUI's file of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models.identify import count
from hvtrain.models.language import METADATA_KEY, heads_of
from hvtrain.models.spec import Parts
from hvtrain.weights.containers import fingerprint
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import Source, anchored, config_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FACTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # of the official tower, where no config says
SKIPPED_LAYERS = 1  # LLaVA reads the state before the tower's last layer, without the class token
_TOWER, _PROJECTOR = "embeddings.class_embedding", "linear_1.weight"


@dataclass(frozen=True)
class Sight:
    """An image to embeddings for the LLM."""

    tower: Any
    projector: nn.Module
    fingerprint: str

    def to(self, device: torch.device | str) -> None:
        self.tower.to(device)
        self.projector.to(device)

    @torch.no_grad()
    def __call__(self, picture: Tensor | None) -> Tensor:
        """[3 H W] in [-1, 1] -> [tokens E]; None is seen as black, officially what a
        negative prompt comes with."""
        weight = self.tower.embeddings.patch_embedding.weight
        side = self.tower.config.image_size
        pixels = self.prepared(torch.full((3, side, side), -1.0) if picture is None else picture)
        states = self.tower(pixel_values=pixels[None].to(weight)).last_hidden_state[0, 1:]
        return self.projector(states)

    def prepared(self, picture: Tensor) -> Tensor:
        """[3 side side]: scaled until the shorter side fits and cropped in the middle, as
        LLaVA's processor does with bytes."""
        side, (h, w) = self.tower.config.image_size, picture.shape[1:]
        size = (side, side * w // h) if h <= w else (side * h // w, side)
        pixels = F.interpolate(
            picture[None].float() * 127.5 + 127.5, size=size, mode="bicubic", antialias=True
        )[0]
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[:, top : top + side, left : left + side].round().clamp(0, 255) / 255
        mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (MEAN, STD))
        return (pixels - mean) / std


def open_sight(parts: Parts, *, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Sight:
    """For an LLM of this width. Raises ConfigError where the LLM's files hold no tower
    and no other file is given."""
    path = Path(parts.get("llm_vision", parts["llm"]))
    try:
        tower, projector = _sources(path)
    except CheckpointError:
        if "llm_vision" in parts:
            raise
        raise ConfigError(
            f"model.llm_vision is not set, and {path} holds no vision tower: image to video needs LLaVA's; "
            "give its file, or a LLaVA directory as model.llm"
        ) from None
    seen, inside, read = projector.shape(_PROJECTOR)[1], *projector.shape("linear_2.weight")
    if (inside, read) != (width, width) or seen != tower.shape(_TOWER)[0]:
        raise CheckpointError(
            f"{path}: its projector makes embeddings of width {inside}, the LLM's are {width}: of another LLM"
        )
    return Sight(
        _load_tower(tower, dtype, device), _load_projector(projector, dtype, device),
        fingerprint(tower.weights)
    )


def sight_fingerprint(parts: Parts) -> str:
    return fingerprint(_sources(Path(parts.get("llm_vision", parts["llm"])))[0].weights)


def _sources(path: Path) -> tuple[Source, Source]:
    return (
        anchored(path, {_TOWER: OWN_NAMES}, what="a LLaVA vision tower"),
        anchored(path, {_PROJECTOR: OWN_NAMES}, what="a LLaVA projector"),
    )


def _load_tower(source: Source, dtype: torch.dtype, device: torch.device | str) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    hidden, _, patch, _ = source.shape("embeddings.patch_embedding.weight")
    given = _config(source)
    side = round((source.shape("embeddings.position_embedding.weight")[0] - 1) ** 0.5) * patch
    sizes = {
        "hidden_size": hidden, "patch_size": patch, "image_size": side,
        "intermediate_size": source.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count(source.sources, r"encoder\.layers\.(\d+)\.") - SKIPPED_LAYERS,
        "num_attention_heads": given.get("num_attention_heads") or heads_of(source, hidden, 64),
    }
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**{**FACTS, **given, **sizes}))
    tower.post_layernorm = nn.Identity()  # type: ignore[assignment]  # of the class token, which is left out
    source.load(tower, what="a LLaVA vision tower", dtype=dtype, device=device)
    positions = torch.arange((side // patch) ** 2 + 1, device=device)[None]
    tower.embeddings.register_buffer("position_ids", positions, persistent=False)  # computed, not stored
    return tower.eval().requires_grad_(False)


def _load_projector(source: Source, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    inside, seen = source.shape(_PROJECTOR)
    with torch.device("meta"):
        model = nn.Sequential()
        model.add_module("linear_1", nn.Linear(seen, inside))
        model.add_module("act", nn.GELU())
        model.add_module("linear_2", nn.Linear(inside, source.shape("linear_2.weight")[0]))
    source.load(model, what="a LLaVA projector", dtype=dtype, device=device)
    return model


def _config(source: Source) -> Mapping[str, Any]:
    """The tower's own section of a LLaVA config."""
    config = config_of(
        source.path, source.weights.metadata, METADATA_KEY, mine=lambda config: "vision_config" in config
    )
    return {
        key: value for key,
        value in config.get("vision_config", {}).items() if key not in ("dtype", "torch_dtype")
    }
