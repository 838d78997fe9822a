"""Clips for image to video: text encoders that see the image, an image that is not the clip's
own, a model's prompt prefix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hvtrain.config import EncodeConfig, asset, load
from hvtrain.encode import run as encode
from hvtrain.encode.clips import Rejected, find_clips
from hvtrain.encode.dataset import read_dataset_file
from hvtrain.encode.media import read_frames
from hvtrain.errors import ConfigError, DataError
from hvtrain.models import find
from hvtrain.models.hunyuan_video.text import open_text
from hvtrain.tiny.data import ClipsRecipe, write_clips
from shards import ShardSet, open_set
from shards.loader import BatchLoader
from tests.models.sight import save_sight

CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "encode.yaml"
SPEC = find("hunyuan-video")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two clips, a listing that gives the first an image of its own, and one of
    directories that gives both."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(ClipsRecipe(output=str(folder / "clips"), n=2, seed=3))
    (folder / "images").mkdir()
    for i, color in enumerate([(250, 30, 30), (30, 30, 250)]):
        Image.new("RGB", (96, 64), color).save(folder / f"images/clip_0000{i}.png")
    rows = [{"video_path": f"clips/clip_0000{i}.mp4", "caption": f"ball {i}"} for i in range(2)]
    rows[0]["image_path"] = "images/clip_00000.png"
    (folder / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "[general]\nresolution = [64, 64]\n[[datasets]]\ntarget_frames = [9]\n"
    (folder / "l.toml").write_text(head + "video_jsonl_file = 'l.jsonl'\n")
    (folder / "d.toml").write_text(head + "video_directory = 'clips'\nimage_directory = 'images'\n")
    save_sight(folder / "vision.safetensors")
    return folder


def run(folder: Path, dataset: str, output: Path, *more: str, vision: bool = True) -> ShardSet:
    items = [f"dataset={folder / dataset}", f"output={output}", "model.flavor=i2v", "model.vae_dtype=float32",
             "model.dtype=float32", "dtype=float32", *more]
    items += [f"model.llm_vision={folder / 'vision.safetensors'}"] if vision else []
    encode.run(load(EncodeConfig, CONFIG, items))
    return open_set(output)


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(
        read_frames(path, [0], size=(64, 64))[0].copy()
    ).permute(2, 0, 1).float() / 127.5 - 1


def test_each_caption_is_read_beside_its_image(folder, tmp_path, capsys):
    found = run(folder, "l.toml", tmp_path / "out", "columns=[latents,image,text]")
    text = open_text(
        {
            "llm": asset("tiny:llm"), "clip": asset("tiny:clip"),
            "llm_vision": str(folder / "vision.safetensors")
        },
        dtype=torch.float32, sees=4,
    )
    # the other has its first frame
    shown = [folder / "images/clip_00000.png", folder / "clips/clip_00001.mp4"]
    of = {s.meta["caption"]: s for s in map(found.get, range(2))}
    for i, path in enumerate(shown):
        sample = of[f"ball {i}"]
        (wanted,) = text.encode([f"ball {i}"], [pixels(path)])
        for name, value in wanted.items():
            torch.testing.assert_close(sample.tensors[name], value)
    assert of["ball 0"].meta["image"] == str(shown[0]) and "image" not in of["ball 1"].meta
    torch.testing.assert_close(found.empty_text["seen_text"], text.encode([""])[0]["seen_text"])
    # The first frame's latents are the image's: nearly the clip's own where there is none,
    # something else where there is one.
    near = [
        (s.tensors["image_latents"] - s.tensors["latents"][:, :1]).norm()
        / s.tensors["latents"][:, :1].norm() for s in (of["ball 0"], of["ball 1"])
    ]
    assert near[0] > 0.7 and near[1] < 0.3, near
    batch = next(iter(BatchLoader(found, batch_size=2)))
    assert batch.tensors["seen_text_len"].tolist() == [len(batch.tensors["seen_text"][0])] * 2
    capsys.readouterr()
    Image.new("RGB", (96, 64), (20, 240, 30)).save(tmp_path / "green.png")
    listing = (folder / "l.jsonl").read_text().replace("images/clip_00000.png", str(tmp_path / "green.png"))
    (folder / "l2.jsonl").write_text(listing)
    (folder / "l2.toml").write_text((folder / "l.toml").read_text().replace("l.jsonl", "l2.jsonl"))
    run(folder, "l2.toml", tmp_path / "out", "columns=[latents,image,text]")
    said = capsys.readouterr().out
    assert "image: 1 encoded, 0 copied, 1 kept; text: 1 encoded, 0 copied, 1 kept" in said


def test_what_is_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hvtrain.encode.columns.open_vae", lambda *_: pytest.fail("the VAE was read"))
    with pytest.raises(ConfigError, match="model.llm_vision is not set, and .* holds no vision tower"):
        run(folder, "l.toml", tmp_path / "a", vision=False)
    with pytest.raises(
        DataError, match=r"clip_00000.mp4: comes with .*clip_00000.png, of which column 'image' is made"
    ):
        run(folder, "l.toml", tmp_path / "b", "columns=[latents,text]")
    wan = find("wan").flavor("flf2v-14b")
    with pytest.raises(
        DataError,
        match="image_directory: 'flf2v-14b' takes first and last frame, those of the clip; remove it"
    ):
        read_dataset_file(folder / "d.toml", wan)


def test_images_in_a_directory_have_the_clips_names(folder, tmp_path):
    (entry,) = read_dataset_file(folder / "d.toml", SPEC.flavor("i2v"))
    clips = find_clips(entry)
    assert [clip.image for clip in clips] == [folder / f"images/clip_0000{i}.png" for i in range(2)]
    write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=3, seed=3))
    text = (folder / "d.toml").read_text().replace("'images'", f"'{folder / 'images'}'")
    (tmp_path / "d.toml").write_text(text)
    (entry,) = read_dataset_file(tmp_path / "d.toml", SPEC.flavor("i2v"))
    last = find_clips(entry)[2]
    assert (
        isinstance(last, Rejected) and "has no image in" in last.reason
        and "expected clip_00002.png" in last.reason
    )


def test_captions_begin_as_the_models_prompts_do(folder, tmp_path):
    """Once, and unless the dataset has a prefix of its own."""

    def captions(text: str, flavor: str) -> list[str]:
        (folder / "p.toml").write_text(text)
        (entry,) = read_dataset_file(folder / "p.toml", SPEC.flavor(flavor))
        return [clip.captions[0] for clip in find_clips(entry)]

    rows = [
        {"video_path": f"clips/clip_0000{i}.mp4", "caption": c} for i,
        c in enumerate(["a ball", "FPS-24, a ring"])
    ]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "[[datasets]]\nvideo_jsonl_file = 'p.jsonl'\ntarget_frames = [9]\n"
    assert captions(text, "skyreels-v1-t2v") == ["FPS-24, a ball", "FPS-24, a ring"]
    assert captions(text, "t2v") == ["a ball", "FPS-24, a ring"]
    assert captions(text + "caption_prefix = ''\n", "skyreels-v1-i2v") == ["a ball", "FPS-24, a ring"]
    assert captions(text + "caption_prefix = 'x '\n", "skyreels-v1-i2v") == ["x a ball", "x FPS-24, a ring"]
