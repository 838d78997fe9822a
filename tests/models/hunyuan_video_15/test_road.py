"""A tiny 1.5 with random weights from clips to a merged model, and super-resolution of what it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hvtrain import config
from hvtrain.config import EncodeConfig, GenerateConfig, MergeConfig, TrainConfig
from hvtrain.encode import check
from hvtrain.encode import run as encode
from hvtrain.errors import CheckpointError, ConfigError, DataError
from hvtrain.flow.solvers import State
from hvtrain.generate import run as generate
from hvtrain.generate import spool
from hvtrain.generate.conditions import encode_requests
from hvtrain.generate.requests import Request
from hvtrain.generate.video import read_metadata, write_mp4
from hvtrain.merge import run as merge
from hvtrain.models import find
from hvtrain.models.hunyuan_video_15.upsample import To1080p, open_upsampler
from hvtrain.models.parts import open_vae
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from hvtrain.tiny import clips
from hvtrain.train import run as train
from shards.reader import open_set
from tests.generate.test_run import pixels
from tests.models.hunyuan_video_15.parts import write_dit, write_parts

CAPTIONS = ('a red circle says "hi"', "a red circle", "a sign \u201cX\u201d", "")
SIZE = {"width": 64, "height": 64, "frames": 9, "steps": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("road")


@pytest.fixture(scope="module")
def model(folder: Path) -> dict[str, object]:
    parts = {f"model.{name}": path for name, path in write_parts(folder).items()}
    return {"model.name": "hunyuan-video-15", "model.dtype": "float32", "model.vae_dtype": "float32", **parts}


def loaded(cls: type, *values: dict[str, object]) -> object:
    """None in a later one takes away what an earlier one gives."""
    given = {key: value for part in values for key, value in part.items()}
    return config.load(cls, None, [f"{key}={value}" for key, value in given.items() if value is not None])


def picture(path: Path, color: tuple[int, int, int]) -> Path:
    Image.fromarray(np.full((80, 100, 3), color, np.uint8)).save(path)
    return path


# --- clips to a merged model --------------------------------------------------------------------------------


def test_from_clips_to_a_merged_model(folder: Path, model: dict[str, object]) -> None:
    (folder / "clips").mkdir()
    for i, caption in enumerate(CAPTIONS):
        drawn = clips.Drawing("red", "circle", "left", next(iter(clips.BACKGROUNDS)), seed=i)
        write_mp4(
            folder / f"clips/{i}.mp4", clips.render(drawn, frames=9, height=64, width=64), fps=8, metadata={}
        )
        (folder / f"clips/{i}.txt").write_text(caption)
    dataset = (
        f'[[datasets]]\nvideo_directory = "{folder}/clips"\nresolution = [64, 64]\ntarget_frames = '
        '[9]\nsource_fps = 8.0\n'
    )
    (folder / "data.toml").write_text(dataset)
    report = "\n".join(
        check.lines(
            check.look(str(folder / "data.toml"), model="hunyuan-video-15", flavor="tiny-i2v", workers=1)
        )
    )
    assert "latents 32x3x4x4, 48 tokens" in report and "every clip can be used" in report
    mine = {**model, "model.upsampler": None, "model.flavor": "tiny-i2v"}
    columns = "[latents,text,vision,image]"
    encode.run(
        loaded(
            EncodeConfig, mine,
            {"dataset": folder / "data.toml", "output": folder / "shards", "columns": columns}
        )
    )
    shards = open_set(folder / "shards")
    rows = [shards.get(i).tensors for i in range(4)]
    # A byte a letter, nine around it, and the end.
    assert sorted(len(row["glyph"]) for row in rows) == [0, 0, 1 + 9 + 1, 2 + 9 + 1]
    for row in rows:
        assert row["latents"].shape == (32, 3, 4, 4) and row["image_latents"].shape == (32, 1, 4, 4)
        assert row["vision"].shape == (4, 48) and row["text"].shape[1] == 64 and row["glyph"].shape[1] == 32
    dit = write_dit(folder / "dit.safetensors", "i2v-480p")
    run = {
        "model.dit": dit, "data.shards": f"[{folder}/shards]", "run.output_dir": folder / "run",
        "run.steps": 2, "adapter.rank": 4, "zero.engine": "torch", "run.precision": "fp32",
        "data.caption_dropout": 0.5, "optim.lr": 0.01, "preview.every_steps": 2, "preview.steps": 1,
        "preview.prompts": "[{prompt: a red circle, frames: 9}]",
    }
    train.run(loaded(TrainConfig, mine, run))
    lora = folder / "run/lora.safetensors"
    assert len(list((folder / "run").rglob("*.mp4"))) == 1
    asked = {
        "model.dit": dit, "image": picture(folder / "p.png", (200, 40, 40)), "prompt": 'a sign "hi"',
        "cfg_scale": 6, **SIZE
    }
    plain = {"output": folder / "plain.mp4", **asked}
    (first,) = generate.run(loaded(GenerateConfig, mine, plain))
    (second,) = generate.run(
        loaded(GenerateConfig, mine, asked, {"output": folder / "lora.mp4", "lora": f"[{{path: {lora}}}]"})
    )
    assert pixels(first).shape == (9, 64, 64, 3) and (pixels(first) != pixels(second)).any()
    merge.run(
        loaded(
            MergeConfig, {"dit": dit, "output": folder / "merged.safetensors", "lora": f"[{{path: {lora}}}]"}
        )
    )
    before, after = load_file(dit), load_file(folder / "merged.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    # Nobody reads what the last block makes of the text.
    idle = {f"double_blocks.2.txt_{name}.weight" for name in ("attn_q", "attn_proj", "mlp.fc1", "mlp.fc2")}
    assert changed == {
        name for name, value in before.items() if name.startswith("double_blocks.") and value.ndim == 2
    } - idle


# --- super-resolution ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def low(folder: Path, model: dict[str, object]) -> Path:
    """Latents of 64 x 48 and 9 frames, as save_latents leaves them."""
    dit = write_dit(folder / "small.safetensors", "t2v-480p")
    asked = {
        **SIZE, "height": 48, "model.dit": dit, "prompt": "a red circle", "output": folder / "small.mp4",
        "cfg_scale": 1
    }
    generate.run(loaded(GenerateConfig, model, asked, {"save_latents": True}))
    return folder / "small.latents.safetensors"


@pytest.fixture(scope="module")
def sr(folder: Path, model: dict[str, object]) -> dict[str, object]:
    dit = write_dit(folder / "sr.safetensors", "sr-720p")
    return {
        **model, "model.dit": dit, "prompt": "a red circle", "width": 96, "height": 80, "frames": 9,
        "precision": "fp32"
    }


def test_super_resolution_begins_with_the_upsampled_latents(
    low: Path, model: dict[str, object], folder: Path
) -> None:
    spec, flavor = find("hunyuan-video-15"), find("hunyuan-video-15").flavor("sr-720p")
    assert (flavor.defaults.steps, flavor.defaults.shift, flavor.defaults.cfg_scale) == (6, 2.0, 1.0)
    assert (spec.flavor("sr-1080p").defaults.steps, spec.flavor("sr-1080p").defaults.shift) == (8, 2.0)
    tiny = spec.fitted(flavor, spec.flavor("tiny").arch)
    given = {"width": 96, "height": 80, "frames": 9, "seed": 3, "video": str(low)}
    requests = [Request.of(tiny, prompt="a", **given), Request.of(tiny, prompt="b", **{**given, "seed": 4})]
    files = {key.removeprefix("model."): str(value) for key, value in model.items() if key != "model.name"}
    models = config.ModelConfig(
        name=spec.name, **{k: v for k, v in files.items() if k in ("vae", "dtype", "vae_dtype")},
        parts={k: v for k, v in files.items() if k in spec.parts and k != "vae"}
    )  # fmt: skip
    conds = encode_requests(requests, spec, tiny, models, ParallelContext())
    latents = load_file(low)["latents"]
    large = open_upsampler(files["upsampler"])(latents[None], (5, 6))
    for request, seed in zip(requests, (3, 4), strict=True):
        cond = conds.of(request)
        noise = torch.randn(32, 3, 5, 6, generator=generator(seed, stream="low"))
        torch.testing.assert_close(cond["low_latents"], 0.3 * large + 0.7 * noise)
        assert "vision" not in cond and "image_latents" not in cond  # no image was given
    # From pixels: what the VAE makes of the file.
    (pixel,) = (Request.of(tiny, prompt="a", **{**given, "video": str(folder / "small.mp4")}),)
    cond = encode_requests([pixel], spec, tiny, models, ParallelContext()).of(pixel)
    vae = open_vae(spec, models, "cpu")
    video = torch.from_numpy(pixels(folder / "small.mp4")).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    large = open_upsampler(files["upsampler"])(vae.encode(video), (5, 6))
    noise = torch.randn(32, 3, 5, 6, generator=generator(3, stream="low"))
    torch.testing.assert_close(cond["low_latents"], 0.3 * large + 0.7 * noise)


def test_super_resolution_makes_a_larger_video(low: Path, sr: dict[str, object], folder: Path) -> None:
    (plain,) = generate.run(loaded(GenerateConfig, sr, {"video": low, "output": folder / "large.mp4"}))
    assert pixels(plain).shape == (9, 80, 96, 3)
    about = read_metadata(plain)
    assert (about["video"], about["flavor"], about["steps"]) == (low.name, "sr-720p", 6)
    # In one prompt file: with an image or not, from latents or pixels, in batches of what belongs together.
    image = picture(folder / "q.png", (30, 200, 40))
    lines = [f"a --v {low} --d 0", f"a --v {low} --i {image} --d 0", f"a --v {folder / 'small.mp4'} --d 0"]
    (folder / "prompts.txt").write_text("\n".join(lines))
    many = {
        "prompt": None, "prompt_file": folder / "prompts.txt", "output": folder / "many", "batch_size": 2,
        "steps": 1
    }
    made = [pixels(path) for path in generate.run(loaded(GenerateConfig, sr, many))]
    assert all(frames.shape == (9, 80, 96, 3) for frames in made)
    assert (made[0] != made[1]).any() and (made[0] != made[2]).any()


def test_wrong_super_resolution_is_named(low: Path, sr: dict[str, object], folder: Path) -> None:
    def refused(message: str, error: type = ConfigError, **changes: object) -> None:
        values = {
            "video": low, "output": folder / "no.mp4",
            **{key.replace("__", "."): v for key, v in changes.items()}
        }
        with pytest.raises(error, match=message):
            generate.run(loaded(GenerateConfig, {**sr, **values}))

    refused("video: 'sr-720p' enlarges a video; give video=FILE, or --v FILE", video=None)
    refused("video: .*absent.mp4 does not exist", video=folder / "absent.mp4")
    refused("small.latents.safetensors has 9 frames, but frames is 13: give frames=9", frames=13)
    refused("small.mp4 has 9 frames, but frames is 13: give frames=9", video=folder / "small.mp4", frames=13)
    refused("is 64x48, no smaller than the 64x48 that 'sr-720p' shall make of it", width=64, height=48)
    refused("model.upsampler is not set; 'sr-720p' begins with it", model__upsampler=None)
    refused("but 't2v-480p' enlarges none", model__dit=folder / "small.safetensors")
    refused("not a file of latents that save_latents kept", DataError, video=folder / "vae.safetensors")
    other = folder / "other.mp4"
    spool.keep(
        other, State(torch.zeros(16, 3, 4, 4), 1), identity="",
        parameters={"model": "hunyuan-video", "steps": 1}
    )
    refused("holds latents of hunyuan-video, expected those of hunyuan-video-15", video=spool.hidden(other))
    spool.keep(
        other, State(torch.zeros(32, 3, 4, 4), 1), identity="",
        parameters={"model": "hunyuan-video-15", "steps": 2}
    )
    refused("those after step 1 of 2: not finished", DataError, video=spool.hidden(other))
    save_file(To1080p(channels=32, widths=(32, 32), n_blocks=1).state_dict(), folder / "up.safetensors")
    refused("up.safetensors is that of sr-1080p", CheckpointError, model__upsampler=folder / "up.safetensors")
    assert not (folder / "no.mp4").exists()
