"""References of Wan: transformers of every kind, whole sampling loops, VAEs, UMT5, CLIP and what image to
video is given. See check.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hvtrain.flow.solvers import State
from hvtrain.generate.requests import Request
from hvtrain.generate.sample import sample_latents
from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.wan.arch import WanArch
from hvtrain.models.wan.clip import ANCHORS, ClipEncoder, vit
from hvtrain.models.wan.images import image_conditions
from hvtrain.models.wan.inputs import WanInput, given_frames
from hvtrain.models.wan.text import load_umt5
from hvtrain.models.wan.vae import open_vae
from hvtrain.parallel.context import ParallelContext
from hvtrain.weights.source import anchored
from tests.oracles.check import Reference, gradients, read, relative

# --- DiT ----------------------------------------------------------------------------------------------------


def _is_dit(reference: Reference) -> bool:
    return find("wan").signature({n: tuple(t.shape) for n, t in reference.part("weights.").items()})


def arch_of(c: dict[str, Any]) -> WanArch:
    """The official constructor's arguments in our words."""
    return WanArch(
        in_channels=c["in_dim"], out_channels=c["out_dim"], dim=c["dim"], ffn_dim=c["ffn_dim"],
        n_heads=c["num_heads"], n_layers=c["num_layers"], clip_dim=c.get("clip_dim", 0),
        n_clip=514 if c["model_type"] == "flf2v" else 0, text_dim=c["text_dim"], freq_dim=c["freq_dim"],
        patch=tuple(c["patch_size"]), text_len=c["text_len"],
    )


def dit_of(reference: Reference, prefix: str = "weights.") -> DiT:
    model = find("wan").build(arch_of(reference.config)).float()
    model.load_state_dict(reference.part(prefix), strict=True)
    return model


def model_input(reference: Reference, x: Tensor) -> WanInput:
    """x [1 C T H W]. The references are without a batch."""
    i = reference.part("input.")
    text = i["context"][None]
    cond, clean = {"text": text}, None
    if "y" in i:
        x = torch.cat([x, i["y"][None]], dim=1)
    if "clip_fea" in i:
        cond["clip"] = i["clip_fea"].flatten(0, 1)[None]
    if "t_tokens" in i:
        per_frame = i["t_tokens"].unflatten(1, (x.shape[2], -1))
        clean = (per_frame == 0).all(-1)
    t = i["t"] if clean is None else i["t_tokens"].amax(1)
    return WanInput(x=x, t=t, cond=cond, lengths={"text": (text.shape[1],)}, clean=clean)


def _check_dit(reference: Reference) -> Iterator[tuple[str, float]]:
    model, i = dit_of(reference), reference.part("input.")
    x = i["x"].clone().requires_grad_()
    output = model(model_input(reference, x[None]))[0]
    yield "output", relative(output.detach(), reference.tensors["output"])
    if "y" in i and set(i["y"][:4].unique().tolist()) <= {0.0, 1.0}:  # else it is noise, no mask
        last = reference.config["model_type"] == "flf2v"
        mask = given_frames(i["y"].shape[1], last=last, device=x.device)[:, :, None, None]
        yield "mask", relative(mask.float().expand_as(i["y"][:4]), i["y"][:4])
    yield from gradients(reference, model, x, output)


# --- sampling -----------------------------------------------------------------------------------------------


def _is_loop(reference: Reference) -> bool:
    return "input.noise" in reference.tensors and "guide_scale" in "".join(reference.config)


def _check_loop(reference: Reference) -> Iterator[tuple[str, float]]:
    """The program's own loop, from the reference's noise: what each step makes,
    and what the model is given."""
    c, i, wanted, spec = reference.config, reference.part("input."), reference.part("output."), find("wan")
    given = {name: c[name] for name in ("steps", "shift", "solver")} | {"frames": c["frame_num"]}
    given["width"], given["height"] = c["size_wh"]
    text, image = {"text": i["context"][None], "text_len": torch.tensor([len(i["context"])])}, {}
    without = {"text": i["context_null"][None], "text_len": torch.tensor([len(i["context_null"])])}
    if "boundary" in c:
        flavor = spec.flavor("t2v-a14b")
        sigmas = {"high": (c["boundary"], 1.0), "low": (0.0, c["boundary"])}
        flavor = replace(flavor, experts=tuple(replace(e, sigmas=sigmas[e.name]) for e in flavor.experts))
        models = {name: dit_of(reference, f"weights.{name}_noise_model.") for name in sigmas}
        given["expert_cfg_scale"] = dict(zip(("low", "high"), c["guide_scale_low_high"], strict=True))
    else:
        flavor, models = spec.flavor("ti2v-5b"), {"": dit_of(reference)}
        image = {"image_latents": i["z"][None]}
        given["cfg_scale"] = c["guide_scale"]
    seen: list[WanInput] = []

    def at(sigma: float) -> Any:
        expert = flavor.expert(sigma)
        model = models[expert.name if expert else ""]

        def predict(inp: WanInput) -> Tensor:
            seen.append(inp)
            return model(inp)

        return predict

    steps: list[Tensor] = []
    out = sample_latents(
        at, spec, flavor, {**text, **image}, uncond={**without, **image}, request=Request.of(flavor, **given),
        ctx=ParallelContext(), begin=State(i["noise"][None]), on_step=lambda state: steps.append(state.x[0]),
    )
    yield "output", relative(out[0], reference.tensors["output"])
    for step, x in enumerate(steps):
        told = seen[2 * step]  # with the prompt and without
        yield f"timestep {step}", relative(told.t, wanted["timesteps"][step : step + 1])
        if "x" in wanted:
            yield f"x {step}", relative(x, wanted["x"][step])
        if "x_in" in wanted:
            cells = told.x[0, 0, 0].numel() // c["patch_size"][1] // c["patch_size"][2]
            yield f"x_in {step}", relative(told.x[0], wanted["x_in"][step])
            per_token = torch.where(told.clean, 0.0, told.t[:, None]).repeat_interleave(cells, dim=1)
            yield f"t_tokens {step}", relative(per_token[0], wanted["t_tokens"][step])


