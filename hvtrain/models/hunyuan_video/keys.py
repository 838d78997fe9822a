"""HunyuanVideo's tensors in other programs' words, and what a file that is not HunyuanVideo may be.

Dialects: "official" is what the model uses; "comfy" is what ComfyUI saves from inside; "diffusers" is
HunyuanVideoTransformer3DModel (also the published SkyReels V1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hvtrain.models.two_stream import diffusers_block
from hvtrain.weights.keymap import KeyMap, Rule

Shapes = Mapping[str, tuple[int, ...]]

_REFINER = "txt_in.individual_token_refiner.blocks.{n}"
_SCALE = ("weight", "scale")


def _comfy() -> Iterator[Rule]:
    double, single = "double_blocks.{n}", "single_blocks.{n}"
    for stream in ("img", "txt"):
        here = f"{double}.{stream}"
        yield Rule(f"{here}_mod.linear", (f"{here}_mod.lin",))
        yield Rule(f"{here}_attn_qkv", (f"{here}_attn.qkv",))
        yield Rule(f"{here}_attn_proj", (f"{here}_attn.proj",))
        yield Rule(f"{here}_attn_q_norm", (f"{here}_attn.norm.query_norm",), leaf=_SCALE)
        yield Rule(f"{here}_attn_k_norm", (f"{here}_attn.norm.key_norm",), leaf=_SCALE)
        yield Rule(f"{here}_mlp.fc1", (f"{here}_mlp.0",))
        yield Rule(f"{here}_mlp.fc2", (f"{here}_mlp.2",))
    yield Rule(f"{single}.modulation.linear", (f"{single}.modulation.lin",))
    yield Rule(f"{single}.q_norm", (f"{single}.norm.query_norm",), leaf=_SCALE)
    yield Rule(f"{single}.k_norm", (f"{single}.norm.key_norm",), leaf=_SCALE)
    for part in ("time_in", "guidance_in", "txt_in.t_embedder"):
        yield Rule(f"{part}.mlp.0", (f"{part}.in_layer",))
        yield Rule(f"{part}.mlp.2", (f"{part}.out_layer",))
    yield Rule("txt_in.c_embedder.linear_1", ("txt_in.c_embedder.in_layer",))
    yield Rule("txt_in.c_embedder.linear_2", ("txt_in.c_embedder.out_layer",))
    yield Rule(f"{_REFINER}.self_attn_qkv", (f"{_REFINER}.self_attn.qkv",))
    yield Rule(f"{_REFINER}.self_attn_proj", (f"{_REFINER}.self_attn.proj",))
    yield Rule(f"{_REFINER}.mlp.fc1", (f"{_REFINER}.mlp.0",))
    yield Rule(f"{_REFINER}.mlp.fc2", (f"{_REFINER}.mlp.2",))


def _diffusers() -> Iterator[Rule]:
    yield Rule("img_in.proj", ("x_embedder.proj",))
    yield Rule("final_layer.linear", ("proj_out",))
    yield Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True)
    embed, context = "time_text_embed", "context_embedder"
    yield from _two_linears("time_in.mlp.{}", f"{embed}.timestep_embedder", (0, 2))
    yield from _two_linears("guidance_in.mlp.{}", f"{embed}.guidance_embedder", (0, 2))
    yield from _two_linears("vector_in.{}_layer", f"{embed}.text_embedder", ("in", "out"))
    yield Rule("txt_in.input_embedder", (f"{context}.proj_in",))
    yield from _two_linears("txt_in.t_embedder.mlp.{}", f"{context}.{embed}.timestep_embedder", (0, 2))
    yield from _two_linears("txt_in.c_embedder.linear_{}", f"{context}.{embed}.text_embedder", (1, 2))
    yield from _diffusers_refiner(f"{context}.token_refiner.refiner_blocks.{{n}}")
    yield from _diffusers_double("double_blocks.{n}", "transformer_blocks.{n}")
    yield from _diffusers_single("single_blocks.{n}", "single_transformer_blocks.{n}")


def _two_linears(official: str, dialect: str, names: tuple[object, object]) -> Iterator[Rule]:
    for i, name in enumerate(names, start=1):
        yield Rule(official.format(name), (f"{dialect}.linear_{i}",))


def _qkv(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.to_{part}" for part in "qkv")


def _diffusers_refiner(there: str) -> Iterator[Rule]:
    for norm in ("norm1", "norm2"):
        yield Rule(f"{_REFINER}.{norm}", (f"{there}.{norm}",))
    yield Rule(f"{_REFINER}.self_attn_qkv", _qkv(f"{there}.attn"))
    yield Rule(f"{_REFINER}.self_attn_proj", (f"{there}.attn.to_out.0",))
    yield Rule(f"{_REFINER}.mlp.fc1", (f"{there}.ff.net.0.proj",))
    yield Rule(f"{_REFINER}.mlp.fc2", (f"{there}.ff.net.2",))
    yield Rule(f"{_REFINER}.adaLN_modulation.1", (f"{there}.norm_out.linear",))


def _diffusers_double(here: str, there: str) -> Iterator[Rule]:
    yield Rule(f"{here}.img_attn_qkv", _qkv(f"{there}.attn"))
    yield Rule(f"{here}.txt_attn_qkv", tuple(f"{there}.attn.add_{part}_proj" for part in "qkv"))
    yield from diffusers_block(here, there)


def _diffusers_single(here: str, there: str) -> Iterator[Rule]:
    yield Rule(f"{here}.linear1", (*_qkv(f"{there}.attn"), f"{there}.proj_mlp"), rows=(1, 1, 1, 4))
    yield Rule(f"{here}.linear2", (f"{there}.proj_out",))
    yield Rule(f"{here}.q_norm", (f"{there}.attn.norm_q",))
    yield Rule(f"{here}.k_norm", (f"{there}.attn.norm_k",))
    yield Rule(f"{here}.modulation.linear", (f"{there}.norm.linear",))


KEY_MAPS = {
    "official": KeyMap((), passthrough=True),
    "comfy": KeyMap(_comfy(), passthrough=True),
    "diffusers": KeyMap(_diffusers()),
}

_SIGNATURE = (
    "img_in.proj.weight",
    "txt_in.input_embedder.weight",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "vector_in.in_layer.weight",
    "double_blocks.0.img_attn_qkv.weight",
    "single_blocks.0.linear1.weight",
)

def owns(shapes: Shapes) -> bool:
    """Most of the signature is enough, so that a file with keys missing is still recognised and reported."""
    hits = sum(name in shapes for name in _SIGNATURE)
    return (
        hits >= 4
        and not any(
            name.startswith(("byt5_in.", "context_embedder_2.", "cond_type_embed")) for name in shapes
        )
    )
