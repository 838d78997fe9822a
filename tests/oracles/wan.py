"""References of Wan: transformers of every kind. See check.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.wan.arch import WanArch
from hvtrain.models.wan.inputs import WanInput, given_frames
from tests.oracles.check import Reference, relative

# --- DiT --------------------------------------------------------------------------------------------------------------


def _is_dit(reference: Reference) -> bool:
    return find("wan").signature({n: tuple(t.shape) for n, t in reference.part("weights.").items()})


def arch_of(c: dict[str, Any]) -> WanArch:
    """The official constructor's arguments in our words."""
    return WanArch(
        in_channels=c["in_dim"], out_channels=c["out_dim"], dim=c["dim"], ffn_dim=c["ffn_dim"], n_heads=c["num_heads"],
        n_layers=c["num_layers"], clip_dim=c.get("clip_dim", 0), n_clip=514 if c["model_type"] == "flf2v" else 0,
        text_dim=c["text_dim"], freq_dim=c["freq_dim"], patch=tuple(c["patch_size"]), text_len=c["text_len"],
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
    output.pow(2).mean().backward()
    assert x.grad is not None
    yield "grad_x", relative(x.grad, reference.tensors["grad_x"])
    parameters = dict(model.named_parameters())
    for name, wanted in reference.part("grad.").items():
        found = parameters[name].grad
        yield f"grad.{name}", relative(torch.zeros_like(wanted) if found is None else found, wanted)


KINDS = ((_is_dit, _check_dit),)
