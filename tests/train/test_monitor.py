"""What a run says of itself: TensorBoard as its own reader reads it, Weights & Biases, shares
of time, norms of parts, MFU."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvtrain.config import AdapterConfig, ModelConfig, RunSettings, ZeroConfig
from hvtrain.errors import ConfigError
from hvtrain.models import find
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.train import run as train
from hvtrain.train.checkpoint import Progress
from hvtrain.train.engine import Step, StepResult, build_engine
from hvtrain.train.evaluate import HeldOut, held_out_loss
from hvtrain.train.files import RunFiles
from hvtrain.train.loop import StepReport
from hvtrain.train.metrics import SEEN_S, JsonLines, TensorBoard, loss_by_set
from hvtrain.train.mfu import Work, peak_of, work_of
from hvtrain.train.monitor import Monitor, collective_seconds
from hvtrain.train.progress import ProgressLine, duration
from shards import open_set
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards
from tests.train.test_optimizer_table import SOME, check_reached, train_cells

ROOT = Path(__file__).parents[2]
ENGINES = {
    "torch": ("zero.engine=torch",),
    "zero2": ("zero.engine=deepspeed", "zero.stage=2", "run.peak_tflops=0.5"),
    "zero3": ("zero.engine=deepspeed", "zero.stage=3"),
}
SLOW = {
    "zero0": ("zero.engine=deepspeed", "zero.stage=0"),
    "offload": ("zero.engine=deepspeed", "zero.stage=2", "zero.offload_optimizer=cpu"),
}


def _runs(folder: Path, engines: dict[str, tuple[str, ...]], cells: Sequence = ()) -> dict:
    for engine, options in engines.items():
        cfg = config(
            folder / "a", folder / engine, f"data.shards=[{folder / 'a'}, {folder / 'b'}]", "run.steps=4",
            "data.batch_size=1", f"eval.shards={folder / 'a'}", "eval.every_steps=2", "eval.max_batches=1",
            "run.profile_every=2", "run.save_every_steps=2", "data.calibration=0", *options,
        )
        assert train.run(cfg, start()) == 0
    return train_cells(folder, list(cells))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    make_shards(folder / "a", n=4)
    make_shards(folder / "b", n=4, seed=2)
    make_shards(folder / "shards", n=4)
    reached = run_ranks(2, _runs, folder, ENGINES, SOME)[0]
    (folder / "reached.json").write_text(json.dumps([*reached.items()]))
    return folder


def test_some_cells_of_the_table_of_optimizers_learn(folder):
    reached = {tuple(at): loss for at, loss in json.loads((folder / "reached.json").read_text())}
    assert list(reached) == SOME
    check_reached(folder, reached)


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
    for name in (
        "train/loss", "train/lr", "train/grad_norm", "speed/tokens_per_s", "speed/mfu", "speed/memory_gib",
        "speed/slowest_rank", "speed/data_share", "speed/save_share"
    ):
        assert [step for step, _ in want[name]] == steps, name
    assert [step for step, _ in want["eval/loss"]] == [2, 4] == [
        step for step, _ in want["speed/collectives_share"]
    ]
    assert len(read.Histograms("train/sigma")) == 1 and "config" in str(read.Tags()["tensors"])


def makes_up_the_whole(folder: Path, engine: str) -> None:
    """Whatever lies where, the parts are of the whole gradient, and the same as under plain PyTorch."""
    every = [[row for row in rows(folder / name) if "train/loss" in row] for name in (engine, "torch")]
    for row, plain in zip(*every, strict=True):
        parts = {name: value for name, value in row.items() if name.startswith("train/grad_norm/")}
        assert set(parts) == {f"train/grad_norm/{p}" for p in (
            "double_blocks.0-0", "double_blocks.1-1", *(f"single_blocks.{i}-{i}" for i in range(4)))}
        assert math.sqrt(sum(v * v for v in parts.values())) == pytest.approx(
            row["train/grad_norm"], rel=1e-5
        )
        assert (
            row["train/grad_norm"] > 0
            and parts == pytest.approx({name: plain[name] for name in parts}, rel=1e-3)
        )


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
        assert (
            0 <= row["speed/data_share"] < 1 and row["speed/slowest_rank"] in (0, 1)
            and 0 < row["speed/mfu"] < 1
        )
        if row["step"] == 3:
            assert row["speed/save_share"] > 0  # of the save after step 2
        if "speed/collectives_share" in row:
            assert row["speed/collectives_share"] > 0
    assert seen == {"a", "b"}


# --- alone --------------------------------------------------------------------------------------------------


def report(step: int, **more) -> StepReport:
    return StepReport(
        **{"progress": Progress(step, 10 * step, 1), "result": StepResult(2.0, 1e-3, False), "loss": 0.5,
           "sample_loss": np.array([0.25, 0.75]), "sigma": np.array([0.05, 0.95]), "n_tokens": 60,
           "keys": ("a", "b"), "seconds": 0.5, "waited": 0.0, "sets": (0, 1), "work": ((2, 30),), **more}
    )


def recorder():
    said: dict[int, dict] = {}
    metrics = SimpleNamespace(
        scalars=lambda step, values: said.setdefault(step, {}).update(values), histogram=lambda *a: None
    )
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
    assert (
        got["speed/mfu"] == pytest.approx(2 * 2 * (10 + 2 * 30 + 30**2) / (10 * 1e3))
        and got["speed/tokens_per_s"] == 120
    )
    assert (got["train/loss_by_set/a"], got["train/loss_by_set/b"]) == (0.25, 0.75) == (
        got["train/loss_by_sigma/0.0"], got["train/loss_by_sigma/0.9"])
    assert monitor.spent == {} and monitor.flops == 0


def test_a_histogram_is_of_the_noise_levels_since_the_last():
    """Of the entries, every second step and the last."""
    found: list = []
    metrics = SimpleNamespace(
        scalars=lambda *_: None, histogram=lambda name, step, values: found.append((step, len(values)))
    )
    monitor = Monitor(ParallelContext(), metrics, ProgressLine(45, start=0, show=False), 45, 2)
    for step in range(1, 46):
        monitor.log(report(step))
    assert found == [(40, 40), (45, 6)]


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
    assert (
        got["speed/slowest_rank"], got["speed/slowest_rank_s"], got["speed/tokens_per_s"]
    ) == (2, 3.0, 40.0)
    assert got["data/bad_samples"] == 3 and got["speed/data_share"] == pytest.approx(0.2)
    assert got["speed/mfu"] == pytest.approx(4000 / 2 / (10 * 4 * 1e3), rel=0.01)
    assert not any("loss_by_set" in name for name in got)


def test_norms_of_parts_are_found_in_the_steps_that_are_logged():
    model, step = torch.nn.Linear(3, 1, bias=False), Step(parts={"rest": ("weight",)}, parts_every=2)
    params = dict(model.named_parameters())
    sgd = torch.optim.SGD(params.values(), lr=0.0)
    engine = build_engine(
        model, params, ZeroConfig("torch", 0), ParallelContext(), optimizer=sgd, schedule=lambda n: 1.0,
        step=step
    )
    found = [engine.accumulate(model(torch.ones(1, 3)).sum(), last=True) for _ in range(4)]
    assert [result.norms for result in found] == [{}, {"rest": pytest.approx(3**0.5)}] * 2
    assert all(result.grad_norm == pytest.approx(3**0.5) for result in found)


def test_what_a_continued_run_makes_void_is_gone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # a run that went on from step 2
    for value, purge, steps in ((1.0, None, range(1, 6)), (2.0, 3, range(3, 5))):
        with closing(TensorBoard(tmp_path, purge_step=purge)) as board:
            for step in steps:
                board.scalars(step, {"loss": value})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in read] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_time_in_collectives_is_that_of_nccl_and_gloo():
    """Of each, on the device or on the host, the longer; microseconds in, seconds out."""
    def event(name, device, host):
        return SimpleNamespace(name=name, device_time_total=device, cpu_time_total=host)

    seen = [
        event("ncclDevKernel_AllReduce", 5e5, 10), event("gloo:all_reduce", 0, 25e4),
        event("aten::mm", 9e6, 9e6)
    ]
    assert collective_seconds(seen) == 0.75


def test_measuring_it_says_nothing():
    """The profiler's own lines, two a measured step, are of no use in a log of
    training. It asks once in a process."""
    code = (
        "import torch; from hvtrain.parallel.context import ParallelContext, start; from "
        "hvtrain.train.monitor import Monitor\nstart(); monitor = Monitor(ParallelContext(world=2), None, "
        "None, 4, 1, profile=2)\nwith monitor.measured(2): torch.ones(2) + 1\n"
        "print(*monitor.spent)"
    )
    env = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "collectives\n" and "profiler" not in done.stderr


def test_one_set_needs_no_loss_of_its_own():
    assert loss_by_set(["a"], np.array([0, 0]), np.array([1.0, 2.0])) == {}
    three = loss_by_set(["a", "b", "c"], np.array([0, 2, 2]), np.array([1.0, 2.0, 4.0]))
    assert three == {"loss_by_set/a": 1.0, "loss_by_set/c": 3.0}


@pytest.mark.parametrize("kind, each", [("none", 6), pytest.param("lora", 4, marks=pytest.mark.slow)])
def test_operations_are_counted_once_and_known_of_every_size(kind, each):
    """Of each weight and token six, of a LoRA's frozen ones four; the polynomial is exact at
    a size that was not traced."""
    from hvtrain.config import ParallelConfig
    from hvtrain.fit.estimate import Candidate, Training, flops_of_sample
    from hvtrain.fit.trace import Shape

    spec = find("hunyuan-video")
    flavor, run, adapter = spec.flavor("tiny"), RunSettings(), AdapterConfig(type=kind, rank=4)
    work = work_of(spec, flavor, ModelConfig(), adapter, run, peak=1.0)
    about, cfg = (
        Candidate(spec, flavor),
        Training(ModelConfig(), adapter, ParallelConfig(), ZeroConfig("torch", 0), run)
    )
    n = flavor.latent.n_tokens(flavor.latent.shape(frames=9, height=96, width=64))
    assert work.flops(n) == pytest.approx(flops_of_sample(cfg, about, Shape(1, 9, 96, 64)), rel=1e-3)
    with torch.device("meta"):
        layers = {
            n: m for n,
            m in spec.build(flavor.arch).named_modules() if isinstance(m, torch.nn.Linear) and "mod" not in n
        }
    met = sum(
        m.weight.numel() for n,
        m in layers.items() if "single_blocks" in n or ("double_blocks" in n and ".img_" in n)
    )
    # attention is of image and text: c (n + text)^2
    text = next(field.longest for field in flavor.cond if field.ragged)
    assert (work.b - 2 * work.c * text) / met == pytest.approx(each, rel=0.05) and work.c > 0


@pytest.mark.parametrize(
    "kind, counted", [("loraid", "lora"), ("lora", "lora"), ("none", "none"), ("lokr", "lokr")]
)
def test_a_slices_backward_goes_through_all_blocks(kind, counted, monkeypatch):
    traced = []
    monkeypatch.setattr(
        "hvtrain.fit.estimate.flops_of_sample", lambda cfg, *_: traced.append(cfg.adapter.type) or 1.0
    )
    spec = find("hunyuan-video")
    work_of(spec, spec.flavor("tiny"), ModelConfig(), AdapterConfig(type=kind), RunSettings(), peak=1.0)
    assert traced == [counted] * 3


def test_what_a_device_can_do():
    assert peak_of("NVIDIA H100 80GB HBM3", None) == 989e12 and peak_of("NVIDIA H100 PCIe", None) == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", None) == 312e12 and peak_of("NVIDIA GB200", None) == 2500e12
    assert peak_of("CPU", None) is None and peak_of("CPU", 2.0) == 2e12


def test_time_left_is_told_as_people_do():
    told = {5.4: "5 s", 99: "99 s", 100: "2 min", 3600: "60 min", 6000: "1 h 40 min", 10980: "3 h 03 min"}
    assert {seconds: duration(seconds) for seconds in told} == told


def test_a_run_that_goes_on_from_before_says_each_step_once(tmp_path):
    """What came after its checkpoint is void, in both files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(
        make_shards(tmp_path / "shards", n=2), tmp_path / "run", "run.steps=4", "run.save_every_steps=2",
        "data.calibration=0"
    )
    assert train.run(cfg) == 0
    shutil.rmtree(sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1])
    (tmp_path / "run/lora.safetensors").unlink()
    assert train.run(cfg) == 0
    read = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in read] == [1, 2, 3, 4] == [row["step"] for row in rows(tmp_path / "run")]


