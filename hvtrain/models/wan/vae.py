"""The video VAEs of 2.1 and 2.2: diffusers' AutoencoderKLWan, read from any layout they ship in.

Outside this file latents are NORMALISED: (mean of the posterior - MEAN) / STD, as the DiT sees them.
They are causal in time and run frame by frame (4 frames to a latent frame, the first alone), which is
part of what they compute, not a way to save memory. Whatever they are asked for, they encode in fp32:
in bf16 the latents of an image move, and so does all that is conditioned on it. Official code never
tiles them, and neither does this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.models.foreign import looks_like
from hvtrain.models.precision import autocast, without_autocast
from hvtrain.models.video_vae import VideoVae
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.keymap import Fused
from hvtrain.weights.source import Source, check, shapes_of

Shapes = Mapping[str, tuple[int, ...]]

FRAMES = 4  # to a latent frame
MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
)
STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
    1.1253, 2.8251, 1.9160,
)
MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885,
    0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338,
    0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458,
    1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
STATISTICS = {16: (MEAN_21, STD_21), 48: (MEAN_22, STD_22)}


def vae_of(model: Any, *, fingerprint: str = "", decoding: torch.dtype = torch.float32) -> VideoVae:
    """The library's model as the program uses it. `decoding`: what the decoder multiplies in. Always the
    posterior's mode, as everybody encodes for this model: a generator has no influence."""
    channels, patch = model.config.z_dim, model.config.patch_size or 1
    if channels not in STATISTICS:
        raise CheckpointError(f"a VAE of {channels} latent channels; known: 16 (2.1) and 48 (2.2)")
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in STATISTICS[channels])
    half = torch.bfloat16 if decoding == torch.float32 else decoding

    def encode(video: Tensor) -> tuple[Tensor, None]:
        with without_autocast(video.device.type):
            return moments(model, video.float())[0], None

    def decode(z: Tensor) -> Tensor:
        with autocast(z.device.type, enabled=decoding != torch.float32, dtype=half):
            return frames(model, z)

    return VideoVae(
        model, encode, decode, channels=channels, stride=(FRAMES, 8 * patch, 8 * patch), scale=1 / std,
        shift=mean, fingerprint=fingerprint,
    )


