"""SigLIP against transformers' own model and image processor, from the layouts of its weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hvtrain.errors import CheckpointError
from hvtrain.models.hunyuan_video_15.vision import _config, open_vision
from hvtrain.rng import generator
from hvtrain.weights.keymap import OWN_NAMES
from hvtrain.weights.source import anchored
from tests.models.test_text import sparse_safetensors

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 30, "patch_size": 14,
}


@pytest.fixture(scope="module")
def model() -> SiglipVisionModel:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**SIZES)).eval().requires_grad_(False)


def picture(height: int, width: int) -> np.ndarray:
    """uint8 [H W 3]: smooth with some noise."""
    coarse = torch.rand(1, 3, 4, 5, generator=generator(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator(2))
    return (noisy[0].permute(1, 2, 0).clamp(0, 1) * 255).to(torch.uint8).numpy()


def test_equals_the_official_procedure(model, tmp_path):
    model.save_pretrained(tmp_path / "image_encoder")
    encoder = open_vision({"siglip": str(tmp_path)})
    image = picture(96, 160)
    processor = SiglipImageProcessorPil(
        size={"height": 30, "width": 30}, resample=Image.Resampling.BICUBIC, image_mean=[0.5] * 3,
        image_std=[0.5] * 3
    )
    pixels = processor(images=image, return_tensors="pt").pixel_values
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert (encoder.prepared(tensor) - pixels).abs().max() < 1.01 * 2 / 255  # one level of 256
    wanted = model(pixel_values=encoder.prepared(tensor)).last_hidden_state
    (found,) = encoder.encode(tensor)
    assert found["vision"].shape == (4, 32) and found["vision"].dtype == torch.float32
    torch.testing.assert_close(found["vision"], wanted[0])
    away = model(pixel_values=pixels).last_hidden_state
    assert (away - wanted).norm() / wanted.norm() < 0.02
    both = encoder.encode(torch.cat([tensor.flip(3), tensor]))  # each alone
    torch.testing.assert_close(both[1]["vision"], found["vision"])


@pytest.mark.parametrize("layout", ["transformers 5", "transformers 4", "whole SigLIP"])
def test_layouts(layout, model, tmp_path):
    prefix = "" if layout == "transformers 5" else "vision_model."
    state = {prefix + name: value for name, value in model.state_dict().items()}
    config: dict = {"model_type": "siglip_vision_model", **SIZES}
    if layout == "whole SigLIP":
        state |= {
            "text_model.embeddings.token_embedding.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(1)
        }
        config = {"model_type": "siglip", "vision_config": SIZES, "text_config": {"hidden_size": 7}}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = open_vision({"siglip": str(tmp_path)})
    x = torch.randn(1, 3, 30, 30, generator=generator(3)).clamp(-1, 1)
    wanted = model(pixel_values=encoder.prepared(x)).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(x)[0]["vision"], wanted)
    assert encoder.fingerprint == open_vision({"siglip": str(tmp_path)}, device="meta").fingerprint


def test_official_sizes_from_a_bare_file(tmp_path):
    """ComfyUI's sigclip_vision_patch14_384."""
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (729, 1152),
        **{f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (4304, 1152) for i in range(27)},
    }
    path = sparse_safetensors(tmp_path / "sigclip.safetensors", shapes)
    config = _config(anchored(path, {"embeddings.patch_embedding.weight": OWN_NAMES}, what=""))
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (1152, 16, 27)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (384, 14, 4304)
    assert config.hidden_act == "gelu_pytorch_tanh" and config.layer_norm_eps == 1e-6


def test_bad_input(model, tmp_path):
    save_file({"encoder.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match="not a SigLIP picture encoder: no 'embeddings.patch_embedding.weight' in it"
    ):
        open_vision({"siglip": str(tmp_path / "x.safetensors")})
    save_file(dict(model.state_dict()), tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="cannot tell the number of heads of width 32"):
        open_vision({"siglip": str(tmp_path / "y.safetensors")})