def test_a_row_is_seen_soon_and_a_saved_step_at_once(tmp_path):
    """A quick run does not write for every row; a kill loses none before the last checkpoint."""
    log = tmp_path / "metrics.jsonl"
    rows = JsonLines(tmp_path)
    rows.scalars(1, {"train/loss": 1.0})
    assert len(log.read_text().splitlines()) == 1
    rows.flushed = math.inf  # a moment ago
    rows.scalars(2, {"train/loss": 1.0})
    assert len(log.read_text().splitlines()) == 1
    rows.flush()
    assert len(log.read_text().splitlines()) == 2
    rows.flushed = time.monotonic() - SEEN_S
    rows.scalars(3, {"train/loss": 1.0})
    assert len(log.read_text().splitlines()) == 3


def test_a_checkpoint_has_all_rows_before_it(tmp_path, monkeypatch):
    """Whoever goes on from it after a kill does not log its steps again."""
    seen = {}
    save = RunFiles.save

    def killed_here(files, snapshot, note):
        seen[snapshot.progress.step] = [row["step"] for row in rows(tmp_path / "run")]
        save(files, snapshot, note)

    monkeypatch.setattr(RunFiles, "save", killed_here)
    monkeypatch.setattr("hvtrain.train.metrics.SEEN_S", math.inf)
    cfg = config(
        make_shards(tmp_path / "shards", n=2), tmp_path / "run", "run.steps=4", "run.save_every_steps=3",
        "data.calibration=0"
    )
    assert train.run(cfg) == 0
    assert seen == {3: [1, 2, 3], 4: [1, 2, 3, 4]}


