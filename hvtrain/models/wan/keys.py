"""Wan's tensors in other programs' words, and whose files are no Wan although they look like it.

Dialects: "official" is what the model uses, ComfyUI too; "diffusers" is WanTransformer3DModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hvtrain.weights.keymap import KeyMap, Rule

Shapes = Mapping[str, tuple[int, ...]]

_TABLE = ("modulation", "scale_shift_table")


def _diffusers() -> Iterator[Rule]:
    embed = "condition_embedder"
    yield Rule("patch_embedding", ("patch_embedding",))
    for here, there in (("text_embedding", "text_embedder"), ("time_embedding", "time_embedder")):
        yield Rule(f"{here}.0", (f"{embed}.{there}.linear_1",))
        yield Rule(f"{here}.2", (f"{embed}.{there}.linear_2",))
    yield Rule("time_projection.1", (f"{embed}.time_proj",))
    yield Rule("head", ("",), leaf=_TABLE)
    yield Rule("head.head", ("proj_out",))
    picture = f"{embed}.image_embedder"
    yield Rule("img_emb", (picture,), leaf=("emb_pos", "pos_embed"))
    for n, there in ((0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2")):
        yield Rule(f"img_emb.proj.{n}", (f"{picture}.{there}",))
    yield from _diffusers_block("blocks.{n}")


def _diffusers_block(block: str) -> Iterator[Rule]:
    yield Rule(block, (block,), leaf=_TABLE)
    yield Rule(f"{block}.norm3", (f"{block}.norm2",))
    for here, there in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for part in "qkv":
            yield Rule(f"{block}.{here}.{part}", (f"{block}.{there}.to_{part}",))
        yield Rule(f"{block}.{here}.o", (f"{block}.{there}.to_out.0",))
        for norm in ("norm_q", "norm_k"):
            yield Rule(f"{block}.{here}.{norm}", (f"{block}.{there}.{norm}",))
    for here, there in (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k")):
        yield Rule(f"{block}.cross_attn.{here}", (f"{block}.attn2.{there}",))
    yield Rule(f"{block}.ffn.0", (f"{block}.ffn.net.0.proj",))
    yield Rule(f"{block}.ffn.2", (f"{block}.ffn.net.2",))


KEY_MAPS = {"official": KeyMap((), passthrough=True), "diffusers": KeyMap(_diffusers())}

_SIGNATURE = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_projection.1.weight",
    "head.modulation",
    "blocks.0.modulation",
    "blocks.0.self_attn.q.weight",
    "blocks.0.cross_attn.q.weight",
)
# Relatives with parts that this model lacks; models/foreign.yaml names them.
_RELATIVES = (
    "vace_", "face_adapter.", "face_encoder.", "motion_encoder.", "pose_patch_embedding.",
    "casual_audio_encoder.", "audio_injector.", "control_adapter.", "ref_conv.",
)


def owns(shapes: Shapes) -> bool:
    """Most of the signature is enough, so that a file with keys missing is still recognised and reported."""
    return (
        sum(name in shapes for name in _SIGNATURE) >= 5
        and not any(name.startswith(_RELATIVES) for name in shapes)
    )
