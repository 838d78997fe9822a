"""Training with an image and without, by a share of the samples, where the model makes both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hvtrain.config import TrainConfig, load
from hvtrain.errors import ConfigError, DataError
from hvtrain.models import find
from hvtrain.models.load import save_dit
from hvtrain.train import run as train
from hvtrain.train import setup
from hvtrain.train.data import check_image_share
from tests.models.any_model import random_model
from tests.train.shardset import make_set

SPEC = find("wan")
FLAVOR = SPEC.flavor("tiny-ti2v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("share")
    save_dit(random_model(SPEC, FLAVOR), folder / "dit.safetensors", spec=SPEC, flavor=FLAVOR)
    make_set(folder / "set", FLAVOR)
    make_set(folder / "plain", FLAVOR, without=("image",))
    return folder


def config(folder, output, *more: str, shards: str = "set") -> TrainConfig:
    return load(TrainConfig, None, [
        "model.name=wan", f"model.dit={folder / 'dit.safetensors'}", "model.dtype=float32",
        f"data.shards={folder / shards}", "data.batch_size=4", "run.precision=fp32", "run.recompute=none",
        "run.steps=4", "zero.engine=torch", "adapter.rank=2", f"run.output_dir={output}", *more,
    ])


def test_the_share_is_told_to_the_model_sample_by_sample(folder, tmp_path, monkeypatch):
    """A given frame is clean and not learnt; in the other samples it is noised and learnt.
    Held-out losses are with the image."""
    seen = []
    real = SPEC.make_input

    def watched(x, sigma, cond, **more):
        inp = real(x, sigma, cond, **more)
        seen.append((cond.get("image_given"), inp))
        return inp

    def of_spec(*arguments, **more):
        base = find_base(*arguments, **more)
        return replace(base, spec=replace(base.spec, make_input=watched))

    find_base = setup.find_base
    monkeypatch.setattr(setup, "find_base", of_spec)
    held = (
        f"eval.shards=[{folder / 'set'}]", "eval.every_steps=4", "eval.quantiles=[0.5]", "eval.max_batches=1"
    )
    assert train.run(config(folder, tmp_path / "run", "data.image_share=0.5", *held)) == 0
    *steps, last = seen
    assert len(steps) == 4 and last[0] is None and last[1].clean[:, 0].all()
    given = torch.cat([told for told, _ in steps])
    assert given.dtype == torch.bool and 3 <= given.sum() <= 13 and len(given) == 16
    for told, inp in steps:
        assert torch.equal(inp.clean[:, 0], told) and not inp.clean[:, 1:].any()
        assert torch.equal(inp.loss_mask[:, 0, 0, 0, 0], 1 - told.float())
    for share, wanted in (("0", False), ("1", True), (None, None)):
        seen.clear()
        more = () if share is None else (f"data.image_share={share}",)
        assert train.run(config(folder, tmp_path / f"run{share}", "run.steps=1", *more)) == 0
        ((told, inp),) = seen
        assert (told is None) if wanted is None else bool((told == wanted).all())
        assert bool(inp.clean[:, 0].all()) is (wanted is not False)


@pytest.mark.parametrize(
    ("share", "error", "words"),
    [
        ("1.5", ConfigError, "data.image_share is 1.5, expected a number from 0 to 1"),
        (
            "0.5", DataError,
            "data.image_share is 0.5, but .*plain has no column 'image'; encode it, or give 0"
        ),
    ],
)
def test_a_share_that_cannot_be_is_refused_before_weights_are_read(
    folder, tmp_path, monkeypatch, share, error, words
):
    monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))
    with pytest.raises(error, match=words):
        train.run(config(folder, tmp_path / "run", f"data.image_share={share}", shards="plain"))
    assert not (tmp_path / "run").exists()


def test_a_flavor_without_the_choice_says_so():
    hunyuan = find("hunyuan-video")
    with pytest.raises(
        ConfigError, match="data.image_share is 0.3, but 'i2v' is always told by an image: leave it null"
    ):
        check_image_share(0.3, [], hunyuan.flavor("i2v"))
    with pytest.raises(ConfigError, match="data.image_share is 0.3, but 'tiny' takes none: leave it null"):
        check_image_share(0.3, [], hunyuan.flavor("tiny"))
    check_image_share(None, [], find("hunyuan-video").flavor("i2v"))
    check_image_share(0.0, [], FLAVOR)
