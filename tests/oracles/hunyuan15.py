"""References of HunyuanVideo 1.5: the transformers of text and image to video, distilled in
steps, and of super-resolution."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hvtrain.models import find
from hvtrain.models.dit import DiT
from hvtrain.models.hunyuan_video_15.arch import HunyuanVideo15Arch
from hvtrain.models.hunyuan_video_15.inputs import Hunyuan15Input
from tests.oracles.check import Reference, gradients, relative


def _is_dit(reference: Reference) -> bool:
    return find("hunyuan-video-15").signature(
        {n: tuple(t.shape) for n, t in reference.part("weights.").items()}
    )


def dit_of(reference: Reference) -> DiT:
    """In float32. Only what no shape tells comes from the config."""
    c, weights = reference.config, reference.part("weights.")
    proj, glyph = weights["img_in.proj.weight"], weights["byt5_in.fc1.weight"]
    arch = HunyuanVideo15Arch(
        in_channels=proj.shape[1], out_channels=weights["final_layer.linear.weight"].shape[0],
        hidden_size=proj.shape[0], heads_num=c["heads_num"], double=c["double"], rope_dims=tuple(c["rope"]),
        text_dim=c["text_states_dim"], glyph_dim=glyph.shape[1], glyph_hidden=glyph.shape[0],
        vision_dim=c["vision_states_dim"], meanflow=c.get("use_meanflow", False),
        rope_theta=float(c.get("rope_theta", 256.0)),
        mlp_ratio=weights["double_blocks.0.img_mlp.fc1.weight"].shape[0] / proj.shape[0],
    )
    model = find("hunyuan-video-15").build(arch).float()
    model.load_state_dict(weights, strict=True)
    return model


def valid(states: Tensor, mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """[B L D] without what the mask [B L] leaves out, padded anew, and the lengths."""
    rows = [one[keep.bool()] for one, keep in zip(states, mask, strict=True)]
    return pad_sequence(rows, batch_first=True), tuple(map(len, rows))


def model_input(reference: Reference, x: Tensor) -> Hunyuan15Input:
    """Officially, features of a picture are masked out where they are zero in the
    whole batch of text to video."""
    i = reference.part("input.")
    unseen = reference.config["mask_type"] == "t2v" and not i["vision"].any()
    masks = {
        "text": i["mask"], "glyph": i["byt5_mask"], "vision": torch.full(i["vision"].shape[:2], not unseen)
    }
    states = {"text": i["text"], "glyph": i["byt5"], "vision": i["vision"]}
    told = {kind: valid(states[kind], mask) for kind, mask in masks.items()}
    cond, lengths = ({kind: pair[n] for kind, pair in told.items()} for n in (0, 1))
    until = i.get("r")
    return Hunyuan15Input(x=x, t=i["t"], cond=cond, lengths=lengths, until=until)  # type: ignore[arg-type]


def _check_dit(reference: Reference) -> Iterator[tuple[str, float]]:
    model = dit_of(reference)
    x = reference.tensors["input.x"].clone().requires_grad_()
    output = model(model_input(reference, x))
    yield "output", relative(output.detach(), reference.tensors["output"])
    yield from gradients(reference, model, x, output)


KINDS = ((_is_dit, _check_dit),)
