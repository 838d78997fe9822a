"""Rules of configs that need no model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvtrain.config import GenerateConfig, TrainConfig, load
from hvtrain.config.rules import check_generate, check_train
from hvtrain.errors import ConfigError


def test_sets_to_evaluate_on_may_lie_under_addresses(tmp_path) -> None:
    """As those to train on: their files are opened later."""
    for key in ("data.shards", "eval.shards"):
        given = {"data.shards": [str(tmp_path)], "eval.shards": [str(tmp_path)]} | {key: ["s3://bucket/set"]}
        cfg = load(TrainConfig, None, [f"{k}={v}" for k, v in given.items()] + [
            "model.dit=tiny:dit.safetensors", f"run.output_dir={tmp_path / 'run'}", "eval.every_steps=1",
            "run.steps=1",
        ])
        check_train(cfg)
        with pytest.raises(ConfigError, match=f"{key}.*missing"):
            check_train(
                replace(
                    cfg, **{key.split(".")[0]: replace(getattr(cfg, key.split(".")[0]), shards=("missing",))}
                )
            )


def test_sampling_takes_all_experts() -> None:
    with pytest.raises(
        ConfigError, match="model.experts is 'low': it is for training, sampling takes all of them"
    ):
        check_generate(load(GenerateConfig, None, ["model.experts=low"]))


def test_the_numbers_of_a_run() -> None:
    for key, value in (("run.grad_accum", 0), ("run.save_every_steps", -1), ("run.steps", 0)):
        with pytest.raises(ConfigError, match=f"{key} is {value}, expected"):
            check_train(
                load(
                    TrainConfig, None,
                    ["data.shards=s3://a/b", "run.output_dir=x", "run.steps=1", f"{key}={value}"]
                )
            )


def test_weights_are_cut_over_ranks_that_share_a_video_and_in_one_way() -> None:
    files = [
        "model.dit=tiny:dit.safetensors", "model.vae=tiny:vae.safetensors", "model.llm=tiny:llm",
        "model.clip=tiny:clip"
    ]
    given = [*files, "prompt=a cat", "output=x.mp4", "shard_weights=true"]
    check_generate(load(GenerateConfig, None, [*given, "parallel.ring=2"]))
    for also, words in (([], "have them share one"), (["parallel.ring=2", "blocks_to_swap=2"], "choose one")):
        with pytest.raises(ConfigError, match=words):
            check_generate(load(GenerateConfig, None, [*given, *also]))
