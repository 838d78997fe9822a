"""Names and shapes of the released files besides the transformers: what `hvtrain models keys --part`
lists."""

from __future__ import annotations

from typing import Any

import torch

from hvtrain.models.spec import Flavor, Shapes
from hvtrain.models.wan.text import Umt5
from hvtrain.models.wan.vae import build_vae, official_name
from hvtrain.weights.source import shapes_of

UMT5_XXL = {"vocabulary": 256384, "dim": 4096, "inner": 4096, "mlp": 10240, "n_heads": 64, "n_layers": 24}
# Constructor arguments of the library's class, by latent channels: 2.1 and 2.2.
VAES: dict[int, dict[str, Any]] = {
    16: {"base_dim": 96, "z_dim": 16},
    48: {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    },
}
RES_BLOCKS = 2  # to a stage of both


def vae_shapes(flavor: Flavor) -> Shapes:
    """Of Wan2.1_VAE.pth or Wan2.2_VAE.pth, by the flavor's latents."""
    config = VAES[flavor.latent.channels]
    with torch.device("meta"):
        model = build_vae({**config, "num_res_blocks": RES_BLOCKS})
    by_stage = config.get("is_residual", False)
    return {
        official_name(name, RES_BLOCKS, by_stage=by_stage): shape for name, shape in shapes_of(model).items()
    }


def t5_shapes(flavor: Flavor) -> Shapes:
    """Of models_t5_umt5-xxl-enc-bf16.pth, which is every flavor's."""
    with torch.device("meta"):
        return shapes_of(Umt5(**UMT5_XXL))
