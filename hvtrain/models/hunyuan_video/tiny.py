"""The embedded default: HunyuanVideo's parts at small widths, as hvtrain/tiny makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.models.hunyuan_video.text import TEMPLATE
from hvtrain.models.hunyuan_video.vae import OFF, apply_tiling, build_vae
from hvtrain.models.hunyuan_video.vae_weights import METADATA_KEY
from hvtrain.models.spec import TinyParts, TinyText, TinyVae
from hvtrain.models.video_vae import rescale, save_vae

WIDTH = 64
SCALE = 0.476986


def _build_vae(*, channels: Sequence[int], norm_groups: int, latent_channels: int) -> Any:
    """The official VAE's class and 4 x 8 x 8 compression at other widths."""
    n = len(channels)
    vae = build_vae(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": latent_channels,
            "down_block_types": ("HunyuanVideoDownBlock3D",) * n,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * n,
            "block_out_channels": tuple(channels),
            "layers_per_block": 1,
            "norm_num_groups": norm_groups,
            "scaling_factor": SCALE,
        }
    )
    apply_tiling(vae, OFF)
    nn.init.constant_(vae.quant_conv.bias[latent_channels:].data, -5.0)
    return vae


def _save_vae(model: Any, path: str) -> None:
    save_vae(model, path, key=METADATA_KEY, dtype=torch.float16)


def _moments(model: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    posterior = model.encode(video).latent_dist
    return posterior.mean, posterior.logvar


def _decode(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents).sample


def _whiten(model: Any, mean: Tensor, std: Tensor) -> None:
    rescale(model.quant_conv, model.post_quant_conv, mean, std, to_std=1 / SCALE)


def _build_llm(tokenizer: Any) -> nn.Module:
    """Four layers, of which the encoder uses the first two."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
            eos_token_id=tokenizer.token_to_id("<|end_of_text|>"),
            pad_token_id=tokenizer.token_to_id("<pad>"),
        )
    )


def _build_clip(tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.token_to_id("<|endoftext|>")
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, projection_dim=WIDTH,
            bos_token_id=tokenizer.token_to_id("<|startoftext|>"), eos_token_id=end, pad_token_id=end,
        )
    )


def parts() -> TinyParts:
    llm = TinyText(
        "llm", _build_llm,
        # Below 1 on the way back into the residual stream: context colours a
        # word's state but does not bury it.
        gains={"o_proj": 0.7, "down_proj": 0.7},
        specials={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<pad>"},
        more_specials=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        # The real template costs 11 tokens here: its instruction text is one token.
        atoms=(TEMPLATE.split("\n\n")[1].split("<|eot_id|>")[0], "\n\n"),
        before=("<|begin_of_text|>",),
    )
    clip = TinyText(
        "clip", _build_clip,
        # Flat attention (small q, k) makes the end token average the values of all words; the large output
        # gain lifts each word's share of that average back to unit scale.
        gains={"position_embedding": 0.1, "q_proj": 0.5, "k_proj": 0.5, "out_proj": 4.0, "fc2": 0.5},
        specials={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        before=("<|startoftext|>",), after=("<|endoftext|>",),
    )
    vae = TinyVae(
        _build_vae, _save_vae, _moments, _decode, _whiten,
        encoder=r"^(encoder|quant_conv)\.", branches=r"\.conv2\.conv\.|\.to_out\.0\.",
    )
    return TinyParts(vae, (llm, clip))
