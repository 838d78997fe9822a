"""What a run says of itself: TensorBoard as its own reader reads it, Weights & Biases, shares of time, norms of parts, MFU."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvtrain.config import AdapterConfig, ModelConfig, RunSettings
from hvtrain.errors import ConfigError
from hvtrain.models import find
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.train import run as train
from hvtrain.train.checkpoint import Progress
from hvtrain.train.engine import StepResult
from hvtrain.train.gradients import norms_of_parts, parts_of
from hvtrain.train.loop import StepReport
from hvtrain.train.metrics import loss_by_set
from hvtrain.train.mfu import Work, peak_of, work_of
from hvtrain.train.monitor import Monitor
from hvtrain.train.progress import ProgressLine, duration
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards

ENGINES = {
    "torch": ("zero.engine=torch",), "zero2": ("zero.engine=deepspeed", "zero.stage=2", "run.peak_tflops=0.5"),
    "zero3": ("zero.engine=deepspeed", "zero.stage=3"),
}
SLOW = {
    "zero0": ("zero.engine=deepspeed", "zero.stage=0"),
    "offload": ("zero.engine=deepspeed", "zero.stage=2", "zero.offload_optimizer=cpu"),
}


def _runs(folder: Path, engines: dict[str, tuple[str, ...]]) -> None:
    for engine, options in engines.items():
        cfg = config(
            folder / "a", folder / engine, f"data.shards=[{folder / 'a'}, {folder / 'b'}]", "run.steps=4", "data.batch_size=1",
            f"eval.shards={folder / 'a'}", "eval.every_steps=2", "eval.max_batches=1",
            "run.profile_every=2", "run.save_every_steps=2", "data.calibration=0", *options,
        )
        assert train.run(cfg, start()) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    make_shards(folder / "a", n=4)
    make_shards(folder / "b", n=4, seed=2)
    run_ranks(2, _runs, folder, ENGINES)
    return folder


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_reads_back_what_the_lines_say(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "zero2/tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    want: dict[str, list] = {}
    for row in rows(folder / "zero2"):
        for name, value in row.items():
            if name not in ("step", "time"):
                want.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]} == want
    steps = [1, 2, 3, 4]
    for name in ("train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_s", "speed/mfu", "speed/memory_gib",
                 "speed/slowest_rank", "speed/data_share", "speed/save_share"):
        assert [step for step, _ in want[name]] == steps, name
    assert [step for step, _ in want["eval/loss"]] == [2, 4] == [step for step, _ in want["speed/collectives_share"]]
    assert len(read.Histograms("train/sigma")) == 1 and "config" in str(read.Tags()["tensors"])


def makes_up_the_whole(folder: Path, engine: str) -> None:
    """Whatever lies where, the parts are of the whole gradient, and the same as under plain PyTorch."""
    every = [[row for row in rows(folder / name) if "train/loss" in row] for name in (engine, "torch")]
    for row, plain in zip(*every, strict=True):
        parts = {name: value for name, value in row.items() if name.startswith("train/grad_norm/")}
        assert set(parts) == {f"train/grad_norm/{p}" for p in (
            "double_blocks.0-0", "double_blocks.1-1", *(f"single_blocks.{i}-{i}" for i in range(4)))}
        assert math.sqrt(sum(v * v for v in parts.values())) == pytest.approx(row["train/grad_norm"], rel=1e-5)
        assert row["train/grad_norm"] > 0 and parts == pytest.approx({name: plain[name] for name in parts}, rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_norms_of_the_parts_make_up_the_whole(folder, engine):
    makes_up_the_whole(folder, engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SLOW)
def test_norms_of_the_parts_elsewhere(folder, engine):
    run_ranks(2, _runs, folder, {engine: SLOW[engine]})
    makes_up_the_whole(folder, engine)


def test_losses_by_set_and_shares(folder):
    seen = set()
    for row in rows(folder / "zero2"):
        if "train/loss" not in row:
            continue
        own = {name.rpartition("/")[2]: value for name, value in row.items() if "loss_by_set" in name}
        seen |= set(own)
        assert min(own.values()) - 1e-5 <= row["train/loss"] <= max(own.values()) + 1e-5
        assert 0 <= row["speed/data_share"] < 1 and row["speed/slowest_rank"] in (0, 1) and 0 < row["speed/mfu"] < 1
        if row["step"] == 3:
            assert row["speed/save_share"] > 0  # of the save after step 2
        if "speed/collectives_share" in row:
            assert row["speed/collectives_share"] > 0
    assert seen == {"a", "b"}


# --- alone ------------------------------------------------------------------------------------------------------------


def report(step: int, **more) -> StepReport:
    return StepReport(
        **{"progress": Progress(step, 10 * step, 1), "result": StepResult(2.0, 1e-3, False), "loss": 0.5,
           "sample_loss": np.array([0.25, 0.75]), "sigma": np.array([0.05, 0.95]), "n_tokens": 60, "keys": ("a", "b"),
           "seconds": 0.5, "waited": 0.0, "sets": (0, 1), "work": ((2, 30),), **more}
    )


def recorder():
    said: dict[int, dict] = {}
    metrics = SimpleNamespace(scalars=lambda step, values: said.setdefault(step, {}).update(values), histogram=lambda *a: None)
    return metrics, said


def test_shares_are_of_all_the_time_since_the_last_entry(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 10.0]).__next__
    monkeypatch.setattr("hvtrain.train.monitor.time", SimpleNamespace(monotonic=clock))
    metrics, said = recorder()
    line, work = ProgressLine(4, start=0, show=False), Work(10, 2, 1, 1e3)
    monitor = Monitor(ParallelContext(), metrics, line, 4, 2, ["a", "b"], work, since=0)
    with monitor.spending("save"):
        pass  # 4 s
    monitor.log(report(1, waited=1.0))
    assert not said
    monitor.log(report(2, waited=1.5))
    got = said[2]
    assert got["speed/save_share"] == 0.4 and got["speed/data_share"] == 0.25
    assert got["speed/mfu"] == pytest.approx(2 * 2 * (10 + 2 * 30 + 30**2) / (10 * 1e3)) and got["speed/tokens_per_s"] == 120
    assert (got["train/loss_by_set/a"], got["train/loss_by_set/b"]) == (0.25, 0.75) == (
        got["train/loss_by_sigma/0.0"], got["train/loss_by_sigma/0.9"])
    assert monitor.spent == {} and monitor.flops == 0


def test_the_slowest_rank_is_named_and_peers_count_once(monkeypatch):
    """Four ranks, two and two with the same samples: their tokens are of one."""
    ranks = [(s, 60, bad, 1000.0, {"data": w}, np.array([0.5]), np.array([1.0]), np.array([0]))
             for s, bad, w in ((1.0, 1, 0.0), (1.0, 1, 0.2), (3.0, 2, 0.6), (1.5, 2, 0.0))]
    monkeypatch.setattr(ParallelContext, "gather_objects", lambda self, mine: ranks)
    metrics, said = recorder()
    ctx = ParallelContext(world=4, dp=2, ulysses=2)
    line, since = ProgressLine(4, start=0, show=False), time.monotonic() - 10
    monitor = Monitor(ctx, metrics, line, 4, 1, work=Work(0, 0, 0, 1e3), since=since)
    monitor.log(report(1))
    got = said[1]
    assert (got["speed/slowest_rank"], got["speed/slowest_rank_s"], got["speed/tokens_per_s"]) == (2, 3.0, 40.0)
    assert got["data/bad_samples"] == 3 and got["speed/data_share"] == pytest.approx(0.2)
    assert got["speed/mfu"] == pytest.approx(4000 / 2 / (10 * 4 * 1e3), rel=0.01)
    assert not any("loss_by_set" in name for name in got)


def test_parts_are_quarters_of_the_depth():
    names = [f"blocks.{i}.w" for i in range(10)] + ["net.single.0.w", "net.single.1.b", "head.w", "blocks.9.b"]
    assert parts_of(names) == {
        "blocks.0-2": ("blocks.0.w", "blocks.1.w", "blocks.2.w"), "blocks.3-5": ("blocks.3.w", "blocks.4.w", "blocks.5.w"),
        "blocks.6-8": ("blocks.6.w", "blocks.7.w", "blocks.8.w"), "blocks.9-9": ("blocks.9.w", "blocks.9.b"),
        "net.single.0-0": ("net.single.0.w",), "net.single.1-1": ("net.single.1.b",), "rest": ("head.w",),
    }
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert norms_of_parts(grads, {"x": ("a", "b"), "y": ("b",), "z": ("gone",)}) == {"x": 5.0, "y": 4.0, "z": 0.0}
    assert norms_of_parts({}, {"x": ("a",)}, total=lambda sums: sums.add_(9.0)) == {"x": 3.0}


def test_one_set_needs_no_loss_of_its_own():
    assert loss_by_set(["a"], np.array([0, 0]), np.array([1.0, 2.0])) == {}
    three = loss_by_set(["a", "b", "c"], np.array([0, 2, 2]), np.array([1.0, 2.0, 4.0]))
    assert three == {"loss_by_set/a": 1.0, "loss_by_set/c": 3.0}


@pytest.mark.parametrize("kind, each", [("none", 6), pytest.param("lora", 4, marks=pytest.mark.slow)])
def test_operations_are_counted_once_and_known_of_every_size(kind, each):
    """Of each weight and token six, of a LoRA's frozen ones four; the polynomial is exact at a size that was not traced."""
    from hvtrain.config import ParallelConfig, ZeroConfig
    from hvtrain.fit.estimate import Candidate, Training, flops_of_sample
    from hvtrain.fit.trace import Shape

    spec = find("hunyuan-video")
    flavor, run, adapter = spec.flavor("tiny"), RunSettings(), AdapterConfig(type=kind, rank=4)
    work = work_of(spec, flavor, ModelConfig(), adapter, run, peak=1.0)
    about, cfg = Candidate(spec, flavor), Training(ModelConfig(), adapter, ParallelConfig(), ZeroConfig("torch", 0), run)
    n = flavor.latent.n_tokens(flavor.latent.shape(frames=9, height=96, width=64))
    assert work.flops(n) == pytest.approx(flops_of_sample(cfg, about, Shape(1, 9, 96, 64)), rel=1e-3)
    with torch.device("meta"):
        layers = {n: m for n, m in spec.build(flavor.arch).named_modules() if isinstance(m, torch.nn.Linear) and "mod" not in n}
    met = sum(m.weight.numel() for n, m in layers.items() if "single_blocks" in n or ("double_blocks" in n and ".img_" in n))
    text = next(field.longest for field in flavor.cond if field.ragged)  # attention is of image and text: c (n + text)^2
    assert (work.b - 2 * work.c * text) / met == pytest.approx(each, rel=0.05) and work.c > 0