def test_the_average_counts_the_newest_most():
    line = ProgressLine(3, start=0, show=False)
    for step, loss in enumerate((1.0, 2.0, math.nan), start=1):
        line.update(step, loss=loss, lr=1.0, seconds=1.0)
    assert line.sum / line.weight == pytest.approx((0.95 * 1 + 2) / (0.95 + 1))


def test_the_held_out_loss_is_the_mean_of_all_its_batches(tmp_path):
    found = open_set(make_shards(tmp_path, n=4))
    fake = SimpleNamespace(
        quantile=lambda u, shape: u,
        compare=lambda model, batch, *, sigma,
        draw: SimpleNamespace(loss=batch["latents"].float().mean() + sigma.mean()),
    )
    held = HeldOut([found], 1, (0.25, 0.75), max_batches=10)
    got = held_out_loss(lambda sigma: None, fake, held, ctx=ParallelContext())
    mean = sum(found.get(i).tensors["latents"].float().mean().item() for i in range(4)) / 4
    want = {"eval/loss": mean + 0.5, "eval/loss_q0.25": mean + 0.25, "eval/loss_q0.75": mean + 0.75}
    assert got == {name: pytest.approx(value, abs=1e-6) for name, value in want.items()}


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    logged: list = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"),
        config=SimpleNamespace(update=lambda values, allow_val_change: logged.append(("config", values))),
    )
    begun: list[dict] = []
    fake = SimpleNamespace(
        init=lambda **options: begun.append(options) or run, Histogram=list, __spec__=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    shards = make_shards(tmp_path / "shards", n=2)
    for steps in (1, 2):
        assert train.run(
            config(shards, tmp_path / "run", f"run.steps={steps}", "run.wandb=project", "data.calibration=0")
        ) == 0
    assert begun[0] == begun[1] and len(begun[0]["id"]) == 16  # the run that goes on is theirs that goes on
    told = {"project": "project", "name": "lora", "id": "", "resume": "allow", "dir": str(tmp_path / "run")}
    assert begun[0] | {"id": ""} == told
    entries = [e for e in logged if isinstance(e[0], int) and "train/loss" in e[1]]
    losses = {step: values["train/loss"] for step, values in entries}
    assert (
        losses == {row["step"]: row["train/loss"] for row in rows(tmp_path / "run")}
        and logged.count("finished") == 2
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run.wandb: the package wandb is not installed: pip install wandb"):
        train.run(config(shards, tmp_path / "run", "run.wandb=project"))


@pytest.mark.slow
def test_a_thousand_steps_cost_no_memory_and_logging_them_little(tmp_path):
    from tests.bench.bench_soak import soak

    found = soak(tmp_path, 1000)
    assert found.growth_mib < 16 and found.overhead < 0.03, found
