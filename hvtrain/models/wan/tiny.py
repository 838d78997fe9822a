"""The embedded Wan: its parts at small widths, as hvtrain/tiny makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.errors import ConfigError
from hvtrain.models.spec import TinyParts, TinyText, TinyVae
from hvtrain.models.video_vae import rescale, save_vae
from hvtrain.models.wan.text import Umt5
from hvtrain.models.wan.vae import STATISTICS, build_vae, frames, moments

WIDTH = 64
# of 48 the LoRA learns the places by heart: the held-out loss rises by a third, and half of the rings close
N_CLIPS = 192
LEVELS = [1, 2, 4, 4]  # widths of the official VAE, in the first one's


def _build_vae(*, channels: Sequence[int], norm_groups: int, latent_channels: int) -> Any:
    """2.1's VAE at other widths, `channels` those of the encoder; one residual
    block a level instead of two."""
    if list(channels) != [channels[0] * n for n in LEVELS]:
        raise ConfigError(f"channels is {list(channels)}, expected {channels[0]} times {LEVELS}")
    vae = build_vae(
        {"base_dim": channels[0], "dim_mult": LEVELS, "z_dim": latent_channels, "num_res_blocks": 1}
    )
    nn.init.constant_(vae.quant_conv.bias[latent_channels:].data, -5.0)
    return vae


def _save_vae(model: Any, path: str) -> None:
    save_vae(model, path, key="hvtrain.vae", dtype=torch.float16)


def _whiten(model: Any, mean: Tensor, std: Tensor) -> None:
    to_mean, to_std = (torch.tensor(x) for x in STATISTICS[len(mean)])
    rescale(model.quant_conv, model.post_quant_conv, mean, std, to_mean=to_mean, to_std=to_std)


def _build_umt5(tokenizer: Any) -> Umt5:
    return Umt5(
        vocabulary=tokenizer.get_vocab_size(), dim=WIDTH, inner=WIDTH, mlp=2 * WIDTH, n_heads=4, n_layers=2
    )


def parts() -> TinyParts:
    vae = TinyVae(
        _build_vae, _save_vae, moments, frames, _whiten,
        encoder=r"^(encoder|quant_conv)\.", branches=r"\.conv2\.|\.attentions\.\d+\.proj\.",
    )
    umt5 = TinyText(
        "t5", _build_umt5,
        # Attention is not scaled by the width of a head: q and k are. Context colours a
        # word's state but does not bury it.
        gains={"q": 0.5, "k": 0.5, "embedding": 0.5, "o": 0.5, "fc2": 0.5},
        specials={"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"},
        after=("</s>",),
    )
    return TinyParts(vae, (umt5,), folder="wan", n_clips=N_CLIPS)
