"""hvtrain data check and preview; musubi-tuner's caches."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hvtrain.encode import check, contact, musubi
from hvtrain.models import find
from hvtrain.tiny.data import ClipsRecipe, write_clips
from hvtrain.train.data import open_shards
from shards import open_set
from shards.verify import verify
from tests.encode.test_view import corners, quarters, write_clip
from tests.typed import hvtrain


@pytest.fixture
def dataset(tmp_path):
    path = write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=6, seed=3))
    (tmp_path / "clips/clip_00000.mp4").write_bytes(b"junk")
    (tmp_path / "clips/clip_00001.txt").unlink()
    (tmp_path / "clips/clip_00002.txt").write_text("<b>bold</b> & wide")
    path.write_text(path.read_text().replace("[9]", "[5, 9]").replace('"head"', '"chunk"'))
    return path


def test_check_counts_and_names_what_is_wrong(dataset):
    done = hvtrain("data", "check", dataset)
    out = done.stdout
    assert done.returncode == 1, done.stderr  # some clips cannot be used
    assert "bucket 5x64x64 (frames x height x width): 4 samples" in out and "bucket 9x64x64" in out
    assert "6 clips, 8 samples, 80 % of 45 frames are used" in out or "8 samples, 100 % of 36 frames" in out
    assert "clip_00000.mp4: cannot be decoded" in out and "clip_00001.mp4: has no caption" in out
    # 4 samples of 16x2x8x8 and 4 of 16x3x8x8, two bytes each
    assert "about 40.0 KiB of latents" in out and "largest sample: latents 16x3x8x8, 48 tokens" in out
    done = hvtrain("data", "check", dataset, "--flavor", "nothing")
    assert done.returncode == 2 and "no flavor 'nothing'" in done.stderr


def test_preview_shows_pictures_and_escaped_captions(dataset, tmp_path):
    page = tmp_path / "page.html"
    done = hvtrain("data", "preview", dataset, "--output", page, "--max", 20)
    assert done.returncode == 0 and "8 of 8 samples" in done.stdout, done.stderr
    text = page.read_text()
    assert text.count("<figure>") == 8 and len(re.findall("data:image/jpeg;base64,", text)) == 24
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; wide" in text and "<b>bold" not in text
    done = hvtrain("data", "preview", dataset, "--output", tmp_path / "no/such/page.html")
    assert done.returncode == 2 and "cannot be written" in done.stderr
    done = hvtrain("data", "preview", dataset, "--output", dataset)  # never over what is no page
    assert (
        done.returncode == 2 and "expected a page to write" in done.stderr
        and "[general]" in dataset.read_text()
    )


def images(tmp_path, general, *captions, size=(64, 48)):
    """A dataset of pictures with these captions."""
    for i, caption in enumerate(captions):
        Image.new("RGB", size, (9 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    (tmp_path / "d.toml").write_text(f"[general]\n{general}\n[[datasets]]\nimage_directory = '.'\n")
    return tmp_path / "d.toml"


def checked(dataset):
    return list(check.lines(check.look(str(dataset), model=None, flavor=None, workers=2)))


def test_check_warns_of_enlarged_pictures_and_of_more_tokens_than_any_model_was_made_for(tmp_path):
    small = checked(images(tmp_path, "resolution = 512", "a", "b"))
    assert (
        f"warning: 2 clips enlarged to more than 1.5 times, most {tmp_path}/0.png (64 x 48 to 512 x 512); "
        "lower resolution, " "or bucket_no_upscale = true"
    ) in small
    assert (
        small[-1] == "every clip can be used, but see the warnings"
        and not any("tokens in" in x for x in small)
    )
    # 8192 / 16 squared; 1280 x 720 x 129 frames are 33 x 45 x 80 tokens.
    large = checked(images(tmp_path, "resolution = 8192", "a", "b"))
    assert any(
        x.startswith("warning: 262144 tokens in the largest sample; the largest video of the model's authors "
        "has 118800") for x in large
    )
    assert checked(images(tmp_path, "resolution = [96, 64]", "a", "b"))[-1] == "every clip can be used"


def test_check_warns_of_captions_that_are_cut_and_preview_shows_their_beginning(tmp_path):
    dataset = images(tmp_path, "resolution = 64", "r" * 1025, "r" * 1024, "", size=(64, 64))
    found = checked(dataset)
    assert (
        f"warning: 1 sample with a caption above 1024 letters, first {tmp_path}/0.png (1025): the encoder "
        "reads 256 tokens, " "about 1024 letters, and cuts the rest off"
    ) in found
    assert f"warning: 1 sample with an empty caption, first {tmp_path}/2.png" in found
    report = check.look(str(dataset), model=None, flavor=None, workers=2)
    contact.write(report.samples, tmp_path / "p.html", n=9, workers=1)
    page = (tmp_path / "p.html").read_text()
    assert "r" * 1000 + " <i>… 1025 letters</i>" in page and "r" * 1001 not in page


def test_clips_too_short_for_a_target_are_counted(tmp_path):
    dataset = write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=2, seed=3))  # 9 frames each
    dataset.write_text(dataset.read_text().replace("[9]", "[5, 9, 33]"))
    found = checked(dataset)
    assert (
        "  2 clips too short for target_frames 33, used for the lower ones" in found
        and found[-1] == "every clip can be used"
    )
    assert not any("target_frames 9" in line for line in found)
    dataset.write_text(dataset.read_text().replace("[5, 9, 33]", "[33]"))
    found = checked(dataset)
    assert (
        "2 clips cannot be used:" in found
        and sum("9 frames, target_frames asks for 33 or more" in x for x in found) == 2
    )


def test_preview_shows_a_turned_clip_the_right_way_up(tmp_path):
    write_clip(tmp_path / "a.mp4", [quarters()] * 3, matrix=(0, 1, -1, 0))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "d.toml").write_text(
        "[general]\nresolution = 64\nenable_bucket = true\n[[datasets]]\nvideo_directory = '.'\n"
    )
    report = check.look(str(tmp_path / "d.toml"), model=None, flavor=None, workers=2)
    contact.write(report.samples, tmp_path / "p.html", n=9, workers=1)
    (jpeg,) = re.findall("data:image/jpeg;base64,([^\"]+)", (tmp_path / "p.html").read_text())
    picture = Image.open(io.BytesIO(base64.b64decode(jpeg)))
    assert picture.size == (48, 80) and corners(np.asarray(picture)) == "brwg"


def caches(folder, *, n=3, short="hv", full="hunyuan_video"):
    """What musubi-tuner writes, as its source lays it out."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        latents = torch.randn(16, 3, 8, 8, generator=g).half()
        meta = {
            "architecture": full, "width": "64", "height": "64", "format_version": "1.0.1", "frame_count": "9"
        }
        name = f"a_clip_{i}_00000-009_0064x0064_{short}.safetensors"
        save_file({"latents_3x8x8_float16": latents}, str(folder / name), metadata=meta)
        mask = torch.zeros(256, dtype=torch.int64)
        mask[: 5 + i] = 1
        text = {
            "llm_float16": torch.randn(256, 4096, generator=g).half(), "llm_mask": mask,
            "clipL_float16": torch.randn(768, generator=g).half(),
            "clipL_mask": torch.ones(77, dtype=torch.int64),
        }
        meta = {"architecture": full, "caption1": f"clip {i}", "format_version": "1.0.1"}
        save_file(text, str(folder / f"a_clip_{i}_{short}_te.safetensors"), metadata=meta)
    return folder