def moments(model: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """[B 3 F H W] -> mean and log-variance [B C T h w], unscaled. One frame, then four at a time."""
    x, cache = _patchified(video, model.config.patch_size or 1), _cache(model.encoder)
    outs = [model.encoder(part, feat_cache=cache, feat_idx=[0]) for part in _chunks(x)]
    return model.quant_conv(torch.cat(outs, dim=2)).chunk(2, dim=1)


def frames(model: Any, z: Tensor) -> Tensor:
    """Unscaled latents [B C T h w] -> [B 3 F H W], float32. One frame, then four at a time."""
    x, cache, out = model.post_quant_conv(z), _cache(model.decoder), []
    for i in range(x.shape[2]):
        part = model.decoder(x[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
        out.append(_unpatchified(part, model.config.patch_size or 1).float())
    return torch.cat(out, dim=2)


def _chunks(x: Tensor) -> Sequence[Tensor]:
    return [x[:, :, :1], *(x[:, :, 1:].split(FRAMES, dim=2) if x.shape[2] > 1 else ())]


def _cache(half: Any) -> list[Any]:
    """What its causal convolutions keep of the frames before, empty; one place each."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(module, WanCausalConv3d) for module in half.modules())


def _patchified(x: Tensor, p: int) -> Tensor:
    """b c f (h q) (w r) -> b (c r q) f h w, the official order; p = 1 changes nothing."""
    b, c, f, h, w = x.shape
    return x.view(b, c, f, h // p, p, w // p, p).permute(0, 1, 6, 4, 2, 3, 5).reshape(
        b, c * p * p, f, h // p, w // p
    )


def _unpatchified(x: Tensor, p: int) -> Tensor:
    b, c, f, h, w = x.shape
    return x.view(b, c // p**2, p, p, f, h, w).permute(0, 1, 4, 5, 3, 6, 2).reshape(
        b, c // p**2, f, h * p, w * p
    )


# --- files --------------------------------------------------------------------------------------------------


def open_vae(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    tiling: Any = None
) -> VideoVae:
    """Read a VAE: an official or ComfyUI file, or diffusers' directory or file.
    `dtype`: of decoding. Never tiled."""
    weights = open_weights(path)
    shapes = weights.shapes
    config = config_of(shapes, path)
    with torch.device("meta"):
        model = build_vae(config)
    wanted, known = shapes_of(model), {}
    for name in wanted:
        official = official_name(name, config["num_res_blocks"], by_stage=config["is_residual"])
        known[official if official in shapes else name] = name
    source = Source(weights, {known.get(file, file): Fused((file,)) for file in shapes})
    check(path, wanted, source.shapes)
    source.fill(model, dtype=torch.float32, device=device)
    return vae_of(model, fingerprint=fingerprint(weights), decoding=dtype)


def build_vae(config: Mapping[str, Any]) -> Any:
    """The library's class; meta-device friendly."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**config)


def config_of(shapes: Shapes, path: str | Path) -> dict[str, Any]:
    """Constructor arguments, from the shapes of a file under official names or the library's."""
    def shape(official: str, library: str) -> tuple[int, ...]:
        found = shapes.get(official, shapes.get(library))
        if found is None or len(found) != 5:
            label = looks_like(shapes)
            like = f"; it looks like {label}" if label else ""
            raise CheckpointError(f"{path}: not a VAE of this architecture: no '{official}'{like}")
        return found

    first = shape("encoder.conv1.weight", "encoder.conv_in.weight")
    last = shape("decoder.head.2.weight", "decoder.conv_out.weight")
    latent = shape("conv2.weight", "post_quant_conv.weight")[0]
    if latent not in STATISTICS:
        raise CheckpointError(f"{path}: a VAE of {latent} latent channels; known: 16 (2.1) and 48 (2.2)")
    mean, std = STATISTICS[latent]
    patch = 2 if first[1] == 12 else 1
    residual = r"encoder\.(downsamples\.0\.downsamples|down_blocks\.0\.resnets)\."
    return {
        "base_dim": first[0], "decoder_base_dim": last[1], "z_dim": latent,
        "num_res_blocks": _res_blocks(shapes),
        "is_residual": any(re.match(residual, name) for name in shapes), "in_channels": first[1],
        "out_channels": last[0], "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": 8 * patch, "latents_mean": list(mean), "latents_std": list(std),
    }


def _res_blocks(shapes: Shapes) -> int:
    """Of a stage of the encoder: those before its first downsampling."""
    stage = r"encoder\.(?:downsamples|down_blocks)\.(?:0\.(?:downsamples|resnets)\.)?"
    resample = [int(m[1]) for name in shapes if (m := re.match(stage + r"(\d+)\.resample\.", name))]
    blocks = [
        int(m[1]) + 1 for name in shapes if (m := re.match(stage + r"(\d+)\.(?:residual\.2|conv1)\.", name))
    ]
    return min(resample) if resample else max(blocks, default=2)


# The library's names -> official ones, inside a block and outside.
_INSIDE = {
    "norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_OUTSIDE = {
    "quant_conv": "conv1", "post_quant_conv": "conv2", "conv_in": "conv1", "norm_out": "head.0",
    "conv_out": "head.2", "mid_block.resnets.0": "middle.0", "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}


def official_name(name: str, n: int, *, by_stage: bool) -> str:
    """Of a tensor of the library. n: residual blocks to a stage of the encoder, one more to one of the
    decoder. 2.1 counts blocks through and 2.2 `by_stage`; what changes the size comes last in its stage."""

    def up(match: re.Match[str]) -> str:
        stage, block = int(match[1]), n + 1 if match[3] is None else int(match[3])
        return (
            f"upsamples.{stage}.upsamples.{block}." if by_stage else f"upsamples.{(n + 2) * stage + block}."
        )

    name = re.sub(r"\b(norm1|norm2|conv1|conv2|conv_shortcut)\.(?=\w+$)", lambda m: f"{_INSIDE[m[1]]}.", name)
    outside = (
        r"^(encoder\.|decoder\.|)(quant_conv|post_quant_conv|conv_in|norm_out|conv_out|mid_block\.\w+\.\d)\."
    )
    name = re.sub(outside, lambda m: f"{m[1]}{_OUTSIDE[m[2]]}.", name)
    name = re.sub(r"up_blocks\.(\d+)\.(upsamplers\.0|upsampler|resnets\.(\d+))\.", up, name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"downsamples.\1.downsamples.", name)
    name = re.sub(
        r"down_blocks\.(\d+)\.downsampler\.", lambda m: f"downsamples.{m[1]}.downsamples.{n}.", name
    )
    return name.replace("down_blocks.", "downsamples.")
