"""Wan's memory: 14B at full size on 1 to 64 GPUs by arithmetic, a small one against
real training, two experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hvtrain.adapters.attach import inject
from hvtrain.config import TrainConfig, load
from hvtrain.fit.estimate import Training, candidate, of_training, placed, shape_of
from hvtrain.models import find
from hvtrain.models.wan.inputs import WanInput
from launcher import cli
from tests.fit import measure
from tests.fit.measure import Setting, allocated_bytes, predicted

N = 14_288_491_584  # weights of the 14B: of 1095 official tensors
GIB = 2**30


def sections(*items: str) -> Training:
    cfg = load(
        TrainConfig, None, ["model.name=wan", "data.shards=x", "run.output_dir=x", "run.steps=1", *items]
    )
    return Training(cfg.model, cfg.adapter, cfg.parallel, cfg.zero, cfg.run)


@pytest.mark.parametrize("gpus", [1, 8, 16, 64])
def test_the_14b_on_gpus_of_80_gib(gpus: int) -> None:
    """A LoRA holds bfloat16 weights whole; a full fine-tune shares 4 + 12 bytes a weight."""
    lora, full = (
        sections("model.flavor=t2v-14b"),
        sections("model.flavor=t2v-14b", "adapter.type=none", "zero.stage=3")
    )
    about = candidate(lora.model)
    shape = shape_of(about.flavor, width=832, height=480, frames=81)
    tuned, whole = (of_training(cfg, about, shape, gpus).budget for cfg in (lora, full))
    # rank 32 on 10 layers of 40 blocks
    n_lora = 40 * 32 * sum((6 * (5120 + 5120), 2 * (5120 + 5120), 2 * (5120 + 13824)))
    assert tuned.weights == pytest.approx(2 * N + 4 * n_lora, rel=1e-3)
    assert tuned.optimizer == pytest.approx(12 * n_lora / gpus, rel=1e-3)
    assert whole.optimizer == pytest.approx(12 * N / gpus, rel=1e-3)
    held = 4 * N / gpus
    assert held < whole.weights <= held + 4 * (10**9 + 2**28)  # and what ZeRO-3 gathers ahead
    assert (tuned.total < 75 * GIB) and (whole.total < 75 * GIB) == (gpus >= 16)


def test_two_experts_take_turns() -> None:
    """One computes; the other's weights, unless they wait on the host, and its
    optimizer's state are there."""
    keys = ("model.flavor=tiny-a14b", "zero.stage=2", "adapter.rank=4")
    one, both = sections("model.experts=high", *keys), sections("model.experts=both", *keys)
    about, shape = candidate(both.model), shape_of(candidate(both.model).flavor)
    n = sum(p.numel() for p in find("wan").build(about.flavor.arch).parameters())
    single = of_training(one, about, shape, 8).budget
    on_host, beside = (
        of_training(replace(both, run=replace(both.run, idle_expert=where)), about, shape, 8).budget
        for where in ("host", "device")
    )  # fmt: skip
    assert (
        beside.weights == 2 * single.weights and beside.optimizer == on_host.optimizer == 2 * single.optimizer
    )
    assert beside.total - on_host.total == pytest.approx(2 * n, rel=1e-3)
    assert (on_host.activations, on_host.gradients) == (single.activations, single.gradients)
    large = sections("model.experts=both", "model.flavor=t2v-a14b")
    for gib, where in ((80, "host"), (141, "device")):
        assert placed(large, candidate(large.model), gib * GIB).run.idle_expert == where
    assert placed(one, about, 1).run.idle_expert == "auto"
    stage3 = sections("model.experts=both", *keys, "zero.stage=3", "adapter.type=none")
    alone = of_training(replace(stage3, model=one.model), about, shape, 8).budget
    shared = of_training(placed(stage3, about, GIB), about, shape, 8).budget
    assert (
        shared.weights - alone.weights == pytest.approx(4 * n / 8, rel=1e-3)
        and shared.optimizer == 2 * alone.optimizer
    )


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    """A slice of both experts by the number of its blocks, without a plan's file."""
    model = ("model.name=wan", "model.flavor=tiny-a14b", "model.experts=both")
    keys = (*model, "adapter.type=loraid", "adapter.blocks_per_loraid=2")
    more = ("adapter.loraid=2", "adapter.rank=4", "data.shards=[x]", "run.output_dir=y", "run.steps=1")
    assert cli.main(["fit", *keys, *more, "--gpus", "1"]) == 0
    assert "wan tiny-a14b, 64 x 64 x 9 frames" in capsys.readouterr().out
    assert cli.main(["fit", *keys[:-1], *more, "--gpus", "1"]) == 2
    assert "give adapter.plan or adapter.blocks_per_loraid" in capsys.readouterr().err


SPEC = find("wan")
SMALL = replace(SPEC.flavor("tiny").arch, dim=192, ffn_dim=512, n_heads=4, n_layers=6)


def a_small_wan(setting: Setting):
    model = SPEC.build(SMALL)
    if setting.lora:
        inject(model, SPEC.lora_targets(model), rank=8)
    text = {"text": torch.zeros(1, 33, SMALL.text_dim)}
    inp = WanInput(
        x=torch.zeros(1, 16, *setting.tokens), t=torch.zeros(1), cond=text, lengths={"text": (33,)}
    )
    return model.train(), {n: p for n, p in model.named_parameters() if p.requires_grad}, inp


@pytest.mark.parametrize("setting", [Setting(recompute="full"), Setting(lora=False)], ids=["lora", "full"])
def test_the_prediction_is_within_a_tenth(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    monkeypatch.setattr(measure, "make", a_small_wan)
    assert predicted(setting).total == pytest.approx(allocated_bytes(setting), rel=0.10)
