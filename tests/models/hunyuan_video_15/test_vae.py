"""The VAE of 1.5 against diffusers' own class: whole, in tiles, a frame at a time, and from
every layout of its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15
from safetensors.torch import load_file, save_file

from hvtrain.config import VaeTilingConfig
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.models.hunyuan_video_15.vae import METADATA_KEY, OFF, build_vae, open_vae, sizes_of, vae_of
from hvtrain.models.hunyuan_video_15.vae_model import CausalConv
from hvtrain.models.video_vae import VideoVae, save_vae
from hvtrain.rng import generator
from hvtrain.weights.source import shapes_of

DATA = Path(__file__).parents[2] / "data"
SIZES = {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32, 32), "layers_per_block": 1}
SCALE = 1.03682


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def library() -> AutoencoderKLHunyuanVideo15:
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo15(**SIZES).eval().requires_grad_(False)


def official(name: str) -> str:
    """The renaming of the conversion script, written for this test."""
    name = re.sub(r"\b(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3", name)
    name = re.sub(r"\b(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\1sample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.to_", "mid.attn_1.").replace(
        "mid_block.attentions.0", "mid.attn_1"
    )
    return name.replace("conv_shortcut", "nin_shortcut")


@pytest.fixture(scope="module")
def state(library) -> dict:
    return {official(name): value for name, value in library.state_dict().items()}


def opened(state: dict, tiling: VaeTilingConfig | None = OFF) -> VideoVae:
    model = build_vae(SIZES)
    model.load_state_dict(state)
    return vae_of(model, tiling=tiling)


def video(frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=generator(frames + width)).clamp(-1, 1)


def latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, height, width, generator=generator(frames + 10 * width))


def test_equals_the_library(library, state):
    vae = opened(state)
    x, z = video(9, 32, 48), latents(3, 3, 2)
    posterior = library.encode(x).latent_dist
    assert vae.encode(x).shape == (1, 4, 3, 2, 3)
    assert relative(vae.encode(x), posterior.mean * SCALE) < 1e-5
    noise = torch.randn(posterior.mean.shape, generator=generator(7))
    assert relative(
        vae.encode(x, generator=generator(7)), (posterior.mean + posterior.std * noise) * SCALE
    ) < 1e-5
    frames = vae.decode(z * SCALE, clamp=False)
    assert frames.shape == (1, 3, 9, 48, 32)
    assert relative(frames, library.decode(z).sample) < 1e-5
    assert relative(vae.encode(x[:, :, :1]), library.encode(x[:, :, :1]).latent_dist.mean * SCALE) < 1e-5


# pixels of the picture; side of the tiles; their official overlap
@pytest.mark.parametrize(
    ("height", "width", "side", "overlap"), [(112, 160, 64, 0.25), (64, 480, 256, 0.125)]
)
def test_tiles_are_the_official_ones(library, state, height, width, side, overlap):
    vae = opened(state, VaeTilingConfig(spatial=side))
    x, z = video(5, height, width), latents(1, height // 16, width // 16)
    whole = opened(state).encode(x)
    library.enable_tiling(side, side, side // 16, side // 16, overlap)
    wanted, frames = library.encode(x).latent_dist.mean, library.decode(z).sample
    library.use_tiling = False
    assert relative(vae.encode(x), wanted * SCALE) < 1e-5
    assert relative(whole, wanted * SCALE) > 1e-3  # tiles do change something
    assert relative(vae.decode(z * SCALE, clamp=False), frames) < 1e-5


def test_a_frame_at_a_time_is_the_same_as_all_at_once(state):
    model = build_vae(SIZES).requires_grad_(False)
    model.load_state_dict(state)
    x, z = video(13, 32, 32), latents(4, 2, 2)
    whole, frames = model.encoder(x), model.decoder(z)
    lengths = []
    for module in model.modules():
        if isinstance(module, CausalConv):
            module.register_forward_hook(lambda module, args, out: lengths.append(out.shape[2]))
    assert relative(model.moments(x), whole) < 5e-6  # rounding: other kernels for other sizes
    assert relative(model.frames(z), frames) < 5e-6
    assert max(lengths) == 4  # pieces: memory does not grow with the length
    # Causal: what comes later changes nothing before.
    changed = torch.cat([x[:, :, :9], x[:, :, 9:].flip(3)], dim=2)
    assert torch.equal(model.moments(changed)[:, :, :3], model.moments(x)[:, :, :3])
    assert not torch.equal(model.moments(changed)[:, :, 3:], model.moments(x)[:, :, 3:])


def test_slicing_and_half_precision(state):
    x = video(5, 32, 32, batch=2)
    whole = opened(state).encode(x)
    assert relative(opened(state, VaeTilingConfig(slicing=True)).encode(x), whole) < 5e-6
    model = build_vae(SIZES)
    model.load_state_dict(state)
    half = vae_of(model.bfloat16()).encode(x)
    assert half.dtype == torch.float32 and 1e-4 < relative(half, whole) < 0.05


def test_full_size_keys_and_shapes():
    with torch.device("meta"):
        model = build_vae()
    rows = dict(line.split("\t") for line in (DATA / "hunyuan_video_15_vae.tsv").read_text().splitlines())
    assert {k: "x".join(map(str, v.shape)) for k, v in model.state_dict().items()} == rows
    assert sum(p.numel() for p in model.parameters()) == 1_260_634_115
    vae = vae_of(model)
    assert (vae.scale, vae.channels, vae.stride) == (SCALE, 32, (4, 16, 16))
    assert build_vae(
        {**sizes_of(shapes_of(model), "x"), **SIZES}
    ).config["block_out_channels"] == (16, 16, 32, 32, 32)
    with torch.device("meta"):
        assert shapes_of(build_vae(sizes_of(shapes_of(model), "x"))) == shapes_of(model)


def write_layout(layout: str, folder: Path, library, state: dict) -> Path:
    path = folder / "vae.safetensors"
    if layout == "ours":
        save_vae(opened(state), path, key=METADATA_KEY)
    elif layout == "library directory":
        library.save_pretrained(folder)
        return folder
    elif layout == "official directory":
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(
            json.dumps({"_class_name": "AutoencoderKLConv3D", "scaling_factor": 0.5})
        )
        return folder
    elif layout == "pt":
        path = folder / "vae.pt"
        torch.save({"state_dict": {f"vae.{k}": v for k, v in state.items()}}, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.parametrize("layout", ["ours", "library directory", "official directory", "pt", "bare file"])
def test_layouts(layout, tmp_path, library, state):
    vae = open_vae(write_layout(layout, tmp_path, library, state), dtype=torch.float32)
    loaded = vae.model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], v) for k, v in state.items())
    assert vae.scale == (0.5 if layout == "official directory" else SCALE)  # its config says another
    assert vae.stride == (4, 16, 16) and vae.channels == 4 and vae.fingerprint
    assert not any(p.requires_grad or p.is_meta for p in vae.model.parameters())


def test_bad_input(tmp_path, state):
    with pytest.raises(
        ConfigError,
        match=r"spatial is 100, expected 0 \(off\), 64, 128, 192, or a multiple of 128 from 256 on"
    ):
        opened(state, VaeTilingConfig(spatial=100))
    with pytest.raises(ConfigError, match="spatial is 320"):  # an eighth of 20 latents is no whole number
        opened(state, VaeTilingConfig(spatial=320))
    opened(state, VaeTilingConfig(spatial=384))
    with pytest.raises(DataError, match=r"must be 4n\+1"):
        opened(state).encode(video(8, 32, 32))
    with pytest.raises(DataError, match="multiples of 16"):
        opened(state).encode(video(5, 24, 32))
    with pytest.raises(
        CheckpointError, match="not a VAE of this architecture: no 'encoder.conv_in.conv.weight'"
    ):
        save_file({"double_blocks.0.x": torch.zeros(2)}, tmp_path / "dit.safetensors")
        open_vae(tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: decoder.mid.attn_1.k.bias"):
        save_file(
            {k: v for k, v in state.items() if k != "decoder.mid.attn_1.k.bias"},
            tmp_path / "part.safetensors"
        )
        open_vae(tmp_path / "part.safetensors")
    # HunyuanVideo's has the same names.
    tensors = load_file(DATA / "hunyuan_video_vae.safetensors")
    other = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    with pytest.raises(CheckpointError, match="not a VAE of this architecture"):
        save_file(other, tmp_path / "other.safetensors")
        open_vae(tmp_path / "other.safetensors")
