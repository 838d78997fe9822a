"""The plain engine in one process: what an optimizer step is, number by number."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hvtrain.config import ZeroConfig
from hvtrain.errors import ConfigError
from hvtrain.parallel.context import ParallelContext
from hvtrain.train import engine as engines
from hvtrain.train.engine import (
    LearningRate,
    Step,
    TorchEngine,
    build_engine,
    check_engine,
    clip_,
    filled_grads,
    own_settings,
    to_cpu,
)

PLAIN = ZeroConfig(engine="torch", stage=0)
FREE = Step(max_grad_norm=0.0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.b = nn.Parameter(torch.tensor([[4.0]], dtype=torch.float64))
        self.unused = nn.Parameter(torch.tensor([7.0]))


def build(
    step: Step = FREE, *, optimizer=torch.optim.SGD, schedule=lambda n: 1.0, world: int = 1, **options
) -> TorchEngine:
    model = Two()
    params = dict(model.named_parameters())
    groups = [{"params": [params["a"], params["unused"]], "lr": 0.5}, {"params": [params["b"]], "lr": 0.25}]
    engine = build_engine(
        model, params, PLAIN, ParallelContext(world=world), optimizer=optimizer(groups, **options),
        schedule=schedule, step=step
    )
    assert isinstance(engine, TorchEngine) and engine.model is model
    return engine


def loss_of(engine: TorchEngine, a: float, b: float) -> torch.Tensor:
    """Its gradient is a in each element of the one parameter and b in the other."""
    return a * engine.params["a"].sum() + b * engine.params["b"].sum()


def values(engine: TorchEngine) -> list[float]:
    return [x for name in ("a", "b", "unused") for x in engine.params[name].flatten().tolist()]


def test_micro_steps_add_up_to_their_mean():
    engine = build(Step(2, 0.0))
    assert engine.accumulate(loss_of(engine, 1.0, 3.0), last=False) is None
    assert engine.n_steps == 0 and values(engine) == [1.0, 2.0, 4.0, 7.0]
    result = engine.accumulate(loss_of(engine, 3.0, 5.0), last=True)
    assert result is not None and not result.skipped and result.lr == 0.5 and engine.n_steps == 1
    assert result.grad_norm == pytest.approx(math.sqrt(2**2 + 2**2 + 4**2))  # of means 2, 2 and 4
    assert values(engine) == [1.0 - 0.5 * 2, 2.0 - 0.5 * 2, 4.0 - 0.25 * 4, 7.0]
    assert all(p.grad is None for p in engine.params.values())
    engine.accumulate(loss_of(engine, 0.0, 0.0), last=False)
    engine.accumulate(loss_of(engine, 2.0, 0.0), last=True)  # nothing of the first step is left
    assert values(engine) == [0.0 - 0.5, 1.0 - 0.5, 3.0, 7.0]


def test_a_norm_above_the_limit_is_scaled_down_to_it():
    engine = build(Step(max_grad_norm=1.5))
    result = engine.accumulate(loss_of(engine, 2.0, 1.0), last=True)  # gradients 2, 2, 1: norm 3
    assert result is not None and result.grad_norm == pytest.approx(3.0)  # as it was before
    assert values(engine) == pytest.approx([1 - 0.5 * 1.0, 2 - 0.5 * 1.0, 4 - 0.25 * 0.5, 7.0], rel=1e-6)


@pytest.mark.parametrize("limit", [0.0, 3.1, 100.0])
def test_a_norm_below_the_limit_is_left_alone(limit):
    """Never scaled up; a limit of 0 is none."""
    engine = build(Step(max_grad_norm=limit))
    result = engine.accumulate(loss_of(engine, 2.0, 1.0), last=True)
    assert result is not None and result.grad_norm == pytest.approx(3.0)
    assert values(engine) == [1 - 0.5 * 2.0, 2 - 0.5 * 2.0, 4 - 0.25 * 1.0, 7.0]


def test_the_norm_is_over_all_gradients():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]], dtype=torch.bfloat16), torch.tensor(12.0)]
    assert clip_(grads, 0.0).item() == 13.0 and grads[0].tolist() == [3.0, 0.0]
    norm = clip_(grads, 6.5)
    assert norm.item() == 13.0 and norm.dtype == torch.float32
    assert [g.flatten().tolist() for g in grads] == [
        pytest.approx(x, rel=1e-5) for x in ([1.5, 0], [2.0], [6.0])
    ]


def test_gradients_of_nearly_nothing_keep_size_and_sign():
    """However near to nothing: what keeps the division from 0 / 0 is added."""
    grads = [torch.tensor([0.0, 5e-7])]
    assert clip_(grads, 0.5).item() == pytest.approx(5e-7) and grads[0].tolist() == pytest.approx([0.0, 5e-7])
    grads = [torch.zeros(2)]
    assert clip_(grads, 0.5).item() == 0.0 and grads[0].tolist() == [0.0, 0.0]
    grads = [torch.tensor([3.0, 4.0])]
    assert clip_(grads, 0.5).item() == 5.0 and grads[0].tolist() == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    engine = build(Step(max_grad_norm=1.0), optimizer=torch.optim.AdamW)
    result = engine.accumulate(loss_of(engine, 1.0, bad), last=True)
    assert result is not None and result.skipped and not math.isfinite(result.grad_norm or 0.0)
    assert values(engine) == [1.0, 2.0, 4.0, 7.0] and engine.export_optimizer() == {}
    assert engine.n_steps == 1 and all(p.grad is None for p in engine.params.values())
    good = engine.accumulate(loss_of(engine, 1.0, 1.0), last=True)
    assert good is not None and not good.skipped and values(engine)[0] < 1.0


def test_the_rate_is_each_group_s_own_times_the_schedule():
    engine = build(schedule=lambda n: 1 / (n + 1))
    rates = []
    for _ in range(3):
        result = engine.accumulate(loss_of(engine, 0.0, 0.0), last=True)
        assert result is not None
        rates.append((result.lr, *(g["lr"] for g in engine.optimizer.param_groups)))
    assert rates == [(0.5 / n, 0.5 / n, 0.25 / n) for n in (1, 2, 3)]
    again = LearningRate(build().optimizer, lambda n: n / 10)
    assert again.set(4) == pytest.approx(0.2) and again.set(2) == pytest.approx(0.1)
    again.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 3.0})
    with pytest.raises(ValueError, match="shorter"):  # it would train at its own rate for ever
        again.set(5)


def test_a_rate_that_is_a_tensor_is_set_in_place():
    """A compiled step has it as an input: another tensor would not be seen."""
    engine = build()
    rates = [torch.tensor(0.5), torch.tensor(0.25)]
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert LearningRate(engine.optimizer, lambda n: n / 4).set(2) == 0.25
    assert [rate.item() for rate in rates] == [0.25, 0.125]
    assert all(group["lr"] is rate for group, rate in zip(engine.optimizer.param_groups, rates, strict=True))


def test_the_rate_of_an_optimizer_that_finds_it_is_times_what_it_found():
    engine = build()
    first, second = engine.optimizer.param_groups
    first["d"], second["d"] = 0.25, 7.0
    rate = LearningRate(engine.optimizer, lambda n: n / 4)
    assert rate.set(2) == 0.25  # some optimizer's own d, which is no rate
    first["d_max"] = 3.0
    assert rate.set(2) == 0.25 * 0.25 and [first["lr"], second["lr"]] == [0.25, 0.125]


def test_what_has_no_gradient_gets_zeros_of_its_own_shape():
    a, b = (nn.Parameter(torch.ones(2, 3, dtype=d)) for d in (torch.float32, torch.bfloat16))
    a.grad = torch.full((2, 3), 5.0)
    first, second = filled_grads([a, b])
    assert first is a.grad and second is b.grad and (first == 5).all()
    assert second.shape == (2, 3) and second.dtype == torch.bfloat16 and not second.any()


def test_exported_state_is_a_copy_in_float32_and_is_taken_back():
    engine = build(optimizer=torch.optim.AdamW, weight_decay=0.0)
    assert engine.export_optimizer() == {}
    for n in range(3):
        engine.accumulate(loss_of(engine, 1.0 + n, 2.0), last=True)
    params, state = engine.export_params(), engine.export_optimizer()
    assert [list(params), list(state)] == [["a", "b", "unused"]] * 2
    everything = [*params.values(), *(t for s in state.values() for t in s.values())]
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in everything)
    assert set(state["a"]) == {"step", "exp_avg", "exp_avg_sq"} and state["a"]["step"].item() == 3.0
    assert state["b"]["exp_avg"].item() == pytest.approx(2.0 * (1 - 0.9**3))
    kept = {name: t.clone() for name, t in params.items()}, state["a"]["exp_avg"].clone()
    resumed = build(optimizer=torch.optim.AdamW, weight_decay=0.0)
    resumed.load_state(params, state, n_steps=3)
    assert resumed.n_steps == 3 and resumed.params["b"].dtype == torch.float64
    for run in (engine, resumed):
        for n in range(2):
            run.accumulate(loss_of(run, 0.5, 1.0 + n), last=True)
    assert values(resumed) == pytest.approx(values(engine), rel=1e-6)
    assert resumed.export_optimizer()["a"]["step"].item() == 5.0
    # The steps went on in their own tensors, not in what was exported.
    assert (
        all(torch.equal(params[n], kept[0][n]) for n in params)
        and torch.equal(state["a"]["exp_avg"], kept[1])
    )
    assert state["a"]["step"].item() == 3.0


class Averaging(torch.optim.SGD):
    """Means other weights to be used than it trains, as schedule-free ones do: here by 100 more."""

    def eval(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(100.0)

    def train(self) -> None:
        pass


def test_what_is_exported_are_the_weights_that_the_optimizer_means_to_be_used():
    engine = build(optimizer=Averaging)
    with engine.settled():
        assert values(engine) == [101.0, 102.0, 104.0, 107.0]
    assert {n: p.tolist() for n, p in engine.export_params().items()} == {
        "a": [101.0, 102.0], "b": [[104.0]], "unused": [107.0]
    }
    assert values(engine) == [1.0, 2.0, 4.0, 7.0]  # the training goes on in its own


def test_state_of_another_order_of_groups_finds_its_parameters():
    """By name: the optimizer numbers its parameters by groups (a, unused, b here)."""
    engine = build(optimizer=torch.optim.AdamW)
    state = {
        n: {"step": torch.tensor(1.0), "exp_avg": torch.full(p.shape, v), "exp_avg_sq": torch.ones(p.shape)}
        for v,
        (n, p) in enumerate(engine.params.items())
    }  # fmt: skip
    engine.load_state({n: torch.full(p.shape, 10.0) for n, p in engine.params.items()}, state, n_steps=1)
    assert values(engine) == [10.0] * 4
    assert [s["exp_avg"].unique().item() for s in engine.export_optimizer().values()] == [0.0, 1.0, 2.0]
    engine.load_state(
        {n: torch.zeros(p.shape) for n, p in engine.params.items()}, {"b": state["b"]}, n_steps=1
    )
    assert list(engine.export_optimizer()) == ["b"]


def test_a_copy_of_what_is_exported_goes_to_the_cpu():
    class Watched(torch.Tensor):
        def to(self, *args, **options):  # type: ignore[override]
            assert (args, options) == (("cpu", torch.float32), {"copy": True})
            return super().to(*args, **options)

    assert to_cpu(torch.ones(2, dtype=torch.bfloat16).as_subclass(Watched)).dtype == torch.float32


@pytest.mark.parametrize(
    "bucket, sizes",
    [
        (1 << 26, [4, 1, 5]), (5, [4, 1, 5]), (4, [4, 1, 4, 1]), (3, [4, 1, 4, 1]), (2, [2, 2, 1, 4, 1]),
        (1, [2, 2, 1, 1, 3, 1])
    ],
)
def test_gradients_are_averaged_over_the_ranks_in_buckets(bucket, sizes, monkeypatch):
    """A bucket ends when it is full and where the type changes: float32 has 2 and 2 elements,
    float64 1, float32 1, 3 and 1."""
    sent: list[torch.Tensor] = []

    def all_reduce(flat: torch.Tensor) -> None:
        sent.append(flat.clone())
        flat.add_(2.0)  # the other ranks' sum

    monkeypatch.setattr(engines.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(engines, "BUCKET", bucket)
    double = torch.tensor([8.0], dtype=torch.float64)
    later = [torch.tensor([0.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0])]
    grads = [torch.tensor([[2.0], [6.0]]), torch.tensor([4.0, 10.0]), double, *later]
    engines._reduce(grads, ParallelContext(world=4))
    means = [[1.0, 2.0], [1.5, 3.0], [2.5], [0.5], [0.75, 1.0, 1.25], [1.75]]
    assert [g.flatten().tolist() for g in grads] == means and grads[0].shape == (2, 1)
    assert (
        torch.cat(sent).tolist() == [2, 6, 4, 10, 8, 0, 1, 2, 3, 5] and [len(flat) for flat in sent] == sizes
    )
    assert [flat.dtype for flat in sent if flat[0] == 8] == [torch.float64]
    sent.clear()
    engines._reduce(grads, ParallelContext())
    assert sent == []


def test_a_step_goes_along_the_mean_over_the_ranks(monkeypatch):
    # the other rank: 4 everywhere
    monkeypatch.setattr(engines.dist, "all_reduce", lambda flat: flat.add_(4.0))
    engine = build(world=2)
    result = engine.accumulate(loss_of(engine, 2.0, 6.0), last=True)
    assert result is not None and result.grad_norm == pytest.approx(math.sqrt(3**2 + 3**2 + 5**2 + 2**2))
    assert values(engine) == [1 - 0.5 * 3, 2 - 0.5 * 3, 4 - 0.25 * 5, 7 - 0.5 * 2]


def test_the_engine_is_the_one_that_was_asked_for(monkeypatch):
    given = []
    name = "hvtrain.train.zero"
    monkeypatch.setitem(
        sys.modules, name, SimpleNamespace(DeepSpeedEngine=lambda *a, **k: given.append((a, k)) or "it")
    )
    model, optimizer, ctx, cfg = Two(), object(), ParallelContext(), ZeroConfig()
    params = dict(model.named_parameters())
    assert build_engine(model, params, cfg, ctx, optimizer=optimizer, schedule=math.exp, step=FREE) == "it"
    assert given == [((model, params, cfg, FREE, ctx), {"optimizer": optimizer, "schedule": math.exp})]
    with pytest.raises(ConfigError, match="5 is not a ZeRO stage"):
        build_engine(
            model, params, replace(cfg, stage=5), ctx, optimizer=optimizer, schedule=math.exp, step=FREE
        )


OFFLOADED = "keeps the optimizer beside the parameters; use zero.engine=deepspeed with zero.stage 1, 2 or 3"
WHOLE = "keeps the whole weights on each device; use zero.stage=3, or for a LoRA run.blocks_to_swap"
DEEPSPEEDS = (
    "zero.deepspeed, zero.communication_dtype and zero.bucket_mb are DeepSpeed's, zero.engine is torch; use "
    "zero.engine=deepspeed"
)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"engine": "deepsped"}, "zero.engine: no engine 'deepsped'; did you mean 'deepspeed'?"),
        ({"engine": "xy"}, "zero.engine: no engine 'xy'; choose one of: deepspeed, torch"),
        ({"stage": 4}, "zero.stage: 4 is not a ZeRO stage; choose 0, 1, 2 or 3"),
        ({"stage": -1}, "zero.stage: -1 is not a ZeRO stage; choose 0, 1, 2 or 3"),
        ({"offload_param": "gpu"}, "zero.offload_param: no place 'gpu'; did you mean 'cpu'?"),
        (
            {"offload_optimizer": "xy"},
            "zero.offload_optimizer: no place 'xy'; choose one of: cpu, none, nvme"
        ),
        ({"bucket_mb": 0.0}, "zero.bucket_mb is 0.0, expected more than 0"),
        ({"bucket_mb": -2.0}, "zero.bucket_mb is -2.0, expected more than 0"),
        ({"engine": "torch", "bucket_mb": 1.0}, DEEPSPEEDS),
        ({"engine": "torch", "deepspeed": "x.json"}, DEEPSPEEDS),
        ({"engine": "torch", "communication_dtype": "bf16"}, DEEPSPEEDS),
        ({"engine": "torch", "offload_optimizer": "cpu"}, "zero.offload_optimizer: the torch engine "
        f"{OFFLOADED}"),
        ({"stage": 0, "offload_optimizer": "cpu"}, f"zero.offload_optimizer: ZeRO stage 0 {OFFLOADED}"),
        ({"stage": 2, "offload_param": "cpu"}, f"zero.offload_param: ZeRO stage 2 {WHOLE}"),
        ({"engine": "torch", "stage": 3, "offload_param": "cpu"}, "zero.offload_param: the torch engine "
        f"{WHOLE}"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "x"},
         "zero.offload_optimizer: ZeRO stage 2 cannot put it on nvme; use zero.stage=3, or cpu"),
        ({"stage": 3, "offload_param": "nvme", "nvme_path": "x"},
         "zero.offload_param: nvme needs the optimizer there too; set zero.offload_optimizer=nvme"),
        ({"stage": 3, "offload_optimizer": "nvme"},
         "zero.nvme_path: give a directory on a local disk for what is offloaded to nvme"),
        ({"stage": 3, "offload_optimizer": "cpu", "nvme_path": "x"},
         "zero.nvme_path is set but nothing is offloaded to nvme; set zero.offload_optimizer=nvme"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        check_engine(ZeroConfig(**options))
    assert str(caught.value) == message


@pytest.mark.parametrize("home", [None, "no/such/folder", "empty"])
def test_a_disk_needs_a_cuda_toolkit_where_there_is_a_gpu(home, tmp_path, monkeypatch):
    """DeepSpeed would die of it after the model is loaded, with a traceback that names no reason."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "whole/include").mkdir(parents=True)
    cfg = ZeroConfig(stage=3, offload_optimizer="nvme", nvme_path="x")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    check_engine(cfg)  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ConfigError,
        match=f"nvme needs a CUDA toolkit .* CUDA_HOME is {home}; install the toolkit .* or use cpu"
    ):
        check_engine(cfg)
    check_engine(ZeroConfig(stage=3, offload_optimizer="cpu"))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "whole")
    check_engine(cfg)


