"""Samples on which an adapter shall change nothing: what they are compared with, and that
nothing else of a run takes part."""

import json
from dataclasses import replace

import pytest
import torch

from hvtrain.adapters.attach import without_adapters
from hvtrain.config import FlowConfig, ShardsConfig
from hvtrain.errors import ConfigError
from hvtrain.flow.loss import add_noise, target
from hvtrain.flow.timesteps import quantile_function
from hvtrain.rng import generator
from hvtrain.train import run as train
from hvtrain.train import setup
from hvtrain.train.objective import Objective
from shards import open_set
from tests.adapters.models import ARCH, SPEC, adapted, an_input, build
from tests.train.shardset import config, make_shards

QUANTILE = quantile_function("shift", FlowConfig(shift=5.0))
SIGMA = torch.tensor([0.8, 0.3])


def a_batch(**more):
    inp = an_input()
    return {
        "latents": torch.randn(2, ARCH.in_channels, 3, 4, 6, generator=generator(5, stream="x")),
        "text": inp.cond["text"], "text_len": torch.tensor([5, 3]), "pooled": inp.cond["pooled"], **more,
    }


def errors_of(model, **more):
    objective = Objective(SPEC, "t2v", 6.0, QUANTILE, torch.device("cpu"), False)
    return objective.compare(model, a_batch(**more), sigma=SIGMA, draw=generator(1, stream="noise"))


def test_a_silent_sample_is_compared_with_the_model_without_its_adapter():
    model, batch = adapted(), a_batch()
    noise = torch.randn(batch["latents"].shape, generator=generator(1, stream="noise"))
    cond = {name: value for name, value in batch.items() if name != "latents"}
    inp = SPEC.make_input(
        add_noise(batch["latents"], noise, SIGMA), SIGMA, cond, task="t2v", guidance=6.0, x0=batch["latents"]
    )
    with torch.no_grad():
        velocity, base = model(inp), build()(inp)
        with without_adapters(model):
            assert torch.equal(model(inp), base)
        assert torch.equal(model(inp), velocity)
    found = errors_of(model, silent=torch.tensor([True, False])).per_sample
    wanted = torch.stack([base[0], target(batch["latents"], noise)[1]])
    torch.testing.assert_close(found, (velocity - wanted).square().flatten(1).mean(1))
    assert (velocity - base).square().mean() > 0.01


def test_an_adapter_that_does_nothing_has_nothing_to_learn_of_silence():
    model = adapted()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_up" in name:
                p.zero_()
    result = errors_of(model, silent=torch.tensor([True, True]))
    assert result.per_sample.eq(0).all()
    plain = errors_of(model, silent=torch.tensor([False, False])).per_sample
    assert torch.equal(plain, errors_of(model).per_sample) and plain.gt(0.1).all()


def test_the_adapters_come_back_if_the_model_fails():
    model = adapted()
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        raise ZeroDivisionError
    assert not any(getattr(layer, "off", False) for layer in model.modules())


def mixed(tmp_path, *silent):
    sets = [make_shards(tmp_path / str(i), n=6 + i, seed=i) for i in range(len(silent))]
    entries = [
        f"{{path: {path}, weight: 1, silent: {str(s).lower()}}}" for path, s in zip(sets, silent, strict=True)
    ]
    return f"data.mixture=[{', '.join(entries)}]"


def test_a_run_learns_silence_of_some_sets_and_leaves_samples_of_the_others(tmp_path):
    more = (
        mixed(tmp_path, False, True), "data.shards=[]", "run.log_every=1", "data.batch_size=8",
        "optim.lr=1e-2"
    )
    assert train.run(config(tmp_path / "0", tmp_path / "run", "run.steps=3", *more)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    silent = [v for row in rows for name, v in row.items() if "loss_by_set" in name and name.endswith("/1")]
    assert silent[0] == 0 and silent[-1] > 0 and len(silent) == 3
    assert open_set(tmp_path / "run" / "calibration").keys == [f"clip{i}" for i in range(6)]


def test_what_teaches_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.mixture: all sets are silent"):
        train.run(config(tmp_path, tmp_path / "run", mixed(tmp_path, True, True), "data.shards=[]"))
    with pytest.raises(ConfigError, match=r"data.mixture: silent is what an adapter is .* adapter.type none"):
        train.run(
            config(
                tmp_path, tmp_path / "run", mixed(tmp_path, False, True), "data.shards=[]",
                "adapter.type=none"
            )
        )
    stage3 = ("zero.engine=deepspeed", "zero.stage=3")
    with pytest.raises(
        ConfigError,
        match=r"data.mixture: silent samples take another forward pass .* use zero.stage 0, 1 or 2"
    ):
        train.run(config(tmp_path, tmp_path / "run", mixed(tmp_path, False, True), "data.shards=[]", *stage3))


def test_runs_that_were_begun_before_there_was_silence_go_on():
    entry = ShardsConfig("a", weight=2.0)
    assert setup._entry(entry) == {
        "path": "", "weight": 2.0, "buckets": (), "from_step": 0, "until_step": None
    }
    assert setup._entry(replace(entry, silent=True))["silent"] is True
