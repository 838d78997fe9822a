"""What is wrong is said before any weights are read, and by all ranks alike."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.errors import ConfigError, DataError, HvtrainError
from hvtrain.models import find
from hvtrain.models.spec import Field
from hvtrain.parallel.context import ParallelContext
from hvtrain.train import run as train
from hvtrain.train import setup
from hvtrain.train.data import check_empty_text, open_shards
from hvtrain.train.prepare import on_all
from shards import ShardError
from shards.schema import Manifest, load_manifest, save_manifest
from shards.writer import write_tar
from tests.train.shardset import config, make_shards

SPEC = find("hunyuan-video")


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
        (("optim.warmup_steps=7",), "optim.warmup_steps is 7: expected 0 to the run's 6 steps"),
        (("flow.timestep_sampling=shfit",), "flow.timestep_sampling: no distribution 'shfit'; did you mean "
        "'shift'"),
        (("flow.min_sigma=0.9", "flow.max_sigma=0.1"), "expected 0 <= min < max <= 1"),
        (("run.recompute=ful",), "run.recompute is 'ful'; did you mean 'full'"),
        (("parallel.kernel=sdpaa",), "parallel.kernel: no attention kernel 'sdpaa'; did you mean 'sdpa'"),
        (("parallel.kernel=xfuser",), "xfuser"),
        (("parallel.ulysses=3",), "does not divide the 1 process"),
        (("zero.offload_optimizer=cpu",), "zero.offload_optimizer: the torch engine"),
        (("zero.engine=deepspeed", "zero.stage=4"), "zero.stage: 4 is not a ZeRO stage"),
        (("zero.engine=deepspeed", "zero.offload_param=cpu"), "zero.offload_param: ZeRO stage 2"),
        (("zero.engine=deepspeed", "zero.stage=3", "zero.offload_optimizer=nvme"), "zero.nvme_path: give a "
        "directory"),
        (("zero.engine=deepspeed", "zero.deepspeed=ds.json"), "ds.json sets 'gradient_clipping', .* from "
        "optim.max_grad_norm"),
        (("zero.engine=deepspeed", "zero.deepspeed=list.json"), "list.json holds a list"),
        (("run.blocks_to_swap=40", "run.recompute=full"), "blocks_to_swap: 40 of 6 blocks cannot be kept off "
        "the device"),
        (("adapter.init_from=other.safetensors",), "other.safetensors: 'double_blocks.0.img_attn.proj' has "
        "rank 3, .* rank 4"),
        (("adapter.type=lroa",), "adapter.type: no adapter 'lroa'; did you mean 'lora'"),
        (
            ("adapter.rank=1000000",),
            r"adapter.rank is 1000000, but a layer of 160 x 480 \(.*\) has no more than 160; expected 1"
        ),
        (("adapter.rank=0",), "adapter.rank is 0, expected more than 0"),
        (("adapter.exclude=.*",), "leaves nothing to train"),
        (("adapter.include=nothing",), "'nothing' matches no module"),
        (("model.flavor=t2v",), "flavor"),
        (("eval.every_steps=2", "eval.shards=tests"), "tests"),
        (("data.shards=tests",), "tests"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_refused_before_the_model(shards, tmp_path, monkeypatch, items, says):
    here = os.getcwd()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "tests").symlink_to(os.path.join(here, "tests"))
    pair = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(3, 160),
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(160, 3)}  # fmt: skip
    save_file(pair, tmp_path / "other.safetensors")
    with pytest.raises((HvtrainError, ShardError), match=says) as caught:
        train.run(config(shards, tmp_path / "run", *items))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_previews_of_sizes_that_the_model_cannot_hold(shards, tmp_path):
    files = (
        "model.vae=tiny:vae.safetensors", "model.llm=tiny:llm", "model.clip=tiny:clip",
        "preview.every_steps=1"
    )
    with pytest.raises(ConfigError, match=r"preview.prompts\[0\].frames is 6"):
        train.run(config(shards, tmp_path / "run", *files, "preview.prompts=[{prompt: a, frames: 6}]"))


def test_a_good_config_does_read_it(shards, tmp_path):
    with pytest.raises(AssertionError, match="the model was read"):
        train.run(config(shards, tmp_path / "run"))


@pytest.mark.parametrize(
    ("items", "takes"),
    [
        ((), "the frozen weights alone take 0.0 GiB of each process's CPU, which has 0.0 GiB; `hvtrain fit "
        "CONFIG` says"),
        (("adapter.type=none",), "the weights and their gradients alone take 0.0 GiB"),
        (("zero.engine=deepspeed", "zero.stage=3"), "the frozen weights alone"),
    ],
)
def test_weights_that_fit_nowhere(shards, tmp_path, monkeypatch, items, takes):
    """The tiny one holds 5.2 million values: 21 MB in float32, 42 with their gradients."""
    n = sum(p.numel() for p in setup.find_base(config(shards, tmp_path).model).outline.parameters())
    there = 4 * n * (2 if "adapter.type=none" in items else 1)
    monkeypatch.setattr(ParallelContext, "memory_bytes", there - 1)
    with pytest.raises(ConfigError, match=takes):
        train.run(config(shards, tmp_path / "run", *items))
    monkeypatch.setattr(ParallelContext, "memory_bytes", there)
    with pytest.raises(AssertionError, match="the model was read"):
        train.run(config(shards, tmp_path / "run", *items))


def test_what_spares_memory_is_counted(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(ParallelContext, "memory_bytes", 1 << 20)
    stage3 = ("zero.engine=deepspeed", "zero.stage=3", "zero.offload_param=cpu")
    for i, items in enumerate((stage3, (*stage3, "adapter.type=none", "zero.offload_optimizer=cpu"))):
        with pytest.raises(AssertionError, match="the model was read"):
            train.run(config(shards, tmp_path / f"run{i}", *items))
    n = sum(p.numel() for p in setup.find_base(config(shards, tmp_path).model).outline.parameters())
    monkeypatch.setattr(ParallelContext, "memory_bytes", int(4 * n * 0.9))
    with pytest.raises(AssertionError, match="the model was read"):
        train.run(config(shards, tmp_path / "run", "run.blocks_to_swap=2", "run.recompute=full"))


def test_the_empty_caption_is_looked_at_where_captions_are_dropped(tmp_path):
    shards = make_shards(tmp_path / "set")
    save_file({"text": torch.zeros(1, 64)}, shards / "empty_text.safetensors")
    with pytest.raises(AssertionError, match="the model was read"):
        train.run(config(shards, tmp_path / "run"))
    with pytest.raises(
        DataError, match="set: its empty caption lacks the field 'pooled'; encode column 'text' with this"
    ):
        train.run(config(shards, tmp_path / "run", "data.caption_dropout=0.1"))
    save_file({"text": torch.zeros(1, 60), "pooled": torch.zeros(64)}, shards / "empty_text.safetensors")
    manifest = load_manifest(shards)
    save_manifest(shards, replace(manifest, chunks=(replace(manifest.chunks[0], caption_dropout=0.5),)))
    with pytest.raises(
        DataError, match=r"its empty caption holds 'text' of shape \(1, 60\), flavor 'tiny' takes any x 64"
    ):
        train.run(config(shards, tmp_path / "run"))
    (shards / "empty_text.safetensors").unlink()
    with pytest.raises(ShardError, match="empty_text.safetensors is missing: caption dropout needs it"):
        train.run(config(shards, tmp_path / "run"))


def test_an_optional_field_that_samples_have_the_empty_caption_has_too(tmp_path):
    flavor = SPEC.flavors["tiny"]
    glyphs = Field("glyphs", (None, 8), torch.float32, "text", optional=True, longest=4)
    flavor = replace(flavor, cond=(*flavor.cond, glyphs))
    shards = make_shards(tmp_path / "set")
    check_empty_text(open_shards([str(shards)], flavor, key="data.shards"), flavor)  # nobody has it
    chunk = load_manifest(shards).chunks[0]
    rows = [
        (k, {"text": torch.ones(2, 64), "pooled": torch.ones(64), "glyphs": torch.ones(3, 8)}, {})
        for k in chunk.keys
    ]
    tars = {**chunk.tars, "text": write_tar(shards, "text/1.tar", rows)}
    save_manifest(shards, Manifest(("latents", "text"), (replace(chunk, tars=tars),)))
    with pytest.raises(DataError, match="its empty caption lacks the field 'glyphs'"):
        check_empty_text(open_shards([str(shards)], flavor, key="data.shards"), flavor)


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