def test_what_makes_sense_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text('{"zero_optimization": {"round_robin_gradients": true}}')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cfg in (
        PLAIN, ZeroConfig(), ZeroConfig(stage=0, bucket_mb=0.1), ZeroConfig(stage=1, offload_optimizer="cpu"),
        ZeroConfig(stage=3, offload_param="cpu"),
        ZeroConfig(stage=3, offload_optimizer="nvme", nvme_path="x"),
        ZeroConfig(stage=3, offload_optimizer="nvme", offload_param="nvme", nvme_path="x"),
        ZeroConfig(communication_dtype="bf16", deepspeed="x.json"),
    ):  # fmt: skip
        check_engine(cfg)


def test_norms_of_parts_are_those_of_the_gradients_in_every_second_step(monkeypatch) -> None:
    """Of (3, 4) and of (12): 5 and 12, and 13 of all."""
    params = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    step = replace(FREE, parts={"x": ("a",), "y": ("b",)}, parts_every=2)
    model = nn.ParameterDict(params)
    engine = build_engine(
        model, params, PLAIN, ParallelContext(), optimizer=torch.optim.SGD(params.values(), lr=0.0),
        schedule=lambda n: 1.0, step=step,
    )
    slopes = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}
    taken, asked = [], []
    foreach, of_parts = torch._foreach_norm, engines.norms_of_parts
    monkeypatch.setattr(torch, "_foreach_norm", lambda grads: taken.append(len(grads)) or foreach(grads))
    monkeypatch.setattr(engines, "norms_of_parts", lambda *a, **k: asked.append(k) or of_parts(*a, **k))
    found = [
        engine.accumulate(sum((slopes[n] * p).sum() for n, p in params.items()), last=True) for _ in range(4)
    ]
    assert taken == [2] * 4 and asked == [{"device": engine.ctx.device}] * 4  # each norm once a step
    assert [one.norms for one in found] == [{}, {"x": 5.0, "y": 12.0}] * 2
    assert [one.grad_norm for one in found] == [13.0] * 4


@pytest.mark.parametrize(("text", "words"), [
    ("{", "{path} is not a JSON file: Expecting property name enclosed in double quotes: line 1 column 2 "
    "(char 1)"),
    ("[1]", "{path} holds a list, expected DeepSpeed's settings"),
    ('{"bf16": {}}', "{path} sets 'bf16', which hvtrain sets from run.precision; set that instead"),
    ('{"zero_optimization": {"stage": 1}}',
     "{path} sets 'zero_optimization.stage', which hvtrain sets from zero.stage; set that instead"),
])  # fmt: skip
def test_deepspeeds_own_settings_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        own_settings(str(path))
    assert str(caught.value).startswith("zero.deepspeed: " + words.format(path=path))


def test_deepspeeds_own_settings_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"zero_hpz_partition_size": 8}}')
    assert own_settings(str(path)) == {"zero_optimization": {"zero_hpz_partition_size": 8}}
