"""LoRAs of HunyuanVideo 1.5: which layers, and as musubi and ComfyUI write them."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.write import save_lora
from hvtrain.merge.policies import Contribution, Dense
from hvtrain.merge.write import plan_parts
from hvtrain.models.load import identify
from hvtrain.slices.plan import Cut, make_plan
from hvtrain.slices.run import target_shapes
from tests.models.hunyuan_video_15.dit import ARCH, SPEC, build


def test_a_lora_adapts_what_musubi_s_does_and_a_slice_is_a_block():
    with torch.device("meta"):
        model = SPEC.build(SPEC.flavor("t2v-480p").arch)
    names = SPEC.lora_targets(model)
    assert len(names) == 14 * 54 and {n.split(".", 2)[2] for n in names} == {
        f"{s}_{part}" for s in ("img", "txt")
        for part in ("mod.linear", "attn_q", "attn_k", "attn_v", "attn_proj", "mlp.fc1", "mlp.fc2")
    }  # fmt: skip
    cut = Cut(blocks_per_loraid=1, granularity="block")
    plan = make_plan(target_shapes(model, SPEC), cut, model=SPEC.name, flavor="t2v-480p")
    assert [len(one.slots) for one in plan.slices] == [14] * 54


@pytest.fixture
def lora(tmp_path):
    """Of every layer, rank 2, alpha 1."""
    model, draw, tensors = build(), torch.Generator().manual_seed(5), {}
    for name in SPEC.lora_targets(model):
        n_out, n_in = model.get_submodule(name).weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, n_in, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(n_out, 2, generator=draw)
    save_lora(tmp_path / "a.safetensors", tensors, rank=2, alpha=1.0, metadata={}, architecture=SPEC.name)
    return tmp_path / "a.safetensors", tensors


def test_ours_is_what_musubi_writes(lora):
    path, tensors = lora
    held = load_file(path)
    assert len(held) == 3 * 14 * 2
    stem = "lora_unet_double_blocks_1_txt_attn_q"
    assert torch.equal(
        held[f"{stem}.lora_down.weight"], tensors["double_blocks.1.txt_attn_q.lora_down.weight"]
    )
    assert held[f"{stem}.lora_up.weight"].shape == (64, 2) and held[f"{stem}.alpha"].item() == 1
    assert (
        "lora_unet_double_blocks_0_img_mod_linear.alpha" in held
        and "lora_unet_double_blocks_0_img_mlp_fc1.alpha" in held
    )
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert (
        said["ss_base_model_version"] == "hunyuan_video_1_5"
        and said["modelspec.architecture"] == "hunyuan-video-1.5/lora"
    )
    assert said["ss_network_module"] == "networks.lora_hv_1_5" and said["ss_network_dim"] == "2"
    assert read_lora(path, linear_shapes(build()), spec=SPEC).pairs.keys() == set(SPEC.lora_targets(build()))


def test_comfyui_s_has_q_k_and_v_in_one_both_ways(lora, tmp_path):
    path, _ = lora
    own = read_lora(path, linear_shapes(build()), spec=SPEC)
    made = converted(own, SPEC, DIALECTS["comfyui"])
    stem = "diffusion_model.double_blocks.0.img_attn_qkv"
    down, up, alpha = (made.tensors[f"{stem}.{end}"] for end in ("lora_A.weight", "lora_B.weight", "alpha"))
    assert down.shape == (6, 64) and up.shape == (192, 6) and alpha.item() == 3
    q, v = own.pairs["double_blocks.0.img_attn_q"], own.pairs["double_blocks.0.img_attn_v"]
    assert (
        torch.equal(down[:2], q.down) and torch.equal(up[:64, :2], q.up) and torch.equal(up[128:, 4:], v.up)
    )
    assert (
        up.count_nonzero() == 3 * 64 * 2
        and not any("attn_q." in name or "attn_k." in name for name in made.tensors)
    )
    made.save(tmp_path / "comfy.safetensors")
    again = read_lora(tmp_path / "comfy.safetensors", linear_shapes(build()), spec=SPEC)
    for name, pair in own.pairs.items():
        other = again.pairs[name]
        assert torch.equal(
            other.down, pair.down
        ) and torch.equal(other.up, pair.up) and other.alpha == pair.alpha, name


def test_one_that_musubi_has_converted_for_comfyui_is_read(lora, tmp_path):
    """lora_unet_ names of ComfyUI's own modules: mlp_0, mod_lin, and stacks of q, k and v."""
    own = read_lora(lora[0], linear_shapes(build()), spec=SPEC)
    theirs = {}
    for name, pair in own.pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        for a, b in (("mlp_fc1", "mlp_0"), ("mlp_fc2", "mlp_2"), ("mod_linear", "mod_lin")):
            stem = stem.replace(a, b)
        if not stem.endswith(("attn_q", "attn_k", "attn_v")):
            theirs |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
            theirs[f"{stem}.alpha"] = torch.tensor(1.0)
    for block in range(2):
        for stream in ("img", "txt"):
            parts = [own.pairs[f"double_blocks.{block}.{stream}_attn_{x}"] for x in "qkv"]
            stem = f"lora_unet_double_blocks_{block}_{stream}_attn_qkv"
            theirs[f"{stem}.lora_down.weight"] = torch.cat([p.down for p in parts])
            theirs[f"{stem}.lora_up.weight"] = torch.block_diag(*(p.up for p in parts))
            theirs[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file({n: t.clone() for n, t in theirs.items()}, tmp_path / "musubi.safetensors")
    again = read_lora(tmp_path / "musubi.safetensors", linear_shapes(build()), spec=SPEC)
    assert again.pairs.keys() == own.pairs.keys()
    assert all(
        torch.equal(again.pairs[n].up, p.up) and again.pairs[n].scale == p.scale for n, p in own.pairs.items()
    )
    first, pair = "lora_unet_double_blocks_0_img_attn_q", own.pairs["double_blocks.0.img_attn_q"]
    twice = {f"{first}.lora_down.weight": pair.down, f"{first}.lora_up.weight": pair.up}
    save_file({n: t.clone() for n, t in {**theirs, **twice}.items()}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="twice"):
        read_lora(tmp_path / "twice.safetensors", linear_shapes(build()), spec=SPEC)


def test_a_lora_is_merged_into_comfyui_s_fused_tensors(lora, tmp_path):
    state = build(ARCH).state_dict()
    theirs = {n: c.of(state).clone() for n, c in SPEC.key_maps["comfy"].write(state).items()}
    save_file(theirs, tmp_path / "dit.safetensors", {"hvtrain.arch": json.dumps(asdict(ARCH))})
    found, shapes = identify(tmp_path / "dit.safetensors"), linear_shapes(build())
    own = read_lora(lora[0], shapes, spec=SPEC).pairs
    names = [n for n in own if "double_blocks.0.img_attn_" in n]
    layers = {n: [Contribution("a", own[n], 0.5)] for n in names}
    k = "double_blocks.0.img_attn_k"
    layers[k] = Dense(lambda: 0.5 * own[k].delta())
    parts = plan_parts(found, layers, shapes)
    assert set(parts) == {f"double_blocks.0.img_attn_{x}.weight" for x in ("qkv", "proj")}
    merged = theirs["double_blocks.0.img_attn_qkv.weight"].clone()
    parts["double_blocks.0.img_attn_qkv.weight"].add_to(merged)
    want = [state[f"{name}.weight"] + 0.5 * own[name].delta() for name in names if "proj" not in name]
    assert len(want) == 3 and torch.allclose(merged, torch.cat(want), atol=1e-5)
