"""A flavor of two DiTs: a run trains one, on its own noise levels, and says everywhere which."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open

from hvtrain.config import FlowConfig, asset
from hvtrain.config.parts import Part, parts_of
from hvtrain.errors import ConfigError
from hvtrain.flow.timesteps import quantile_function
from hvtrain.models import find
from hvtrain.models.spec import Expert
from hvtrain.train import run as train
from hvtrain.train import setup
from hvtrain.train.objective import Objective
from tests.train.shardset import config, make_shards

SPEC = find("hunyuan-video")
HIGH, LOW = Expert("high", "dit", (0.875, 1.0)), Expert("low", "dit_low", (0.0, 0.875))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture(autouse=True)
def experts(monkeypatch):
    monkeypatch.setitem(SPEC.flavors, "tiny", replace(SPEC.flavors["tiny"], experts=(HIGH, LOW)))
    monkeypatch.setitem(parts_of("hunyuan-video"), "dit_low", Part("the expert of low noise", optional=True))


@pytest.fixture
def low(tmp_path):
    """Another file than model.dit: one weight differs."""
    from safetensors.torch import load_file, save_file

    path = asset("tiny:dit.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["img_in.proj.bias"] = tensors["img_in.proj.bias"] + 1
    save_file(tensors, tmp_path / "low.safetensors", metadata=metadata)
    return f"model.dit_low={tmp_path / 'low.safetensors'}"


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(setup, "load_dit", lambda *a, **k: pytest.fail("the model was read"))


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (
            (),
            r"model.experts: 'tiny' is made of several DiTs, "
            r".*: high \(sigma 0.875 .*, low \(sigma 0 to 0.875\)"
        ),
        (("model.experts=lwo",), "model.experts: hunyuan-video has no expert 'lwo'; did you mean 'low'"),
        (("model.experts=low",), "model.dit_low is not set; the expert 'low' is in that file"),
        (("model.experts=low", "model.dit=null"), "model.dit_low is not set; the expert 'low' is in that "
        "file"),
        (("model.experts=high", "flow.max_sigma=0.5"), "flow.min_sigma 0 to flow.max_sigma 0.5 are not .* "
        "'high', 0.875 to 1"),
        (("model.experts=low", "model.flavor=t2v"), "flavor 't2v' has no expert 'low'; it has no experts"),
    ],
)
def test_which_is_asked_for_before_weights_are_read(shards, tmp_path, no_weights, items, says):
    with pytest.raises(ConfigError, match=says):
        train.run(config(shards, tmp_path / "run", *items))
    assert not (tmp_path / "run").exists()


def test_an_expert_of_a_flavor_without(shards, tmp_path, no_weights, monkeypatch):
    monkeypatch.setitem(SPEC.flavors, "tiny", replace(SPEC.flavors["tiny"], experts=()))
    with pytest.raises(
        ConfigError, match="hunyuan-video has no expert 'low'; it has no experts; leave model.experts null"
    ):
        train.run(config(shards, tmp_path / "run", "model.experts=low"))


@pytest.mark.parametrize("expert", [HIGH, LOW], ids=lambda e: e.name)
def test_the_noise_levels_are_the_distribution_s_own_part(expert):
    """Cut, not squeezed: the median given that it lies in the range, in closed form
    for the sigmoid of a normal."""
    flow = setup.flow_of(FlowConfig(shift=3.0), SPEC.flavors["tiny"], expert)
    assert (flow.min_sigma, flow.max_sigma) == expert.sigmas
    share = torch.special.ndtr(torch.logit(torch.tensor(0.875 / (3 - 2 * 0.875), dtype=torch.float64)))
    u = (1 + share) / 2 if expert is HIGH else share / 2
    t = torch.sigmoid(torch.special.ndtri(u))
    median = quantile_function(flow.timestep_sampling, flow)(torch.tensor([0.5], dtype=torch.float64))
    assert median.item() == pytest.approx((3 * t / (1 + 2 * t)).item(), abs=1e-6)


@pytest.mark.parametrize("name", ["high", "low"])
def test_a_run_trains_one(shards, low, tmp_path, monkeypatch, name, capfd):
    """Its own file is loaded; sigma stays in its range, in training and in the held-out
    loss; the files carry its name."""
    seen, opened, compare, load = [], [], Objective.compare, setup.load_dit
    monkeypatch.setattr(setup, "load_dit", lambda path, **k: opened.append(str(path)) or load(path, **k))

    def compared(self, model, batch, *, sigma, draw):
        seen.extend(sigma.tolist())
        return compare(self, model, batch, sigma=sigma, draw=draw)

    monkeypatch.setattr(Objective, "compare", compared)
    run = tmp_path / "run"
    items = (
        f"model.experts={name}", low, "run.steps=4", f"eval.shards=[{shards}]", "eval.every_steps=4",
        "eval.max_batches=1"
    )
    assert train.run(config(shards, run, *items)) == 0
    assert opened == [str(tmp_path / "low.safetensors") if name == "low" else asset("tiny:dit.safetensors")]
    low_end, high_end = {"high": HIGH, "low": LOW}[name].sigmas
    assert len(seen) > 12 and all(low_end <= s <= high_end for s in seen)
    with safe_open(run / f"lora-{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["hvtrain.expert"] == name and metadata["ss_output_name"] == f"lora-{name}"
    about = json.loads((run / "run.json").read_text())
    assert (about["model.experts"], about["run.name"]) == (name, f"lora-{name}")
    assert f"expert {name}" in capfd.readouterr().out
    # What the run wrote of itself is the same run; the other expert is not.
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["run"]["name"] == f"lora-{name}" and kept["flow"]["min_sigma"] == low_end
    assert train.run(config(shards, run, *items, f"run.name=lora-{name}")) == 0
    assert "nothing to do" in capfd.readouterr().out
    other = "high" if name == "low" else "low"
    shutil.copy(run / f"lora-{name}.safetensors", tmp_path / "kept.safetensors")
    with pytest.raises(ConfigError, match=f"model.experts is \"{name}\" there, \"{other}\" here"):
        train.run(config(shards, run, *items, f"model.experts={other}"))


def test_from_scratch(shards, tmp_path):
    """The expert's file is not needed where no weights are."""
    items = ("model.dit=null", "model.flavor=tiny", "model.experts=low", "adapter.type=none", "run.steps=1")
    assert train.run(config(shards, tmp_path / "run", *items)) == 0
    assert (tmp_path / "run/lora-low.safetensors").exists()
