"""hvtrain data check and preview; musubi-tuner's caches."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.tiny.data import ClipsRecipe, write_clips
from shards import open_set
from shards.verify import verify


def hvtrain(*arguments):
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


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


def caches(folder, *, n=3, short="hv", full="hunyuan_video"):
    """What musubi-tuner writes, as its source lays it out."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        latents = torch.randn(16, 3, 8, 8, generator=g).half()
        meta = {"architecture": full, "width": "64", "height": "64", "format_version": "1.0.1", "frame_count": "9"}
        name = f"a_clip_{i}_00000-009_0064x0064_{short}.safetensors"
        save_file({"latents_3x8x8_float16": latents}, str(folder / name), metadata=meta)
        mask = torch.zeros(256, dtype=torch.int64)
        mask[: 5 + i] = 1
        text = {
            "llm_float16": torch.randn(256, 4096, generator=g).half(), "llm_mask": mask,
            "clipL_float16": torch.randn(768, generator=g).half(), "clipL_mask": torch.ones(77, dtype=torch.int64),
        }
        meta = {"architecture": full, "caption1": f"clip {i}", "format_version": "1.0.1"}
        save_file(text, str(folder / f"a_clip_{i}_{short}_te.safetensors"), metadata=meta)
    return folder


def test_musubi_caches_become_shards(tmp_path):
    folder = caches(tmp_path / "cache")
    (folder / "a_clip_1_hv_te.safetensors").unlink()
    done = hvtrain("shards", "import-musubi", folder, "--output", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "2 samples of hunyuan-video" in done.stdout and "a_clip_1_hv_te.safetensors is missing" in done.stdout
    found = open_set(tmp_path / "set")
    assert list(verify(tmp_path / "set")) == [] and found.manifest.chunks[0].bucket == "9x64x64"
    from safetensors.torch import load_file

    sample = found.get(1)
    latents = load_file(folder / "a_clip_2_00000-009_0064x0064_hv.safetensors")["latents_3x8x8_float16"]
    text = load_file(folder / "a_clip_2_hv_te.safetensors")
    assert torch.equal(sample.tensors["latents"], (latents.float() * 0.476986).bfloat16())  # scaled, as ours are
    assert torch.equal(sample.tensors["text"], text["llm_float16"][:7].bfloat16())  # without the padding
    assert torch.equal(sample.tensors["pooled"], text["clipL_float16"].bfloat16())
    assert sample.meta["caption"] == "clip 2"
    rejected = [json.loads(line) for line in (tmp_path / "set/rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 1
    done = hvtrain("shards", "import-musubi", folder, "--output", tmp_path / "strict", "--strict")
    assert done.returncode == 2 and "(strict)" in done.stderr


def test_foreign_caches_are_refused_by_name(tmp_path):
    folder = caches(tmp_path / "cache", short="xyz", full="xyz")
    done = hvtrain("shards", "import-musubi", folder, "--output", tmp_path / "set")
    assert done.returncode == 2 and "['xyz'] found; known are 'hv'" in done.stderr
    done = hvtrain("shards", "import-musubi", tmp_path / "none", "--output", tmp_path / "set", "--model", "hunyuan-video")
    assert done.returncode == 2 and "no such directory" in done.stderr
    other = caches(tmp_path / "other", full="wan")
    done = hvtrain("shards", "import-musubi", other, "--output", tmp_path / "set")
    assert done.returncode == 2 and "made for architecture 'wan'" in done.stderr
