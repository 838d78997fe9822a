"""The parts of a tiny HunyuanVideo 1.5, the official classes at small widths, as hvtrain/tiny makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.models.hunyuan_video_15.flavors import FLAVORS
from hvtrain.models.hunyuan_video_15.glyph import FACTS
from hvtrain.models.hunyuan_video_15.text import TEMPLATE
from hvtrain.models.hunyuan_video_15.vae import METADATA_KEY, build_vae
from hvtrain.models.hunyuan_video_15.vae_model import Vae15
from hvtrain.models.spec import TinyParts, TinyText, TinyVae
from hvtrain.models.video_vae import save_vae

ARCH = FLAVORS["tiny-i2v"].arch
HEADS = 4
PICTURE, PATCH = 64, 16  # pixels: 16 tokens a picture


def _build_vae(*, channels: Sequence[int], norm_groups: int, latent_channels: int) -> Any:
    """The official compression, 4 x 16 x 16. Its norms have no groups. It begins as what passes
    on the colours of 8 x 8 pixels, for its own shortcuts add colours up, and training takes
    long to tell them apart again."""
    del norm_groups
    vae: Any = build_vae(
        {"block_out_channels": channels, "layers_per_block": 1, "latent_channels": latent_channels}
    )
    if tuple(channels) == WIDTHS:
        _pass_colors(vae)
    vae.encoder.conv_out.conv.bias.data[latent_channels:] = -7.0
    return vae


WIDTHS = (8, 16, 16, 32, 64)
SEEN = (0, 1, 2, 0, 1, 2, 3, 3)  # which of red, green, blue and their sum a channel of the first level is


@torch.no_grad()
def _pass_colors(vae: Any) -> None:
    """Sets what the centres of the kernels do, shortcuts counted in, and makes the rest of them small. Every
    level keeps four numbers, the colours and their sum, of each cell of the level before."""
    eye, sixth = torch.eye(4), torch.eye(4)[list(SEEN)] / 2
    up, down = vae.decoder.up, vae.encoder.down
    _set(vae.encoder.conv_in.conv, torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)])[list(SEEN)])
    _set(down[0].downsample.conv.conv, sixth.T - _means(4, 8))
    _set(down[1].downsample.conv.conv, eye.repeat(1, 4) / 4 - _means(4, 16))
    _set(down[2].downsample.conv.conv, eye.repeat(1, 4) / 4 - _means(4, 16))
    # right, down, later
    slopes = torch.tensor([[1.0 if cell >> bit & 1 else -1.0 for cell in range(8)] for bit in range(3)])
    wanted = torch.cat(
        [
            eye.repeat(1, 8) / 8, torch.kron(slopes, eye[3:]) / 8,
            torch.kron(slopes[:1] * slopes[1:2], eye[3:]) / 8
        ]
    )
    _set(down[3].downsample.conv.conv, wanted - _means(8, 32))
    _set(vae.encoder.conv_out.conv, torch.zeros(64, 64))
    _set(vae.decoder.conv_in.conv, torch.zeros(64, 32))
    # the first layer's shortcut has every channel twice
    halves = torch.kron(torch.eye(32), torch.full((1, 2), 0.5))
    # of a quarter of a latent cell, its 8 parts
    cell = torch.cat([eye.repeat(8, 1), torch.zeros(32, 4)], dim=1)
    _set(up[0].upsample.conv.conv, torch.kron(torch.eye(4), cell).repeat(2, 1) @ halves - _spread(64, 8, 32))
    _set(up[1].upsample.conv.conv, torch.kron(torch.eye(8), eye.repeat(4, 1)) - _spread(32, 8, 16))
    _set(up[2].upsample.conv.conv, torch.kron(torch.eye(4), eye.repeat(4, 1)) - _spread(16, 4, 16))
    # Signs, and a constant beside the colours: they come through the last norm and
    # SiLU, as silu(x) - silu(-x) = x.
    signs = torch.cat([torch.eye(3, 4), -torch.eye(3, 4), torch.zeros(2, 4)])
    _set(up[3].upsample.conv.conv, torch.kron(torch.eye(4), signs) - _spread(16, 4, 8))
    up[3].upsample.conv.conv.bias.view(4, 8)[:, 6:] = 1.5
    _set(vae.decoder.conv_out.conv, 0.85 * torch.eye(3, 8) - 0.85 * torch.eye(3, 8).roll(3, 1))


def _set(conv: Any, centre: Tensor) -> None:
    conv.weight *= 0.1
    conv.bias.zero_()
    conv.weight[:, :, 2, 1, 1] += centre


def _means(n_out: int, n_in: int) -> Tensor:
    """What a step down has beside its convolution: of as many neighbours [n_out n_in]."""
    return torch.kron(torch.eye(n_out), torch.full((1, n_in // n_out), n_out / n_in))


def _spread(n_in: int, cells: int, n_out: int) -> Tensor:
    """What a step up has beside it: for each of its cells a part of the channels,
    repeated [cells * n_out n_in]."""
    return torch.kron(torch.eye(n_in), torch.ones(cells * n_out // n_in, 1))


def _save_vae(model: Vae15, path: str) -> None:
    save_vae(model, path, key=METADATA_KEY, dtype=torch.float16)


def _moments(model: Vae15, video: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_var = model.encoder(video).chunk(2, dim=1)  # the whole clip at once: the same, and faster
    return mean, log_var.clamp(-30, 20)


def _decode(model: Vae15, latents: Tensor) -> Tensor:
    return model.decoder(latents)


@torch.no_grad()
def _whiten(model: Any, mean: Tensor, std: Tensor) -> None:
    """The mean of each channel exactly, the deviation of all together: the encoder's last
    shortcut lets no more be changed."""
    into, out_of = model.encoder.conv_out.conv, model.decoder.conv_in.conv
    into.bias[: len(mean)] -= mean
    # the decoder's shortcut around its first layer
    beside = mean.repeat_interleave(len(out_of.weight) // len(mean))
    out_of.bias += (out_of.weight.sum((2, 3, 4)) * mean).sum(1) + beside
    model.arch = replace(model.arch, scaling_factor=1 / float(std.square().mean().sqrt()))


def _build_llm(tokenizer: Any) -> nn.Module:
    """Three layers, of which the encoder uses the first."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    pad = tokenizer.token_to_id("<|endoftext|>")
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=ARCH.text_dim,
            intermediate_size=ARCH.text_dim // 2, num_hidden_layers=3, num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2, max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=pad,
            eos_token_id=tokenizer.token_to_id("<|im_end|>"), pad_token_id=pad,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        )
    )


