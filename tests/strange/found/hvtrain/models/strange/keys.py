"""A strange transformer's tensors in another program's words."""

from __future__ import annotations

from collections.abc import Iterator

from hvtrain.weights.keymap import KeyMap, Rule


def _diffusers() -> Iterator[Rule]:
    yield Rule("strange_patch", ("patch_embedding",))
    for name in ("words", "letters", "sight"):
        yield Rule(f"{name}_in", (f"condition_embedder.{name}_proj",))
    for i, n in enumerate((0, 2), start=1):
        yield Rule(f"time_in.mlp.{n}", (f"condition_embedder.time_embedder.linear_{i}",))
    yield Rule("time_mod", ("condition_embedder.time_proj",))
    yield Rule("head_mod", ("norm_out.linear",), swap=True)
    yield Rule("head_out", ("proj_out",))
    here, there = "blocks.{n}", "transformer_blocks.{n}"
    yield Rule(here, (there,), leaf=("mod", "scale_shift_table"))
    yield Rule(f"{here}.self_qkv", tuple(f"{there}.attn1.to_{x}" for x in "qkv"))
    yield Rule(f"{here}.self_q_norm", (f"{there}.attn1.norm_q",))
    yield Rule(f"{here}.self_k_norm", (f"{there}.attn1.norm_k",))
    yield Rule(f"{here}.self_out", (f"{there}.attn1.to_out.0",))
    yield Rule(f"{here}.cross_q", (f"{there}.attn2.to_q",))
    yield Rule(f"{here}.cross_q_norm", (f"{there}.attn2.norm_q",))
    yield Rule(f"{here}.cross_out", (f"{there}.attn2.to_out.0",))
    for name in ("words", "letters", "sight"):
        yield Rule(f"{here}.{name}_kv", tuple(f"{there}.attn2.{name}_{x}_proj" for x in "kv"))
    yield Rule(f"{here}.ffn.fc1", (f"{there}.ffn.net.0.proj",))
    yield Rule(f"{here}.ffn.fc2", (f"{there}.ffn.net.2",))


KEY_MAPS = {"official": KeyMap((), passthrough=True), "diffusers": KeyMap(_diffusers())}