def test_what_a_device_can_do():
    assert peak_of("NVIDIA H100 80GB HBM3", None) == 989e12 and peak_of("NVIDIA H100 PCIe", None) == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", None) == 312e12 and peak_of("NVIDIA GB200", None) == 2500e12
    assert peak_of("CPU", None) is None and peak_of("CPU", 2.0) == 2e12


def test_time_left_is_told_as_people_do():
    told = {5.4: "5 s", 99: "99 s", 100: "2 min", 3600: "60 min", 6000: "1 h 40 min", 10980: "3 h 03 min"}
    assert {seconds: duration(seconds) for seconds in told} == told


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    logged: list = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"),
        config=SimpleNamespace(update=lambda values, allow_val_change: logged.append(("config", values))),
    )
    begun: list[dict] = []
    fake = SimpleNamespace(init=lambda **options: begun.append(options) or run, Histogram=list, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    shards = make_shards(tmp_path / "shards", n=2)
    for steps in (1, 2):
        assert train.run(config(shards, tmp_path / "run", f"run.steps={steps}", "run.wandb=project", "data.calibration=0")) == 0
    assert begun[0] == begun[1] and len(begun[0]["id"]) == 16  # the run that goes on is theirs that goes on
    told = {"project": "project", "name": "lora", "id": "", "resume": "allow", "dir": str(tmp_path / "run")}
    assert begun[0] | {"id": ""} == told
    entries = [e for e in logged if isinstance(e[0], int) and "train/loss" in e[1]]
    losses = {step: values["train/loss"] for step, values in entries}
    assert losses == {row["step"]: row["train/loss"] for row in rows(tmp_path / "run")} and logged.count("finished") == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run.wandb: the package wandb is not installed: pip install wandb"):
        train.run(config(shards, tmp_path / "run", "run.wandb=project"))


@pytest.mark.slow
def test_a_thousand_steps_cost_no_memory_and_logging_them_little(tmp_path):
    from tests.bench.bench_soak import soak

    found = soak(tmp_path, 1000)
    assert found.growth_mib < 16 and found.overhead < 0.03, found