def test_musubi_caches_become_shards(tmp_path):
    folder = caches(tmp_path / "cache")
    (folder / "a_clip_1_hv_te.safetensors").unlink()
    done = hvtrain("shards", "import-musubi", folder, "--output", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert (
        "2 samples of hunyuan-video" in done.stdout and "a_clip_1_hv_te.safetensors is missing" in done.stdout
    )
    found = open_set(tmp_path / "set")
    assert list(verify(tmp_path / "set")) == [] and found.manifest.chunks[0].bucket == "9x64x64"
    from safetensors.torch import load_file

    sample = found.get(1)
    latents = load_file(folder / "a_clip_2_00000-009_0064x0064_hv.safetensors")["latents_3x8x8_float16"]
    text = load_file(folder / "a_clip_2_hv_te.safetensors")
    # scaled, as ours are
    assert torch.equal(sample.tensors["latents"], (latents.float() * 0.476986).bfloat16())
    assert torch.equal(sample.tensors["text"], text["llm_float16"][:7].bfloat16())  # without the padding
    assert torch.equal(sample.tensors["pooled"], text["clipL_float16"].bfloat16())
    assert sample.meta["caption"] == "clip 2"
    rejected = [json.loads(line) for line in (tmp_path / "set/rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 1
    done = hvtrain("shards", "import-musubi", folder, "--output", tmp_path / "strict", "--strict")
    assert done.returncode == 2 and "(strict)" in done.stderr


@pytest.mark.parametrize(("image", "flavor"), [(False, "t2v-14b"), (True, "i2v-14b-480p")])
def test_wan_s_caches_become_shards(tmp_path, image, flavor):
    """Latents are the model's own already; of an image's, the mask comes first and is left out."""
    folder, g = tmp_path / "cache", torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {"latents_3x8x8_bfloat16": torch.randn(16, 3, 8, 8, generator=g).bfloat16()}
    if image:
        tensors["latents_image_3x8x8_bfloat16"] = torch.randn(20, 3, 8, 8, generator=g).bfloat16()
        tensors["clip_bfloat16"] = torch.randn(257, 1280, generator=g).half()
    save_file(tensors, folder / "cat_00000-009_0064x0064_wan.safetensors", metadata={"architecture": "wan"})
    words = {"varlen_t5_bfloat16": torch.randn(7, 4096, generator=g).bfloat16()}
    save_file(words, folder / "cat_wan_te.safetensors", metadata={"architecture": "wan", "caption1": "a cat"})
    said = "\n".join(
        musubi.run([str(folder)], str(tmp_path / "set"), model=None, samples_per_tar=4, strict=True)
    )
    found = open_set(tmp_path / "set")
    assert f"1 samples of wan {flavor}" in said and found.manifest.chunks[0].bucket == "9x64x64"
    sample = found.get(0).tensors
    assert torch.equal(sample["latents"], tensors["latents_3x8x8_bfloat16"])
    assert torch.equal(sample["text"], words["varlen_t5_bfloat16"])
    if image:
        assert torch.equal(sample["image_latents"], tensors["latents_image_3x8x8_bfloat16"][4:])
        assert torch.equal(sample["clip"], tensors["clip_bfloat16"].bfloat16())
        # what training compares
        open_shards([str(tmp_path / "set")], find("wan").flavors[flavor], key="data.shards")
        again = musubi.run(
            [str(folder)], str(tmp_path / "b"), model="wan", samples_per_tar=4, strict=True,
            flavor="i2v-14b-720p"
        )
        assert "wan i2v-14b-720p" in "\n".join(again)


def test_foreign_caches_are_refused_by_name(tmp_path):
    folder = caches(tmp_path / "cache", short="xyz", full="xyz")
    done = hvtrain("shards", "import-musubi", folder, "--output", tmp_path / "set")
    assert done.returncode == 2 and "['xyz'] found; known are 'hv'" in done.stderr
    done = hvtrain(
        "shards", "import-musubi", tmp_path / "none", "--output", tmp_path / "set", "--model", "hunyuan-video"
    )
    assert done.returncode == 2 and "no such directory" in done.stderr
    other = caches(tmp_path / "other", full="wan")
    done = hvtrain("shards", "import-musubi", other, "--output", tmp_path / "set")
    assert done.returncode == 2 and "made for architecture 'wan'" in done.stderr
