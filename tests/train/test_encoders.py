"""Shards of another VAE or text encoder look like the model's own, and are refused all the same."""

import itertools
from dataclasses import replace

import pytest
import torch

from hvtrain.config import asset
from hvtrain.errors import DataError
from hvtrain.models import find
from hvtrain.train import run as train
from hvtrain.train import setup
from shards.schema import load_manifest, save_manifest
from tests.train.shardset import config, make_shards

VAE, TEXT = ("model.vae=tiny:vae.safetensors",), ("model.llm=tiny:llm", "model.clip=tiny:clip")


@pytest.fixture(scope="module")
def own():
    """The fingerprints that encode writes for the model's own encoders, the text's plain and in float8."""
    spec, options = find("hunyuan-video"), {"dtype": torch.float32, "device": "meta"}
    parts = {"llm": asset("tiny:llm"), "clip": asset("tiny:clip")}
    texts = [spec.open_text(parts, fp8=fp8, **options) for fp8 in (False, True)]
    return (
        spec.open_vae(asset("tiny:vae.safetensors"), **options).fingerprint, *(t.fingerprint for t in texts)
    )


@pytest.fixture
def shards(tmp_path):
    def make(name, **encoders):
        return make_shards(
            tmp_path / name, n=4, more=[c for c in ("image", "control") if c in encoders], encoders=encoders
        )

    return make


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Whether a run gets as far as reading the model."""

    class Read(Exception):
        pass

    def read(*args, **options):
        raise Read

    monkeypatch.setattr(setup, "load_dit", read)

    runs = itertools.count()

    def tried(shards, *items):
        with pytest.raises(Read):
            train.run(config(shards, tmp_path / f"run{next(runs)}", *items))

    return tried


def test_the_same_encoders_in_whatever_dtype(own, shards, start):
    vae, text, text8 = own
    one = shards("one", latents=f"{vae}/bfloat16/0", text=f"{text}/bfloat16")
    two = shards("two", latents=f"{vae}/float16/7", text=f"{text8}/bfloat16")
    start(one, f"data.shards=[{one},{two}]", *VAE, *TEXT)
    imported = shards("imported", latents="imported: musubi-tuner", text="imported: musubi-tuner")
    start(one, f"data.shards=[{one},{imported}]", *VAE, *TEXT)
    start(one, f"data.shards=[{imported},{one}]")


@pytest.mark.parametrize("column", ["latents", "text"])
def test_other_encoders_than_the_config_s(own, shards, start, tmp_path, column):
    vae, text, _ = own
    mine = {"latents": f"{vae}/bfloat16/0", "text": f"{text}/bfloat16"}
    one, other = shards("one", **mine), shards("other", **{**mine, column: "0123456789abcdef/bfloat16/0"})
    part, print_ = {"latents": ("model.vae", vae), "text": ("model.llm and model.clip", text)}[column]
    says = (
        rf"column '{column}' of \S+other was made by other weights \(0123456789ab\) than {part} "
        rf"\({print_[:12]}\); encode it "
        r"with these, or set data.allow_foreign=true"
    )
    with pytest.raises(DataError, match=f"data.shards: {says}"):
        train.run(config(other, tmp_path / "run", *VAE, *TEXT))
    with pytest.raises(DataError, match=f"eval.shards: {says}"):
        train.run(config(one, tmp_path / "run", *VAE, *TEXT, f"eval.shards=[{other}]", "eval.every_steps=1"))
    assert not (tmp_path / "run").exists()
    start(other, *VAE, *TEXT, "data.allow_foreign=true")
    start(other)  # nothing to compare it with


def test_sets_of_different_encoders(shards, start, tmp_path):
    """Without the encoders' files the sets are compared with each other; of columns that the
    model does not read nothing is."""
    one, same = (
        shards("one", latents="aa/bfloat16/0", control="aa/bfloat16/0"),
        shards("same", latents="aa/bfloat16/3")
    )
    other = shards("other", latents="bb/bfloat16/0")
    with pytest.raises(
        DataError, match=r"data.shards: column 'latents' of \S+other .* \(bb\) than that of \S+one \(aa\)"
    ):
        train.run(config(one, tmp_path / "run", f"data.shards=[{one},{same},{other}]"))
    start(one, f"data.shards=[{one},{other}]", "data.allow_foreign=true")
    control = shards("control", latents="aa/bfloat16/0", control="cc/bfloat16/0")
    start(one, f"data.shards=[{one},{same},{control}]")


def test_of_another_model(own, shards, start, tmp_path):
    """Its VAE may give latents of the same shape, its text encoder as many values: refused by name,
    though no file of ours is given to compare with. Models may share an encoder, and sets of version
    2 do not say whose they are."""
    vae, text, _ = own
    made = {"latents": f"{vae}/bfloat16/0", "text": f"{text}/bfloat16"}
    for column, part in (("latents", "model.vae"), ("text", "model.llm and model.clip")):
        one = shards(column, **made)
        manifest = load_manifest(one)
        other = replace(manifest.made_by(column), model="wan")
        save_manifest(one, replace(manifest, made={**manifest.made, column: other}))
        says = (
            rf"column '{column}' of \S+{column} was made for wan, this run trains hunyuan-video; "
            rf".* its {part}, or"
        )
        with pytest.raises(DataError, match=says):
            train.run(config(one, tmp_path / "run"))
        start(one, *VAE, *TEXT)  # by the very same weights
        start(one, "data.allow_foreign=true")
        save_manifest(
            one,
            replace(manifest, made={**manifest.made, column: replace(other, fingerprint="0123/bfloat16")})
        )
        with pytest.raises(DataError, match="was made for wan"):
            train.run(config(one, tmp_path / "run", *VAE, *TEXT))
    assert not (tmp_path / "run").exists()
