"""A model that shares nothing with the others is encoded by what its record says: tests/strange."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hvtrain.config import EncodeConfig, ModelConfig, load
from hvtrain.encode import check
from hvtrain.encode import run as encode
from hvtrain.encode.columns import kind_of
from hvtrain.encode.encoders import Latents, Looks, Shot
from hvtrain.encode.media import read_frames
from hvtrain.errors import ConfigError, DataError
from hvtrain.models import find
from hvtrain.tiny.data import ClipsRecipe, write_clips
from hvtrain.train.data import check_encoders
from shards import open_set
from shards.loader import BatchLoader
from shards.schema import Stored
from shards.verify import verify
from tests.strange import discovered

CAPTIONS = [
    "a red ball", 'a sign "go" here', "one", 'so many words that the last of them are cut off by it "ab" "cd"'
]


@pytest.fixture(scope="module", autouse=True)
def strange():
    with discovered():
        yield find("strange")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model's parts and a dataset of four clips."""
    folder = tmp_path_factory.mktemp("strange")
    g = torch.Generator().manual_seed(0)
    shapes = {
        "vae": ("strange_vae.mix", 48, 48), "words": ("strange_words", 64, 24),
        "letters": ("strange_letters", 32, 16), "eye": ("strange_eye", 3, 20)
    }
    for part, (name, *shape) in shapes.items():
        save_file({name: torch.randn(shape, generator=g)}, str(folder / f"{part}.safetensors"))
    write_clips(ClipsRecipe(output=str(folder / "clips"), n=4, seed=3))
    for i, caption in enumerate(CAPTIONS):
        (folder / f"clips/clip_0000{i}.txt").write_text(caption)
    text = "[general]\nresolution = [96, 64]\n[[datasets]]\nvideo_directory = 'clips'\ntarget_frames = [9]\n"
    (folder / "d.toml").write_text(text)
    return folder


def items(files, output, *more):
    parts = [f"model.{part}={files / part}.safetensors" for part in ("vae", "words", "letters", "eye")]
    return [
        "model.name=strange", "model.dtype=float32", "model.vae_dtype=float32", "model.flavor=pair", *parts,
        f"dataset={files / 'd.toml'}", f"output={output}", "columns=[text,image,vision,latents]",
        "samples_per_tar=2", *more
    ]


