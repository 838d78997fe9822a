"""Previews of a training run are what generation would make, also for models with true guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hvtrain.config import TrainConfig, load
from hvtrain.generate.video import read_metadata
from hvtrain.parallel.context import ParallelContext
from hvtrain.train.preview import Previews
from hvtrain.train.setup import Subject
from tests.generate.models import random_dit, spec_and_flavor


def previews(folder: Path, cfg_scale: float) -> Previews:
    spec, flavor = spec_and_flavor()
    flavor = replace(flavor, defaults=replace(flavor.defaults, cfg_scale=cfg_scale, negative_prompt="a red circle"))
    prompt = "{prompt: a blue ring moves left, width: 48, height: 48, frames: 5, steps: 2}"
    cfg = load(TrainConfig, Path(__file__).parents[2] / "configs" / "tiny" / "model.yaml", [
        f"run.output_dir={folder}", "preview.every_steps=1", f"preview.prompts=[{prompt}]", "run.precision=fp32",
    ])
    return Previews(cfg, Subject(random_dit(), spec, flavor, "", {}), ParallelContext())


@pytest.mark.parametrize("training", [True, False])
def test_a_preview_is_a_file_and_leaves_the_model_as_it_was(tmp_path: Path, training: bool) -> None:
    subject = previews(tmp_path, cfg_scale=1.0)
    model = subject.subject.model.train(training)
    ((name, frames, fps),) = subject.make(model, step=7)
    assert (name, frames.shape, frames.dtype, fps) == ("preview/0", (5, 48, 48, 3), np.uint8, 8)
    assert model.training == training and torch.is_grad_enabled()
    assert read_metadata(tmp_path / "previews" / "step00000007_0.mp4")["prompt"] == "a blue ring moves left"


def test_true_guidance_is_applied(tmp_path: Path) -> None:
    made = []
    for scale in (1.0, 4.0):
        subject = previews(tmp_path, cfg_scale=scale)
        made.append(next(iter(subject.make(subject.subject.model, step=1)))[1].astype(int))
    assert np.abs(made[0] - made[1]).mean() > 2
