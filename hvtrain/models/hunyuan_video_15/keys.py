"""HunyuanVideo 1.5's tensors in other programs' words, and whose files they are.

Dialects: "official" is what the model uses; "comfy" is ComfyUI's, whose q, k and v are one, and "inside" what
it calls its own modules; "diffusers" is HunyuanVideo15Transformer3DModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hvtrain.models.two_stream import diffusers_block
from hvtrain.weights.keymap import KeyMap, Rule

Shapes = Mapping[str, tuple[int, ...]]

_SCALE = ("weight", "scale")
_BLOCK, _REFINER = "double_blocks.{n}", "txt_in.individual_token_refiner.blocks.{n}"


def _comfy() -> Iterator[Rule]:
    """What the files that it reads have, and what its LoRAs are named by."""
    for stream in ("img", "txt"):
        yield from _fused_qkv(stream, f"{_BLOCK}.{stream}_attn_qkv")


def _inside() -> Iterator[Rule]:
    """What its modules are called inside, as are layers in LoRAs that musubi-tuner has converted for it."""
    for stream in ("img", "txt"):
        here = f"{_BLOCK}.{stream}"
        yield from _fused_qkv(stream, f"{here}_attn.qkv")
        yield Rule(f"{here}_mod.linear", (f"{here}_mod.lin",))
        yield Rule(f"{here}_attn_proj", (f"{here}_attn.proj",))
        yield Rule(f"{here}_attn_q_norm", (f"{here}_attn.norm.query_norm",), leaf=_SCALE)
        yield Rule(f"{here}_attn_k_norm", (f"{here}_attn.norm.key_norm",), leaf=_SCALE)
        yield Rule(f"{here}_mlp.fc1", (f"{here}_mlp.0",))
        yield Rule(f"{here}_mlp.fc2", (f"{here}_mlp.2",))
    for part in ("time_in", "time_r_in", "txt_in.t_embedder"):
        yield Rule(f"{part}.mlp.0", (f"{part}.in_layer",))
        yield Rule(f"{part}.mlp.2", (f"{part}.out_layer",))
    yield Rule("txt_in.c_embedder.linear_1", ("txt_in.c_embedder.in_layer",))
    yield Rule("txt_in.c_embedder.linear_2", ("txt_in.c_embedder.out_layer",))
    yield Rule(f"{_REFINER}.self_attn_qkv", (f"{_REFINER}.self_attn.qkv",))
    yield Rule(f"{_REFINER}.self_attn_proj", (f"{_REFINER}.self_attn.proj",))
    yield Rule(f"{_REFINER}.mlp.fc1", (f"{_REFINER}.mlp.0",))
    yield Rule(f"{_REFINER}.mlp.fc2", (f"{_REFINER}.mlp.2",))


def _fused_qkv(stream: str, there: str) -> Iterator[Rule]:
    for i, part in enumerate("qkv"):
        yield Rule(f"{_BLOCK}.{stream}_attn_{part}", (there,), share=(i, 3))


def _diffusers() -> Iterator[Rule]:
    yield Rule("img_in.proj", ("x_embedder.proj",))
    yield Rule("final_layer.linear", ("proj_out",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)
    yield Rule("cond_type_embedding", ("cond_type_embed",))
    context = "context_embedder"
    yield from _two_linears("time_in.mlp.{}", "time_embed.timestep_embedder", (0, 2))
    yield from _two_linears("time_r_in.mlp.{}", "time_embed.timestep_embedder_r", (0, 2))
    yield Rule("txt_in.input_embedder", (f"{context}.proj_in",))
    yield from _two_linears(
        "txt_in.t_embedder.mlp.{}", f"{context}.time_text_embed.timestep_embedder", (0, 2)
    )
    yield from _two_linears("txt_in.c_embedder.linear_{}", f"{context}.time_text_embed.text_embedder", (1, 2))
    yield from _diffusers_refiner(f"{context}.token_refiner.refiner_blocks.{{n}}")
    yield Rule("byt5_in.layernorm", (f"{context}_2.norm",))
    for i in (1, 2, 3):
        yield Rule(f"byt5_in.fc{i}", (f"{context}_2.linear_{i}",))
    for i, there in ((0, "norm_in"), (1, "linear_1"), (3, "linear_2"), (4, "norm_out")):
        yield Rule(f"vision_in.proj.{i}", (f"image_embedder.{there}",))
    yield from _diffusers_block("transformer_blocks.{n}")


def _two_linears(official: str, dialect: str, names: tuple[int, int]) -> Iterator[Rule]:
    for i, name in enumerate(names, start=1):
        yield Rule(official.format(name), (f"{dialect}.linear_{i}",))


def _diffusers_refiner(there: str) -> Iterator[Rule]:
    for norm in ("norm1", "norm2"):
        yield Rule(f"{_REFINER}.{norm}", (f"{there}.{norm}",))
    yield Rule(f"{_REFINER}.self_attn_qkv", tuple(f"{there}.attn.to_{part}" for part in "qkv"))
    yield Rule(f"{_REFINER}.self_attn_proj", (f"{there}.attn.to_out.0",))
    yield Rule(f"{_REFINER}.mlp.fc1", (f"{there}.ff.net.0.proj",))
    yield Rule(f"{_REFINER}.mlp.fc2", (f"{there}.ff.net.2",))
    yield Rule(f"{_REFINER}.adaLN_modulation.1", (f"{there}.norm_out.linear",))


def _diffusers_block(there: str) -> Iterator[Rule]:
    for stream, qkv in (("img", "to_{}"), ("txt", "add_{}_proj")):
        for part in "qkv":
            yield Rule(f"{_BLOCK}.{stream}_attn_{part}", (f"{there}.attn.{qkv.format(part)}",))
    yield from diffusers_block(_BLOCK, there)


KEY_MAPS = {
    "official": KeyMap((), passthrough=True),
    "comfy": KeyMap(_comfy(), passthrough=True),
    "inside": KeyMap(_inside(), passthrough=True),
    "diffusers": KeyMap(_diffusers()),
}

_SIGNATURE = (
    "img_in.proj.weight",
    "txt_in.input_embedder.weight",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "byt5_in.fc1.weight",
    "vision_in.proj.1.weight",
    "cond_type_embedding.weight",
    "double_blocks.0.img_attn_q.weight",
)


def owns(shapes: Shapes) -> bool:
    """Most of the signature is enough, so that a file with keys missing is still recognised and reported."""
    return (
        sum(name in shapes for name in _SIGNATURE) >= 5
        and not any(name.startswith("vector_in.") for name in shapes)
    )
