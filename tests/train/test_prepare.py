"""What is wrong is said before any weights are read, and by all ranks alike."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.train import run as train
from hvtrain.train import setup
from hvtrain.train.prepare import on_all
from shards import ShardError
from shards.schema import Manifest, load_manifest, save_manifest
from tests.train.shardset import config, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def read(*args, **options):
        raise AssertionError("the model was read")

    monkeypatch.setattr(setup, "load_dit", read)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (("optim.name=adamww",), "optim.name: no optimizer 'adamww'; did you mean 'adamw'"),
        (("optim.schedule=cosin",), "optim.schedule: no schedule 'cosin'; did you mean 'cosine'"),
        (("optim.warmup_steps=7",), "optim.warmup_steps is 7, more than the run's 6 steps"),
        (("flow.timestep_sampling=shfit",), "flow.timestep_sampling: no distribution 'shfit'; did you mean 'shift'"),
        (("flow.min_sigma=0.9", "flow.max_sigma=0.1"), "expected 0 <= min < max <= 1"),
        (("run.recompute=ful",), "run.recompute is 'ful'; did you mean 'full'"),
        (("parallel.kernel=sdpaa",), "parallel.kernel: no attention kernel 'sdpaa'; did you mean 'sdpa'"),
        (("parallel.kernel=xfuser",), "xfuser"),
        (("parallel.ulysses=3",), "does not divide the 1 process"),
        (("zero.offload_optimizer=cpu",), "zero.offload_optimizer: the torch engine"),
        (("zero.engine=deepspeed", "zero.stage=4"), "zero.stage: 4 is not a ZeRO stage"),
        (("zero.engine=deepspeed", "zero.offload_param=cpu"), "zero.offload_param: ZeRO stage 2"),
        (("zero.engine=deepspeed", "zero.stage=3", "zero.offload_optimizer=nvme"), "zero.nvme_path: give a directory"),
        (("adapter.rank=1000000",), r"adapter.rank is 1000000, but a layer of 160 x 480 \(.*\) has no more than 160; expected 1"),
        (("adapter.rank=0",), "adapter.rank is 0, expected more than 0"),
        (("adapter.exclude=.*",), "leaves nothing to train"),
        (("adapter.include=nothing",), "'nothing' matches no module"),
        (("model.flavor=t2v",), "flavor"),
        (("eval.every_steps=2", "eval.shards=tests"), "tests"),
        (("data.shards=tests",), "tests"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_refused_before_the_model(shards, tmp_path, items, says):
    with pytest.raises((HvtrainError, ShardError), match=says) as caught:
        train.run(config(shards, tmp_path / "run", *items))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_previews_of_sizes_that_the_model_cannot_hold(shards, tmp_path):
    files = ("model.vae=tiny:vae.safetensors", "model.llm=tiny:llm", "model.clip=tiny:clip", "preview.every_steps=1")
    with pytest.raises(ConfigError, match=r"preview.prompts\[0\].frames is 6"):
        train.run(config(shards, tmp_path / "run", *files, "preview.prompts=[{prompt: a, frames: 6}]"))


def test_a_good_config_does_read_it(shards, tmp_path):
    with pytest.raises(AssertionError, match="the model was read"):
        train.run(config(shards, tmp_path / "run"))


def test_a_missing_tar_is_noticed_at_once(tmp_path):
    """Not after hours, when its turn comes: the first sample, which is looked at, is in another tar."""
    shards, more = make_shards(tmp_path / "set"), make_shards(tmp_path / "more")
    first, second = (load_manifest(folder).chunks[0] for folder in (shards, more))
    tars = {}
    for column, tar in second.tars.items():
        tars[column] = replace(tar, path=f"{column}/1.tar")
        (more / tar.path).rename(shards / tars[column].path)
    keys = tuple(f"{key}-again" for key in second.keys)
    save_manifest(shards, Manifest(("latents", "text"), (first, replace(second, keys=keys, tars=tars))))
    (shards / "text/1.tar").unlink()
    with pytest.raises(ShardError, match=r"text/1.tar.*missing"):
        train.run(config(shards, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_one_rank_finds_all_say():
    said = ConfigError("only node 1 lacks the file")
    ctx = SimpleNamespace(gather_objects=lambda mine: [mine, said])
    with pytest.raises(ConfigError, match="only node 1"):
        on_all(ctx, lambda: "fine here")
    assert on_all(SimpleNamespace(gather_objects=lambda mine: [mine]), lambda: "fine") == "fine"
    with pytest.raises(ZeroDivisionError):  # a bug is a bug, at once
        on_all(ctx, lambda: 1 / 0)