# --- what a model is made of besides ------------------------------------------------------------------------


def _is_vae(reference: Reference) -> bool:
    return "weights.encoder.conv1.weight" in reference.tensors and "temperal_downsample" in reference.config


def opened(reference: Reference, folder: Path) -> Path:
    """The weights as a file of their own."""
    save_file(
        {n: t.contiguous() for n, t in reference.part("weights.").items()}, folder / "weights.safetensors"
    )
    return folder / "weights.safetensors"


def _check_vae(reference: Reference) -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        vae = open_vae(opened(reference, Path(folder)))
    mean, std = (
        torch.tensor(reference.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    i, wanted = reference.part("input."), reference.part("output.")
    for end in ("", "_17"):
        if f"video{end}" in i:
            latents = vae.encode(i[f"video{end}"])
            yield f"latents_normalised{end}", relative(latents, wanted[f"latents_normalised{end}"])
            if f"latents_mean{end}" in wanted:
                yield f"latents_mean{end}", relative(latents * std + mean, wanted[f"latents_mean{end}"])
        if f"latents{end}" in i:
            latents = i[f"latents{end}"]
            video = vae.decode(latents, clamp=False)
            yield f"video_from_normalised{end}", relative(video, wanted[f"video_from_normalised{end}"])
            if f"video{end}" in wanted:
                yield (
                    f"video{end}",
                    relative(vae.decode((latents - mean) / std, clamp=False), wanted[f"video{end}"])
                )


def _is_text(reference: Reference) -> bool:
    return "weights.blocks.0.pos_embedding.embedding.weight" in reference.tensors


@torch.no_grad()
def _check_text(reference: Reference) -> Iterator[tuple[str, float]]:
    """Each prompt alone and without padding: that is all that is stored."""
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_umt5(opened(reference, Path(folder)), dtype=torch.float32)
    ids, mask = reference.tensors["input.ids"], reference.tensors["input.mask"]
    for i, n in enumerate(mask.sum(1).tolist()):
        yield f"output {i}", relative(model(ids[i : i + 1, :n])[0], reference.tensors["output"][i, :n])


def _is_clip(reference: Reference) -> bool:
    return "weights.cls_embedding" in reference.tensors


def clip_of(reference: Reference) -> ClipEncoder:
    with tempfile.TemporaryDirectory() as folder:
        source = anchored(opened(reference, Path(folder)), ANCHORS, what="a tower")
        model = vit(source, n_heads=reference.config["num_heads"], patch=reference.config["patch_size"])
        source.load(model, what="a tower", dtype=torch.float32)
    return ClipEncoder(model)


@torch.no_grad()
def _check_clip(reference: Reference) -> Iterator[tuple[str, float]]:
    yield (
        "output",
        relative(clip_of(reference).model(reference.tensors["input.pixels"]), reference.tensors["output"])
    )


def _is_condition(reference: Reference) -> bool:
    return "output.y" in reference.tensors


def _check_condition(reference: Reference) -> Iterator[tuple[str, float]]:
    """Of VAE and CLIP in the same folder."""
    folder, c, i = Path(reference.path).parent, reference.config, reference.part("input.")
    clip = clip_of(read(str(folder / "wan21_clip_visual.safetensors")))
    with tempfile.TemporaryDirectory() as temporary:
        vae = open_vae(opened(read(str(folder / "wan21_vae.safetensors")), Path(temporary)))
    images = torch.stack(
        [i[name].permute(2, 0, 1) for name in ("image", "last_image") if name in i]
    ) / 127.5 - 1
    t = (c["frame_num"] - 1) // 4 + 1
    found = image_conditions(vae, {"clip": clip}, images, (16, t, *c["latent_hw"]))
    y = reference.tensors["output.y"]
    mask = given_frames(t, last=len(images) > 1, device=y.device)[:, :, None, None].float()
    yield "mask", relative(mask.expand_as(y[:4]), y[:4])
    yield "latents", relative(found["image_latents"], y[4:])
    yield "clip_pixels", relative(clip.prepared(images), reference.tensors["output.clip_pixels"])
    yield "clip_fea", relative(found["clip"], reference.tensors["output.clip_fea"].flatten(0, 1))


KINDS = (
    (_is_loop, _check_loop), (_is_dit, _check_dit), (_is_vae, _check_vae), (_is_text, _check_text),
    (_is_clip, _check_clip), (_is_condition, _check_condition),
)
