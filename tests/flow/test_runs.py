"""Noise levels and losses in runs."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image
from safetensors.torch import load_file

from hvtrain.errors import ConfigError, DataError
from hvtrain.flow.timesteps import SAMPLERS
from hvtrain.train import run as train
from launcher.cli import main
from tests.train.shardset import config, make_shards


def test_every_distribution_and_option_trains(tmp_path):
    shards = make_shards(tmp_path / "set", more=("mask",))
    held = f"eval.shards={make_shards(tmp_path / 'held', n=2, seed=5, more=('mask',))}"
    losses = {}
    for name, options in {
        **{name: (f"flow.timestep_sampling={name}",) for name in SAMPLERS},
        "logit_normal": ("flow.timestep_sampling=logit_normal", "flow.logit_mean=0.5"),
        "all": (
            "flow.timestep_sampling=qinglong_flux", "flow.weighting=min_snr", "flow.loss=pseudo_huber",
            "flow.masked=true", "flow.huber_schedule=snr", "flow.noise_offset=0.05", "flow.min_sigma=0.1",
            "flow.range=squeeze", "flow.guidance=1", "flow.raw_guidance=true", held, "eval.every_steps=1"
        ),
    }.items():  # fmt: skip
        assert train.run(config(shards, tmp_path / name, *options, "run.steps=1", "data.calibration=0")) == 0
        losses[name] = json.loads(
            (tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]
        )["train/loss"]
    assert len(set(losses.values())) == len(losses)  # each is another run
    assert any("eval/loss" in line for line in (tmp_path / "all/metrics.jsonl").read_text().splitlines())
    assert load_file(tmp_path / "all/lora.safetensors")


def test_refusals(tmp_path):
    shards = make_shards(tmp_path / "set")
    for options, error, says in (
        (
            ("flow.masked=true",), DataError,
            r"flow.masked needs the field 'mask' of shape \(1, 2, 4, 4\), .*set lacks it; encode"
        ),
        (("flow.weighting=minsnr",), ConfigError, "flow.weighting: no weighting 'minsnr'"),
        (("flow.mode_scale=2", "flow.timestep_sampling=mode"), ConfigError, "flow.mode_scale is 2.0, "
        "expected -1 to 1.75"),
        (("flow.noise_offset=-1",), ConfigError, "flow.noise_offset is -1.0, expected 0 or more"),
        (("flow.logit_std=2",), ConfigError, "flow.logit_std is 2, but flow.timestep_sampling shift takes"),
    ):
        with pytest.raises(error, match=says):
            train.run(config(shards, tmp_path / "x", *options))


def test_what_is_trained_is_shown(tmp_path, monkeypatch, capfd):
    """Of a config that nothing is trained with yet, and not where the run will be;
    the numbers are the formulas'."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {dit: tiny:dit.safetensors}\nflow: {timestep_sampling: uniform, weighting: cosmap, "
        "max_sigma: 0.5}\n"
    )
    assert main(["train", str(file), "--show-timesteps", "run.output_dir=there"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert (
        out[0].startswith("tiny: uniform, cosmap weighting, latents of ")
        and out[-1] == "drawn in timesteps.png"
    )
    rows = {float(line.split()[0]): line.split() for line in out[2:-1]}
    assert (
        float(rows[0.1][-3]) == pytest.approx(2, abs=0.01) and rows[0.7][-3] == "0.000"
        and "#" not in rows[0.7][1]
    )
    assert float(rows[0.3][-2]) == pytest.approx(2 / (math.pi * (1 - 0.6 + 0.18)), rel=0.01)
    assert rows[0.1][1] == "#" * 40
    image = Image.open(tmp_path / "timesteps.png").convert("RGB")
    low, high = (sum(image.getpixel((x, y)) == (120, 160, 215) for y in range(420)) for x in (200, 700))
    assert low > 200 > high == 0
    assert {p.name for p in tmp_path.iterdir()} == {"run.yaml", "timesteps.png"}