@pytest.fixture(scope="module")
def made(files):
    """By two ranks."""
    command = [
        sys.executable, "-m", "launcher.cli", "launch", "--nproc", "2", "encode", *items(files, files / "set")
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and "4 samples; latents: 4 encoded" in done.stdout
    return open_set(files / "set")


def test_the_record_says_what_a_set_holds(made, files):
    assert (
        list(verify(files / "set")) == [] and made.manifest.columns == ("latents", "image", "vision", "text")
    )
    by = made.manifest.made
    assert {made.model for made in by.values()} == {"strange"} and by["text"].parts == ("words", "letters")
    assert by["vision"].parts == ("eye",) and by["latents"].parts == ("vae",)
    assert {name: dict(made.fields) for name, made in by.items()} == {
        "latents": {"latents": Stored((48, None, None, None), "bfloat16")},
        "image": {"still": Stored((48, 1, None, None), "bfloat16")},
        "vision": {"sight": Stored((4, 20), "bfloat16")},
        "text": {"words": Stored((None, 24), "bfloat16"), "letters": Stored((None, 16), "bfloat16")},
    }
    assert made.manifest.ragged == {"words", "letters"}
    assert {name: tuple(t.shape) for name, t in made.empty_text.items()} == {
        "words": (1, 24), "letters": (0, 16)
    }


def test_a_batch_has_the_lengths_of_both_texts(made, strange):
    batch = next(iter(BatchLoader(made, batch_size=4)))
    tensors = batch.tensors
    assert set(tensors) == {"latents", "still", "sight", "words", "words_len", "letters", "letters_len"}
    assert tensors["latents"].shape == (4, 48, 3, 4, 6) and tensors["still"].shape == (4, 48, 1, 4, 6)
    captions = [meta["caption"] for meta in batch.meta]
    words = [min(12, 1 + len(c.split())) for c in captions]
    letters = [len("".join(re.findall(r'"([^"]*)"', c))) for c in captions]
    assert sorted(words) == [2, 4, 5, 12] and sorted(letters) == [0, 0, 2, 4]
    assert tensors["words_len"].tolist() == words and tensors["letters_len"].tolist() == letters
    for name, lengths in (("words", words), ("letters", letters)):
        for row, n in zip(tensors[name], lengths, strict=True):
            assert row[:n].abs().sum(1).all() and not row[n:].any()
    sigma = torch.full((4,), 0.5)
    x = tensors["latents"].float()
    inp = strange.make_input(x, sigma, tensors, task="go-on", guidance=None, x0=x)
    assert inp.x.shape == (4, 100, 3, 4, 6) and inp.lengths["letters"] == tuple(letters)


def test_the_eye_sees_the_first_frame(made, files):
    table = load_file(files / "eye.safetensors")["strange_eye"]
    for i in range(4):
        sample = made.get(i)
        pixels = torch.from_numpy(
            read_frames(files / "clips" / sample.meta["source"].rsplit("/", 1)[1], [0], size=(96, 64))
        )[0]
        rows = (pixels.double() / 127.5 - 1).reshape(2, 32, 2, 48, 3).mean((1, 3)).reshape(4, 3)  # quarters
        torch.testing.assert_close(
            sample.tensors["sight"].float(), (rows.float() @ table), atol=0.02, rtol=0.02
        )


def test_one_process_goes_on_where_two_ended(made, files, capsys):
    encode.run(load(EncodeConfig, None, items(files, files / "set", "columns=[text]")))
    said = capsys.readouterr().out
    assert (
        "nothing to do" in said and "latents: 0 encoded, 0 copied, 4 kept" in said
        and "vision: 0 encoded" in said
    )
    again = json.loads((files / "set/manifest.json").read_text())
    assert again["made"]["vision"]["fields"] == {"sight": {"dims": [4, 20], "dtype": "bfloat16"}}
    assert open_set(files / "set").manifest == made.manifest


def test_sizes_are_multiples_of_what_its_cells_and_patches_span(files, strange):
    pair = strange.flavor("pair")
    other = files / "other.toml"
    other.write_text("[[datasets]]\nvideo_directory = 'clips'\nresolution = [48, 64]\n")
    with pytest.raises(DataError, match="resolution 48 x 64: expected multiples of 32, for example 64"):
        check.look(str(other), model="strange", flavor="pair", workers=1)
    other.write_text("[[datasets]]\nvideo_directory = 'clips'\nresolution = 64\nframe_extraction = 'full'\n")
    report = check.look(str(other), model="strange", flavor="pair", workers=1)
    assert {s.bucket for s in report.samples} == {f"{pair.defaults.frames}x64x64"}
    assert not any("letters, first" in line for line in check.lines(report))  # none is too long
    (files / "clips/clip_00000.txt").write_text("r" * 81)
    try:
        lines = list(check.lines(check.look(str(other), model="strange", flavor="pair", workers=1)))
    finally:
        (files / "clips/clip_00000.txt").write_text(CAPTIONS[0])
    assert any("a caption above 80 letters" in x and "the encoder reads 20 tokens" in x for x in lines)


def test_shards_of_another_model_are_refused_by_name(made, files, tmp_path):
    hunyuan = find("hunyuan-video")
    with pytest.raises(
        DataError, match="column 'latents' of .* was made for strange, this run trains hunyuan-video"
    ):
        check_encoders({"data.shards": [made]}, ["latents"], ModelConfig(), hunyuan)
    with pytest.raises(DataError, match="made for strange"):
        check_encoders({"data.shards": [made]}, ["text"], ModelConfig(vae="tiny:vae.safetensors"), hunyuan)
    check_encoders(
        {"data.shards": [made]}, ["latents", "text", "vision"], ModelConfig(name="strange"), find("strange")
    )
    # Nor do two models share a set.
    mixed = [f"dataset={files / 'd.toml'}", f"output={files / 'set'}", "columns=[text]", "model.llm=tiny:llm",
             "model.clip=tiny:clip"]
    with pytest.raises(DataError, match="holds column 'latents' of strange, this is hunyuan-video"):
        encode.run(load(EncodeConfig, None, mixed))


def test_a_vae_of_another_flavor_is_refused(files, tmp_path, monkeypatch, strange):
    wrong = SimpleNamespace(stride=(4, 8, 8), channels=48, fingerprint="x")
    monkeypatch.setattr("hvtrain.encode.columns.open_vae", lambda *arguments: wrong)
    with pytest.raises(ConfigError, match="model.vae compresses 4 x 8 x 8, flavor 'pair' takes 4 x 16 x 16"):
        encode.run(load(EncodeConfig, None, items(files, tmp_path / "out", "columns=[latents]")))


def test_what_flavors_take_differently_needs_a_flavor(strange):
    import dataclasses

    pair = strange.flavors["pair"]
    whole = dataclasses.replace(pair, name="whole", given=(0, -1), cond=tuple(
        dataclasses.replace(f, dims=(48, None, None, None)) if f.name == "still" else f for f in pair.cond))
    spec = dataclasses.replace(strange, flavors={**strange.flavors, "whole": whole})
    plain = spec.flavor(None)
    # one flavor takes it
    assert plain.name == "plain" and kind_of("image", strange, plain).fields[0].name == "still"
    with pytest.raises(ConfigError, match="'image' is not the same for all of .*pair, whole"):
        kind_of("image", spec, plain)
    assert kind_of("image", spec, pair).given == () and kind_of("image", spec, whole).given == (0, -1)
    with pytest.raises(
        ConfigError, match="no column 'control'; choose from latents, image, vision, mask, text"
    ):
        kind_of("control", spec, pair)


def test_latents_of_the_whole_length_are_grey_but_for_what_is_given():
    seen = []
    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32,
                          encode=lambda video, generator: seen.append(video)
                          or torch.zeros(len(video), 2, 3, 1, 1))
    sample = SimpleNamespace(key="k", clip=SimpleNamespace(frames=tuple(range(9))))
    pixels = torch.from_numpy(np.stack([np.full((32, 32, 3), v, np.uint8) for v in (255, 0)]))[None]
    (fields,) = Latents(vae, "still", torch.float32, 0, (0, -1))(pixels, [Shot(sample, 0, None)])
    (video,) = seen
    assert fields["still"].shape == (2, 3, 1, 1) and video.shape == (1, 3, 9, 32, 32)
    assert (video[:, :, 0] == 1).all() and (video[:, :, -1] == -1).all() and not video[:, :, 1:-1].any()
    # An eye sees each of the frames, and their tokens are joined.
    eye = SimpleNamespace(encode=lambda pictures: [{"sight": p.mean((1, 2))[None]} for p in pictures])
    (looks,) = Looks(eye, torch.device("cpu"), torch.float32, "model.eye")(pixels, [Shot(sample, 0, None)])
    assert looks["sight"].tolist() == [[1.0] * 3, [-1.0] * 3]