def _build_byt5(_: None) -> nn.Module:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Stack

    width = ARCH.glyph_dim
    config = T5Config(
        vocab_size=384, d_model=width, d_kv=width // HEADS, d_ff=width, num_layers=2, num_heads=HEADS,
        is_encoder_decoder=False, use_cache=False, **FACTS,
    )
    return T5Stack(config)


def _build_siglip(_: None) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=ARCH.vision_dim, intermediate_size=ARCH.vision_dim, num_hidden_layers=2,
        num_attention_heads=HEADS, image_size=PICTURE, patch_size=PATCH, vision_use_head=False,
    )
    return SiglipVisionModel(config)


def parts() -> TinyParts:
    head = TEMPLATE.split("{}")[0]
    llm = TinyText(
        "llm", _build_llm,
        gains={"o_proj": 0.7, "down_proj": 0.7},  # context colours a word's state but does not bury it
        specials={"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, more_specials=("<|im_start|>",),
        atoms=(head.split("system\n")[1].split("<|im_end|>")[0], "\n"),  # the instruction is one token
    )
    byt5 = TinyText("byt5", _build_byt5, gains={"q": 0.5, "o": 0.7, "wo": 0.7}, specials={})
    siglip = TinyText(
        "siglip", _build_siglip, specials={},
        gains={"patch_embedding": 2 / PATCH**2, "position_embedding": 0.3, "out_proj": 0.7, "fc2": 0.7},
    )
    vae = TinyVae(
        _build_vae, _save_vae, _moments, _decode, _whiten, encoder=r"^encoder\.",
        branches=r"\.conv2\.conv\.|\.proj_out\."
    )
    return TinyParts(vae, (llm, byt5, siglip), folder="hunyuan_video_15")
