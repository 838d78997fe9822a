"""Whose file it is: names, shapes and dialects of HunyuanVideo 1.5's checkpoints, other
programs' caches, its configs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.config import EncodeConfig, GenerateConfig, TrainConfig, load
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.generate.requests import Request, lacks
from hvtrain.models.hunyuan_video_15.flavors import FLAVORS, told_by
from hvtrain.models.hunyuan_video_15.musubi import MUSUBI, SCALING
from hvtrain.models.load import identify, load_dit
from hvtrain.train.data import open_shards
from hvtrain.weights.float8 import quantize
from tests.models.hunyuan_video_15.dit import SPEC, WIDE, an_input, build

DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize(
    ("path", "flavor"),
    [
        ("transformer/480p_t2v/diffusion_pytorch_model.safetensors", "t2v-480p"),
        ("transformer/720p_i2v", "i2v-720p"),
        ("transformer/480p_i2v_step_distilled/model.safetensors", "i2v-480p-step-distilled"),
        ("hunyuanvideo1.5_480p_t2v_cfg_distilled_fp16.safetensors", "t2v-480p-distilled"),
        ("hunyuanvideo1.5_720p_sr_distilled_fp16.safetensors", "sr-720p"),
        ("1080p_sr_distilled", "sr-1080p"),
        ("720p_t2v/my.safetensors", "t2v-720p"),
        ("hunyuanvideo1.5_fp16.safetensors", None),
    ],
)
def test_names_of_files_tell_what_shapes_do_not(path, flavor):
    assert told_by(Path("ckpts") / path) == flavor


def test_a_sparse_one_is_computed_densely_and_it_is_said(caplog):
    assert told_by(Path("ckpts/720p_i2v_distilled_sparse")) == "i2v-720p-distilled"
    assert "computed densely" in caplog.text


def full_size(path, flavor):
    """A file of the right names and shapes, without a byte of data."""
    with torch.device("meta"):
        state = SPEC.build(SPEC.flavor(flavor).arch).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    head, end = {}, 0
    for name, t in state.items():
        head[name] = {"dtype": "F16", "shape": list(t.shape), "data_offsets": [end, end + 2 * t.numel()]}
        end += 2 * t.numel()
    text = json.dumps(head).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole
    return path


def test_files_are_known_and_wrong_ones_refused_before_anything_loads(tmp_path):
    plain = full_size(tmp_path / "dit.safetensors", "t2v-480p")
    assert (
        identify(plain).flavor.name == "t2v-480p"
        and identify(plain, flavor="i2v-720p").flavor == FLAVORS["i2v-720p"]
    )
    (tmp_path / "config.json").write_text(json.dumps({"ideal_task": "i2v", "ideal_resolution": "720p"}))
    assert identify(plain).flavor.name == "i2v-720p"
    with pytest.raises(CheckpointError, match="'i2v-720p', which does another task than flavor 't2v-480p'"):
        identify(plain, flavor="t2v-480p")
    named = full_size(tmp_path / "480p_t2v" / "model.safetensors", "t2v-480p")
    with pytest.raises(CheckpointError, match="'t2v-480p', which does another task than flavor 'i2v-480p'"):
        identify(named, flavor="i2v-480p")
    steps = full_size(tmp_path / "steps" / "model.safetensors", "i2v-480p-step-distilled")
    assert identify(steps).flavor.name == "i2v-480p-step-distilled"
    with pytest.raises(CheckpointError, match="meanflow False, the file has True.*'i2v-480p-step-distilled'"):
        identify(steps, flavor="i2v-480p")
    with pytest.raises(CheckpointError, match="in_channels 65, the file has 98"):
        identify(full_size(tmp_path / "sr" / "x.safetensors", "sr-720p"), flavor="t2v-480p")
    with pytest.raises(CheckpointError, match=r"not a DiT of hunyuan-video; it looks like HunyuanVideo 1\.5"):
        identify(plain, model="hunyuan-video")


def test_what_a_flavor_cannot_do_is_refused_by_name():
    with pytest.raises(ConfigError, match="cfg_scale is 6, but 'i2v-480p-step-distilled'"):
        Request.of(FLAVORS["i2v-480p-step-distilled"], cfg_scale=6.0)
    with pytest.raises(ConfigError, match="cfg_scale is 6, but 'sr-720p'"):
        Request.of(FLAVORS["sr-720p"], cfg_scale=6.0)
    assert Request.of(FLAVORS["i2v-480p-distilled"], cfg_scale=2.0).guided
    assert lacks(Request.of(FLAVORS["i2v-480p"]), FLAVORS["i2v-480p"]) == ["image"]
    with pytest.raises(ConfigError, match="image is a.png, but 't2v-480p' takes none"):
        Request.of(FLAVORS["t2v-480p"], image="a.png")
    with pytest.raises(ConfigError, match="guidance is 6, but this 't2v-480p' embeds no guidance"):
        Request.of(FLAVORS["t2v-480p"], guidance=6.0)
    with pytest.raises(ConfigError, match="width is 850, expected a multiple of 16"):
        Request.of(FLAVORS["t2v-480p"], width=850)


def test_shards_of_the_older_model_are_refused():
    with pytest.raises(DataError, match="holds latents of 16 channels, flavor 't2v-480p' takes 32"):
        open_shards([str(DATA / "shards_v2")], FLAVORS["t2v-480p"], key="data.shards")


@pytest.mark.parametrize("dialect", ["comfy", "inside", "diffusers"])
@pytest.mark.parametrize("how", ["", "fp8_scaled"])
def test_every_dialect_of_the_same_weights_loads_equal(dialect, how, tmp_path):
    """ComfyUI's q, k and v are one tensor; in float8 each of ours keeps the file's values and factors."""
    state = build(WIDE).state_dict()
    if how:
        scaled = {n: quantize(t, how) for n, t in state.items() if "double_blocks" in n and t.ndim == 2}
        state |= {n: (v.view(*v.shape[:-1], -1, 64).float() * s).view_as(v) for n, (v, s) in scaled.items()}
    theirs = {n: c.of(state).clone() for n, c in SPEC.key_maps[dialect].write(state).items()}
    if how:
        for name in [n for n, t in theirs.items() if "blocks" in n and "refiner" not in n and t.ndim == 2]:
            theirs[name], theirs[name.removesuffix("weight") + "scale_weight"] = quantize(theirs[name], how)
    save_file(theirs, tmp_path / "a.safetensors")
    found = identify(tmp_path / "a.safetensors")
    assert (found.spec.name, found.flavor.name, found.arch, found.dialect) == (
        SPEC.name, "t2v-480p", WIDE, dialect
    )
    model = load_dit(tmp_path / "a.safetensors", dtype=torch.float32).model
    assert all(torch.allclose(t, state[n], rtol=0, atol=1e-7) for n, t in model.state_dict().items())
    if how:
        eight = load_dit(tmp_path / "a.safetensors", dtype=torch.float32, quantize_to="fp8_scaled").model
        assert eight.double_blocks[0].img_attn_k.weight.dtype == torch.float8_e4m3fn
        inp = replace(an_input(WIDE), x=torch.randn(2, 65, 3, 4, 6))
        assert torch.allclose(eight(inp), model(inp), atol=1e-4)


def test_musubi_s_caches_are_read():
    latents, image = torch.randn(32, 3, 4, 6), torch.zeros(33, 3, 4, 6)
    image[:32, 0], image[32, 0] = latents[:, 0], 1
    raw = {"latents_3x4x6_float16": latents.half(), "latents_image_3x4x6_float32": image}
    raw["siglip_float16"] = torch.randn(729, 1152).half()
    found = MUSUBI.latents(raw)
    assert (
        torch.allclose(found["latents"].float(), latents * SCALING, rtol=0.02)
        and math.isclose(SCALING, 1.03682)
    )
    assert found["image_latents"].shape == (32, 1, 4, 6) and found["vision"].shape == (729, 1152)
    # the same scaling
    assert torch.allclose(found["image_latents"][:, 0].float(), found["latents"][:, 0].float(), atol=0.03)
    text = MUSUBI.text(
        {"varlen_vl_embed_bfloat16": torch.randn(9, 3584), "varlen_byt5_embed_float16": torch.zeros(0, 1472)}
    )
    assert text["text"].shape == (9, 3584) and text["glyph"].shape == (0, 1472)
    with pytest.raises(DataError, match="siglip"):
        MUSUBI.latents({k: v for k, v in raw.items() if "siglip" not in k})


def test_its_configs_are_sound():
    files = {"encode": EncodeConfig, "generate": GenerateConfig}
    for path in sorted((DATA.parents[1] / "configs" / "hunyuan_video_15").glob("*.yaml")):
        if path.stem != "model":
            cfg = load(files.get(path.stem, TrainConfig), path)
            assert (
                cfg.model.name == SPEC.name and set(cfg.model.parts) <= set(SPEC.parts)
                and cfg.model.flavor in FLAVORS
            )
