"""References of HunyuanVideo 1.5's VAE and latent upsamplers. See check.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hvtrain.models.hunyuan_video_15.upsample import build_upsampler, resized
from hvtrain.models.hunyuan_video_15.vae import build_vae
from tests.oracles.check import Reference, gradients, relative


def _is_vae(reference: Reference) -> bool:
    return "weights.encoder.down.0.downsample.conv.conv.weight" in reference.tensors


@torch.no_grad()
def _check_vae(reference: Reference) -> Iterator[tuple[str, float]]:
    """At once, and a frame at a time."""
    model = build_vae(reference.config)
    model.load_state_dict(reference.part("weights."), strict=True)
    t = reference.tensors
    if "input.video" in t:
        for how, encode in (("", model.encoder), (" in pieces", model.moments)):
            mean, log_var = encode(t["input.video"]).chunk(2, dim=1)
            for name, found in (
                ("latents_mean", mean), ("latents_std", (0.5 * log_var.clamp(-30, 20)).exp())
            ):
                if f"output.{name}" in t:
                    yield f"output.{name}{how}", relative(found, t[f"output.{name}"])
    if "input.latents" in t:
        yield "output.video", relative(model.decoder(t["input.latents"]), t["output.video"])
        yield "output.video in pieces", relative(model.frames(t["input.latents"]), t["output.video"])


def _is_upsampler(reference: Reference) -> bool:
    return {
        "weights.in_conv.conv.weight", "weights.up.0.block.0.conv1.conv.weight"
    } & reference.tensors.keys() != set()


def _check_upsampler(reference: Reference) -> Iterator[tuple[str, float]]:
    weights = reference.part("weights.")
    model = build_upsampler({n: tuple(w.shape) for n, w in weights.items()}, reference.config, reference.path)
    model.load_state_dict(weights, strict=True)
    x = reference.tensors["input.x"].clone().requires_grad_()
    output = model(x)
    yield "output", relative(output.detach(), reference.tensors["output"])
    yield from gradients(reference, model, x, output)
    if "output.resized" in reference.tensors:
        with torch.no_grad():
            found = model(resized(x.detach(), tuple(reference.config["target_shape"])))
        yield "output.resized", relative(found, reference.tensors["output.resized"])


KINDS = ((_is_vae, _check_vae), (_is_upsampler, _check_upsampler))
