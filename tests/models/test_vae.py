"""The VAE against the official implementation's reference, and every layout that its weights come in."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.models.hunyuan_video.vae import OFF, VaeTiling, build_vae, open_vae, vae_of
from hvtrain.models.hunyuan_video.vae_weights import METADATA_KEY
from hvtrain.models.video_vae import VideoVae, save_vae
from hvtrain.rng import generator
from hvtrain.tiny import clips

DATA = Path(__file__).parents[1] / "data"
ORACLE = DATA / "hunyuan_video_vae.safetensors"
TINY = Path(clips.__file__).parent / "assets" / "vae.safetensors"
SCALE = 0.476986


@pytest.fixture(scope="module")
def oracle() -> dict:
    with safe_open(ORACLE, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        tensors["config"] = json.loads(f.metadata()["config"])
    return tensors


@pytest.fixture(scope="module")
def state(oracle) -> dict:
    return {k.removeprefix("weights."): v for k, v in oracle.items() if k.startswith("weights.")}


@pytest.fixture
def vae(oracle, state) -> VideoVae:
    model = build_vae(oracle["config"])
    model.load_state_dict(state)
    return vae_of(model)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def video(frames: int, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    """Smooth motion with some noise."""
    shape = (batch, 3, frames, height, width)
    coarse = torch.randn(batch, 3, 2 + frames // 8, 3, 3, generator=generator(1))
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="trilinear", align_corners=True)
    return (0.5 * smooth + 0.05 * torch.randn(shape, generator=generator(2))).clamp(-1, 1)


def to_ldm(state: dict) -> dict:
    """LDM names and convolution-shaped attention: the repack's conversion, written the other way around."""
    out = {}
    for key, value in state.items():
        if "attentions" in key and value.ndim == 2:
            value = value.reshape(*value.shape, 1, 1, 1)
        key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        key = key.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        key = key.replace("mid_block.attentions.0.to_", "mid.attn_1.")
        out[key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = value.clone()
    return out


def test_equals_the_official_implementation(vae, oracle):
    latents = vae.encode(oracle["input.video"])
    assert latents.shape == (1, 16, 3, 4, 6)  # 9 frames
    assert relative(latents, oracle["output.latents_mean"] * SCALE) < 1e-5
    frames = vae.decode(oracle["input.latents"] * SCALE, clamp=False)
    assert frames.shape == (1, 3, 5, 32, 48)  # 2 latent frames
    assert relative(frames, oracle["output.video"]) < 1e-5
    assert frames.abs().max() > 1
    assert torch.equal(vae.decode(oracle["input.latents"] * SCALE), frames.clamp(-1, 1))


def test_posterior_sample(vae, oracle):
    x = oracle["input.video"]
    mean, std = oracle["output.latents_mean"] * SCALE, oracle["output.latents_std"] * SCALE
    noise = torch.randn(mean.shape, generator=generator(7))
    assert relative(vae.encode(x, generator=generator(7)), mean + std * noise) < 1e-5
    # One generator per clip: a clip's sample does not depend on its neighbours.
    both = vae.encode(torch.cat([x, x.flip(3)]), generator=[generator(7), generator(8)])
    torch.testing.assert_close(both[1:], vae.encode(x.flip(3), generator=[generator(8)]))
    torch.testing.assert_close(both[:1], vae.encode(x, generator=generator(7)))


def test_full_size_keys_and_shapes():
    with torch.device("meta"):
        model = build_vae()
    rows = [line.split("\t") for line in (DATA / "hunyuan_video_vae.tsv").read_text().splitlines()]
    assert {k: "x".join(map(str, v.shape)) for k, v in model.state_dict().items()} == dict(rows)
    assert sum(p.numel() for p in model.parameters()) == 246_478_803
    assert vae_of(model).scale == SCALE


def write_layout(layout: str, folder: Path, state: dict, config: dict, vae: VideoVae) -> Path:
    state = {k: v.clone() for k, v in state.items()}
    path = folder / "vae.safetensors"
    if layout == "ours":
        save_vae(vae, path, key=METADATA_KEY)
    elif layout == "library directory":
        vae.model.save_pretrained(folder)
        return folder
    else:  # the others say what they are in the official config.json beside them
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLCausal3D"}))
        if layout == "official pt":
            path = folder / "pytorch_model.pt"
            torch.save({"state_dict": {f"vae.{k}": v for k, v in state.items()}}, path)
        elif layout == "bare pt":
            path = folder / "pytorch_model.pt"
            torch.save(state, path)
        else:
            save_file(to_ldm(state) if layout == "LDM" else state, path)
    return path


@pytest.mark.parametrize("layout", ["ours", "official pt", "bare pt", "official", "library directory", "LDM"])
def test_layouts(layout, tmp_path, state, oracle, vae):
    path = write_layout(layout, tmp_path, state, oracle["config"], vae)
    opened = open_vae(path, dtype=torch.float32)
    loaded = opened.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    assert relative(opened.encode(oracle["input.video"]), oracle["output.latents_mean"] * SCALE) < 1e-5
    assert_official_tiles(opened.model)
    assert opened.stride == (4, 8, 8) and opened.channels == 16 and opened.fingerprint
    assert not any(p.requires_grad or p.is_meta for p in opened.model.parameters())


def test_architecture_from_shapes_and_dtype(tmp_path):
    """An official single file without any config: widths, layers and channels are read off its tensors."""
    config = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "latent_channels": 4}
    model = build_vae(config)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    opened = open_vae(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    for key, value in config.items():
        found = opened.model.config[key]
        assert (tuple(found) if isinstance(value, tuple) else found) == value
    assert opened.dtype == torch.bfloat16
    latents = opened.encode(video(5))
    assert latents.dtype == torch.float32 and latents.shape == (1, 4, 2, 4, 6)


def test_the_meta_device_gives_the_dtype_and_the_library_says_nothing(caplog, monkeypatch):
    """As `generate` asks which VAE it is, each time."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    opened = open_vae(TINY, dtype=torch.bfloat16, device="meta")
    assert opened.dtype == torch.bfloat16 and opened.model.device.type == "meta" and not caplog.records


def test_another_scaling_factor_survives_saving(tmp_path, oracle, state):
    model = build_vae({**oracle["config"], "scaling_factor": 0.7})
    model.load_state_dict(state)
    save_vae(model, tmp_path / "a.safetensors", key=METADATA_KEY, dtype=torch.float16)
    opened = open_vae(tmp_path / "a.safetensors", dtype=torch.float32)
    assert relative(opened.encode(oracle["input.video"]), oracle["output.latents_mean"] * 0.7) < 2e-3


def assert_official_tiles(model) -> None:
    assert (model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames) == (64, 48)
    assert (model.tile_sample_min_height, model.tile_sample_min_width) == (256, 256)
    assert (model.tile_sample_stride_height, model.tile_sample_stride_width) == (192, 192)
    assert model.use_tiling and model.use_framewise_encoding and model.use_framewise_decoding
    assert not model.use_slicing


def count_calls(vae: VideoVae, part: str, run) -> int:
    calls = []
    hook = getattr(vae.model, part).register_forward_hook(lambda *_: calls.append(1))
    run()
    hook.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("tiling", "frames", "tiles"),
    [
        (None, 33, 1),
        (None, 61, 1),
        (None, 65, 2),
        (VaeTiling(temporal=0), 65, 1),
        (VaeTiling(temporal=32), 33, 2),
        (OFF, 65, 1),
    ],
)
def test_temporal_tiles(oracle, tiling, frames, tiles):
    """The library alone would cut all of these at 16 frames."""
    vae = vae_of(build_vae(oracle["config"]), tiling=tiling)
    x = video(frames, 16, 16)
    assert count_calls(vae, "encoder", lambda: vae.encode(x)) == tiles
    z = torch.zeros(1, 16, (frames - 1) // 4 + 1, 2, 2)
    assert count_calls(vae, "decoder", lambda: vae.decode(z)) == tiles
    assert vae.encode(x).shape == z.shape and vae.decode(z).shape == x.shape


def test_spatial_tiles_and_slicing(oracle, state, vae):
    x = video(5, 64, 96, batch=2)
    whole = vae.encode(x)
    tiled = vae_of(vae.model, tiling=VaeTiling(spatial=32))
    assert count_calls(tiled, "encoder", lambda: tiled.encode(x)) == 3 * 4  # stride 24
    untiled = vae_of(vae.model, tiling=VaeTiling(spatial=0))
    assert count_calls(untiled, "encoder", lambda: untiled.encode(x)) == 1
    sliced = vae_of(vae.model, tiling=VaeTiling(slicing=True))
    assert count_calls(sliced, "encoder", lambda: sliced.encode(x)) == 2
    torch.testing.assert_close(sliced.encode(x), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sliced.decode(whole), vae_of(vae.model).decode(whole), rtol=1e-4, atol=1e-4)


def test_tiles_are_aligned(oracle, state, vae):
    """Random weights see far beyond a tile, so tiles differ; a tile in a wrong place would share nothing."""
    noise = torch.randn(1, 16, 2, 24, 24, generator=generator(3))
    whole = vae.decode(noise, clamp=False)
    tiled = vae_of(vae.model, tiling=VaeTiling(spatial=128)).decode(noise, clamp=False)
    assert relative(tiled, whole) < 0.2
    noise = torch.randn(1, 16, 12, 6, 8, generator=generator(4))
    whole = vae_of(vae.model).decode(noise, clamp=False)
    tiled = vae_of(vae.model, tiling=VaeTiling(temporal=32)).decode(noise, clamp=False)
    assert relative(tiled, whole) < 0.7


@pytest.mark.parametrize(
    ("tiling", "decibels"), [(VaeTiling(spatial=64, temporal=0), 27), (VaeTiling(spatial=0, temporal=16), 35)]
)
def test_tiled_is_close_to_untiled_with_trained_weights(tiling, decibels):
    """The tiny VAE on a moving shape; tiles far below the official size, so the bounds are loose."""
    clip = clips.Drawing("red", "circle", "left", "gray", seed=3)
    pixels = torch.from_numpy(clips.render(clip, frames=17, height=96, width=128))
    x = pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1
    untiled = open_vae(TINY, dtype=torch.float32, tiling=OFF)
    tiled = open_vae(TINY, dtype=torch.float32, tiling=tiling)
    latents = untiled.encode(x)
    whole = untiled.decode(latents)
    assert count_calls(tiled, "decoder", lambda: tiled.decode(latents)) > 1
    assert psnr(tiled.decode(latents), whole) > decibels
    # Latents from tiles may differ in flat areas, but must mean the same picture.
    assert psnr(untiled.decode(tiled.encode(x)), x) > psnr(whole, x) - 5


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) / 2).pow(2).mean()))


def test_refused_tiles(vae):
    with pytest.raises(ConfigError, match="100 pixels"):
        vae_of(vae.model, tiling=VaeTiling(spatial=100))
    with pytest.raises(ConfigError, match="-16 frames"):
        vae_of(vae.model, tiling=VaeTiling(temporal=-16))


def test_refused_videos(vae):
    with pytest.raises(DataError, match="8 frames.*4n\\+1"):
        vae.encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(DataError, match="20x16.*multiples of 8"):
        vae.encode(torch.zeros(1, 3, 1, 16, 20))
    with pytest.raises(DataError, match=r"\[1, 1, 1, 16, 16\]"):
        vae.encode(torch.zeros(1, 1, 1, 16, 16))
    with pytest.raises(DataError, match=r"\[1, 3, 1, 2, 2\]"):
        vae.decode(torch.zeros(1, 3, 1, 2, 2))


DAMAGE = ("missing", "shape", "unexpected")


def damaged(state: dict, what: str) -> dict:
    state = {k: v.clone() for k, v in state.items()}
    if what == "missing":
        del state["quant_conv.bias"]
    elif what == "shape":
        state["decoder.conv_out.conv.bias"] = torch.zeros(4)
    elif what == "unexpected":
        state["decoder.extra.weight"] = torch.zeros(4)
    elif what == "a DiT":
        state = {"double_blocks.0.img_attn_qkv.weight": torch.zeros(6, 2)}
    elif what == "another VAE":
        state = {"decoder.upsamples.0.residual.0.gamma": torch.zeros(6)}
    return state


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "not a VAE of this architecture: 1 missing: quant_conv.bias$"),
        ("shape", "1 of another shape: decoder.conv_out.conv.bias is 4, expected 3$"),
        ("unexpected", "1 unexpected: decoder.extra.weight$"),
        ("a DiT", "looks like a video DiT"),
        ("another VAE", "VAE of another architecture"),
        ("nothing", "widths \\[8, 8, 16, 16\\] need a config.json"),
    ],
)
def test_wrong_files(what, message, tmp_path, state, oracle):
    metadata = {"hvtrain.vae": json.dumps(oracle["config"])} if what in DAMAGE else {}
    save_file(damaged(state, what), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message) as e:
        open_vae(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(e.value) and "\n" not in str(e.value)


def test_bad_config(tmp_path, oracle, state):
    with pytest.raises(CheckpointError, match="widht"):
        build_vae({**oracle["config"], "widht": 3})
    save_file(state, tmp_path / "a.safetensors")
    for text, message in (("{oops", "config.json: not JSON"), ("[1]", "config.json: expected a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_vae(tmp_path / "a.safetensors")
