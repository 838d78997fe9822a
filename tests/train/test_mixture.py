"""Mixtures of sets, image and video in one run, batches that cost alike, and curricula:
planned, and as runs that continue."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvtrain.config import DataConfig, ShardsConfig
from hvtrain.errors import ConfigError
from hvtrain.models import find
from hvtrain.train import run as train
from hvtrain.train.mixture import plan_data
from shards import open_set
from shards.loader import BatchLoader
from shards.schema import EMPTY_TEXT, Chunk, Manifest, save_manifest
from shards.writer import write_tar
from tests.train.shardset import config

LATENT = find("hunyuan-video").flavor("tiny").latent
SIZES = {"1x32x32": (1, 4, 4), "1x64x64": (1, 8, 8), "9x64x64": (3, 8, 8)}  # bucket -> T H W of the latents


def make(root: Path, **buckets: int) -> Path:
    """So many samples of each bucket, named after its number in SIZES."""
    g, chunks = torch.Generator().manual_seed(0), []
    for number, n in ((int(name[1:]), n) for name, n in buckets.items()):
        bucket = list(SIZES)[number]
        keys = tuple(f"{root.name}-{number}-{i}" for i in range(n))
        latents = [
            (k, {"latents": torch.randn(16, *SIZES[bucket], generator=g).bfloat16()}, {}) for k in keys
        ]
        text = [(k, {"text": torch.randn(2, 64, generator=g), "pooled": torch.ones(64)}, {}) for k in keys]
        tars = {
            n: write_tar(root, f"{n}/{number}.tar", rows) for n,
            rows in (("latents", latents), ("text", text))
        }
        chunks.append(Chunk(bucket, keys, tars))
    save_file({"text": torch.zeros(1, 64), "pooled": torch.zeros(64)}, str(root / EMPTY_TEXT))
    save_manifest(root, Manifest(("latents", "text"), tuple(chunks)))
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return make(folder / "images", b0=8, b1=4), make(folder / "videos", b2=3)


def plan(sets, **data):
    entries = tuple(ShardsConfig(str(path), **more) for path, more in zip(sets, data.pop("each", ({}, {}))))
    return plan_data(DataConfig(mixture=entries, **data), [open_set(p) for p in sets], LATENT, seed=0)


def read(sets, curriculum, n, *, cursor=0, step=0, dp=1, per_step=1):
    """[(step, keys of all ranks)] of n steps, and the cursor after each."""
    opened = [open_set(p) for p in sets]
    ranks = [
        iter(
            BatchLoader(
                opened, batch_size=1, dp_rank=r, dp_size=dp, seed=7, cursor=cursor, step=step,
                per_step=per_step, phases=curriculum.phases
            )
        ) for r in range(dp)
    ]
    for at in range(step, step + n):
        batches = [next(rank) for _ in range(per_step) for rank in ranks]
        yield at, [key for b in batches for key in b.keys], batches[-1].cursor


def test_weights_and_buckets(sets):
    found = plan(sets, each=({"weight": 1.0, "buckets": ("1x32*",)}, {"weight": 3.0}))
    assert found.n_samples == 11 and found.phases[0].mixture.counts == (3, 8)
    keys = [k for _, ks, _ in read(sets, found, 110) for k in ks]
    assert {k.split("-")[0] for k in keys} == {"images", "videos"} and not any("images-1" in k for k in keys)
    assert sum("videos" in k for k in keys) == 80


def test_batches_of_a_number_of_tokens_cost_alike(sets):
    tokens = {b: LATENT.n_tokens(size) for b, size in SIZES.items()}
    assert tokens == {"1x32x32": 4, "1x64x64": 16, "9x64x64": 48}
    found = plan(sets, batch_tokens=33)
    # a video is more, and still one
    assert found.phases[0].mixture.batch_size == {"1x32x32": 8, "1x64x64": 2, "9x64x64": 1}
    assert found.per_batch == 15 / (1 + 2 + 3)
    opened = [open_set(p) for p in sets]
    for batch in islice(BatchLoader(opened, batch_size=1, phases=found.phases), 12):
        n = LATENT.n_tokens(batch.tensors["latents"].shape)
        assert len(batch.keys) == {4: 8, 16: 2, 48: 1}[n] and set(batch.sets) == {int(n == 48)}


EACH = ({"until_step": 5}, {"from_step": 3})


def test_a_curriculum_goes_by_steps_and_its_place_is_the_cursor(sets):
    found = plan(sets, each=EACH)
    assert [(p.begin, p.mixture.counts) for p in found.phases] == [(0, (12,)), (3, (12, 3)), (5, (3,))]
    whole = list(read(sets, found, 9, per_step=2))
    kinds = [{k.split("-")[0] for k in keys} for _, keys, _ in whole]
    assert kinds[:3] == [{"images"}] * 3 and kinds[5:] == [{"videos"}] * 4
    # whenever it is stopped, also on another number of ranks: the same samples follow
    for stop in range(1, 9):
        cursor = whole[stop - 1][2]
        rest = list(read(sets, found, 9 - stop, cursor=cursor, step=stop, per_step=2))
        assert rest == whole[stop:]
        assert [
            r[1:] for r in read(sets, found, 9 - stop, cursor=cursor, step=stop, dp=2)
        ] == [r[1:] for r in whole[stop:]]


@pytest.mark.parametrize(
    "each, says",
    [
        (
            ({"buckets": ("9x*",)}, {}),
            r"data.mixture\[0\].buckets: .*images has no bucket like 9x\*; it has 1x32x32, 1x64x64"
        ),
        (({"from_step": 1}, {"from_step": 2}), "data.mixture: from step 0 on there is no set"),
        (({"until_step": 4}, {"until_step": 2}), "data.mixture: from step 4 on there is no set"),
    ],
)
def test_nothing_to_train_on(sets, each, says):
    with pytest.raises(ConfigError, match=says):
        plan(sets, each=each)


NONE = "data.shards=[]"


@pytest.mark.parametrize(
    "items, says",
    [
        ([NONE, "data.mixture=[{path: gone}]"], r"data.mixture\[0\].path.*gone"),
        (["data.mixture=[{path: '{0}'}]"], "give either data.shards or data.mixture"),
        (["data.batch_size=2", "data.batch_tokens=8"], "give either data.batch_size or data.batch_tokens"),
        (["data.batch_tokens=0"], "data.batch_tokens is 0, expected more than 0"),
        (
            [NONE, "data.mixture=[{path: '{0}', weight: 0}]"],
            r"data.mixture\[0\].weight is 0.0, expected more than 0"
        ),
        ([NONE, "data.mixture=[{path: '{0}', weight: 1}, {path: '{0}'}]"], r"mixture\[1\].weight: weights"),
        ([NONE, "data.mixture=[{path: '{0}', from_step: 2, until_step: 2}]"], "until_step is 2, expected "
        "more than"),
        (
            [NONE, "data.mixture=[{path: '{0}', from_step: 2}]", "run.steps=null", "run.epochs=1"],
            "run.epochs: "
        ),
    ],
)
def test_mistakes(sets, tmp_path, items, says):
    with pytest.raises(ConfigError, match=says):
        cfg = config(
            sets[0], tmp_path / "run", "data.batch_size=1",
            *(item.replace("{0}", str(sets[0])) for item in items)
        )
        train.run(cfg)


def test_a_run_of_images_and_videos_goes_on_bit_for_bit(sets, tmp_path):
    """A weighted mixture with a curriculum and batches by tokens, two micro-batches a
    step, stopped in every phase."""
    images, videos = sets
    mix = f"[{{path: {images}, weight: 1, buckets: [1x*]}}, {{path: {videos}, weight: 2, from_step: 2}}]"
    options = (
        "data.shards=[]", f"data.mixture={mix}", "data.batch_size=1", "data.batch_tokens=32",
        "run.grad_accum=2", "data.calibration=0", "data.caption_dropout=0.3"
    )
    assert train.run(config(images, tmp_path / "whole", *options, "run.steps=5")) == 0
    for steps in (1, 3, 5):
        assert train.run(config(images, tmp_path / "cut", *options, f"run.steps={steps}")) == 0
    for name in ("lora.safetensors", "checkpoints/step-00000005/optimizer.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    named = {n.rpartition("/")[2] for row in rows for n in row if "loss_by_set" in n}
    assert (
        named == {"images", "videos"} and not any("loss_by_set/videos" in n for row in rows[:2] for n in row)
    )
    with pytest.raises(
        ConfigError, match=r"holds another run: data.mixture is .*data.batch_tokens is 32 there, 64 here"
    ):
        train.run(
            config(
                images, tmp_path / "cut", *options, "data.batch_tokens=64",
                f"data.mixture={mix.replace('2}', '3}')}"
            )
        )
