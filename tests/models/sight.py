"""A vision tower and projector for the tiny LLM, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

SIDE, PATCH = 28, 7  # pixels
TOKENS = (SIDE // PATCH) ** 2
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "projection_dim": 32,
}


def save_sight(path: Path, *, width: int = 64) -> Path:
    """As ComfyUI's single file, for an LLM of this width."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    projector = nn.ModuleDict({"linear_1": nn.Linear(32, width), "linear_2": nn.Linear(width, width)})
    for p in (*tower.parameters(), *projector.parameters()):
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5)
    state = {f"vision_model.{name}": t for name, t in tower.state_dict().items()}
    state |= {f"multi_modal_projector.{name}": t for name, t in projector.state_dict().items()}
    save_file(state, path, metadata={"hvtrain.config": json.dumps({"vision_config": VISION})})
    return path
