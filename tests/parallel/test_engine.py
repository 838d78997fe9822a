"""The engines alone, on a small network: every ZeRO stage equals plain PyTorch in one
process, state moves freely."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hvtrain.config import ZeroConfig
from hvtrain.errors import ConfigError, LaunchError
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.rng import generator
from hvtrain.train.engine import Engine, Step, StepResult, build_engine, check_engine
from tests.parallel.ranks import run_ranks

TORCH = ZeroConfig(engine="torch", stage=0)
ENGINES = [
    TORCH,
    *(ZeroConfig(stage=stage) for stage in (0, 1, 2, 3)),
    *(ZeroConfig(stage=stage, offload_optimizer="cpu") for stage in (1, 2, 3)),
    ZeroConfig(stage=3, offload_param="cpu"),
    ZeroConfig(stage=3, offload_optimizer="cpu", offload_param="cpu", bucket_mb=0.0001),
    ZeroConfig(stage=1, bucket_mb=0.0001),
]
STEPS, MICRO = 6, 2  # a global batch is MICRO micro-batches, whoever computes them


class Net(nn.Module):
    """Odd sizes (no shard divides them), a frozen bf16 layer, and a layer that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 5).bfloat16().requires_grad_(False)
        for name, p in self.named_parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator(0, stream=name)))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x + self.frozen(x.bfloat16()).float())))


class Run(NamedTuple):
    losses: list[float]
    steps: list[StepResult]
    params: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


def make_engine(cfg: ZeroConfig, ctx: ParallelContext) -> Engine:
    model = Net()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p for n, p in params.items() if "bias" in n], "lr": 0.03}]
    groups.append({"params": [p for n, p in params.items() if "bias" not in n], "lr": 0.01})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    step = Step(MICRO // ctx.dp, max_grad_norm=0.5)
    return build_engine(
        model, params, cfg, ctx, optimizer=optimizer, schedule=lambda n: 1 / (n + 1), step=step
    )


def train(engine: Engine, ctx: ParallelContext, *, until: int = STEPS, nan_at: int = -1) -> Run:
    losses, steps = [], []
    while engine.n_steps < until:
        total, step, mine = 0.0, engine.n_steps, range(ctx.dp_rank, MICRO, ctx.dp)
        for micro in mine:
            x = torch.randn(4, 5, generator=generator(0, step=step, micro=micro))
            if step == nan_at and micro == 1:
                x[0, 0] = math.nan  # on one data-parallel rank only
            loss = engine.model(x).square().mean()
            result = engine.accumulate(loss, last=micro == mine[-1])
            total += loss.item() / MICRO
        assert result is not None
        steps.append(result)
        losses.append(ctx.all_reduce_sum(total) / ctx.sp)
    return Run(losses, steps, engine.export_params(), engine.export_optimizer())


def _all_engines(engines: list[ZeroConfig]) -> dict[str, tuple[Run, Run, Run]]:
    ctx, alone = start(), ParallelContext()
    half = make_engine(TORCH, alone)
    saved = train(half, alone, until=3)
    runs = {}
    for cfg in engines:
        straight = train(make_engine(cfg, ctx), ctx)
        with_nan = train(make_engine(cfg, ctx), ctx, nan_at=2)
        resumed = make_engine(cfg, ctx)
        resumed.load_state(saved.params, saved.optimizer, n_steps=3)
        runs[str(cfg)] = straight, with_nan, train(resumed, ctx)
    return runs


def close(got: Run, want: Run) -> None:
    n = len(got.losses)  # a resumed run has only the last ones
    finite = [i for i in range(-n, 0) if math.isfinite(want.losses[i])]
    assert [got.losses[i] for i in finite] == pytest.approx([want.losses[i] for i in finite], rel=1e-6)
    assert [s.lr for s in got.steps] == pytest.approx([s.lr for s in want.steps[-n:]], rel=1e-12)
    assert [s.skipped for s in got.steps] == [s.skipped for s in want.steps[-n:]]
    norms = [s.grad_norm for s in got.steps if not s.skipped]
    assert norms == pytest.approx([s.grad_norm for s in want.steps[-n:] if not s.skipped], rel=1e-5)
    assert got.params.keys() == want.params.keys() == got.optimizer.keys()
    for name, p in want.params.items():
        torch.testing.assert_close(got.params[name], p, rtol=1e-6, atol=1e-7)
        for key, value in want.optimizer[name].items():
            torch.testing.assert_close(got.optimizer[name][key], value, rtol=1e-5, atol=1e-9)


def test_every_stage_equals_one_process() -> None:
    """Losses, norms, rates, parameters and optimizer state; a NaN on one rank skips the step on all; a run
    continues under every engine from what plain PyTorch saved."""
    alone = ParallelContext()
    want = train(make_engine(TORCH, alone), alone)
    want_nan = train(make_engine(TORCH, alone), alone, nan_at=2)
    assert [s.skipped for s in want_nan.steps] == [False, False, True, False, False, False]
    assert want.losses[-1] < want.losses[0]
    runs = run_ranks(2, _all_engines, ENGINES)[0]
    assert len(runs) == len(ENGINES)
    for straight, with_nan, resumed in runs.values():
        close(straight, want)
        close(with_nan, want_nan)
        close(resumed, want)


def test_gradients_reduced_beside_the_backward_equal_one_process(tmp_path) -> None:
    """As CUDA does it with a full fine-tune: from two buckets in turn."""
    alone = ParallelContext()
    want = train(make_engine(TORCH, alone), alone)
    own = tmp_path / "deepspeed.json"
    own.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    engines = [
        ZeroConfig(stage=stage, bucket_mb=mb, deepspeed=str(own))
        for stage in (1, 2, 3) for mb in (None, 0.0001)
    ]
    for straight, _, resumed in run_ranks(2, _all_engines, engines)[0].values():
        close(straight, want)
        close(resumed, want)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles DeepSpeed's disk access, the first time
def test_state_on_a_disk_equals_one_process(tmp_path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio-dev is not installed")
    alone = ParallelContext()
    want = train(make_engine(TORCH, alone), alone)
    both = ZeroConfig(stage=3, offload_optimizer="nvme", offload_param="nvme", nvme_path=str(tmp_path))
    engines = [
        replace(both, offload_param="none"), replace(both, offload_param="cpu", offload_optimizer="nvme"),
        both
    ]
    for straight, _, resumed in run_ranks(2, _all_engines, engines, timeout_s=1700)[0].values():
        close(straight, want)
        close(resumed, want)


def test_deepspeed_state_continues_in_plain_torch() -> None:
    """And one process needs neither torchrun nor a port for DeepSpeed."""
    alone = start()
    want = train(make_engine(TORCH, alone), alone)
    try:
        saved = train(make_engine(ZeroConfig(stage=2), alone), alone, until=4)
    finally:
        shutdown()
    engine = make_engine(TORCH, alone)
    engine.load_state(saved.params, saved.optimizer, n_steps=4)
    close(train(engine, alone), want)


@pytest.mark.parametrize(
    "cfg, message",
    [
        (ZeroConfig(engine="deepsped"), "did you mean 'deepspeed'"),
        (ZeroConfig(stage=4), "choose 0, 1, 2 or 3"),
        (ZeroConfig(stage=0, offload_optimizer="cpu"), "ZeRO stage 0 .* use zero.engine=deepspeed with "
        "zero.stage 1"),
        (ZeroConfig(engine="torch", offload_optimizer="cpu"), "torch engine"),
        (ZeroConfig(offload_param="cpu"), "use zero.stage=3, or for a LoRA run.blocks_to_swap"),
        (ZeroConfig(stage=2, offload_optimizer="nvme", nvme_path="/tmp"), "ZeRO stage 2 cannot put it on "
        "nvme"),
        (ZeroConfig(stage=3, offload_optimizer="nvme"), "zero.nvme_path: give a directory"),
        (ZeroConfig(stage=3, nvme_path="/tmp"), "nothing is offloaded to nvme"),
        (ZeroConfig(stage=3, offload_param="nvme", nvme_path="/tmp"), "set zero.offload_optimizer=nvme"),
        (ZeroConfig(engine="torch", communication_dtype="bf16"), "use zero.engine=deepspeed"),
        (ZeroConfig(offload_optimizer="gpu"), "no place 'gpu'"),
    ],
)
def test_refusals(cfg: ZeroConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_engine(cfg)


def test_degrees_must_divide_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ulysses 2 x ring 1 = 2 does not divide the 1 process"):
        start(ulysses=2)
    with pytest.raises(ConfigError, match="parallel.ring: 0"):
        start(ring=0)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(LaunchError, match="WORLD_SIZE is 'two'"):
        start()


def test_autocast_reaches_the_model_through_every_engine() -> None:
    """DeepSpeed's own forward turns a caller's autocast off; what it wraps is
    asked here, not what comes out."""

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.is_autocast_enabled("cpu"), self.layer(x).dtype
            return self.layer(x).float()

    alone = start()
    for cfg in (TORCH, ZeroConfig(stage=0), ZeroConfig(stage=2)):
        probe = Probe()
        params = dict(probe.named_parameters())
        optimizer = torch.optim.SGD(list(params.values()), lr=0.1)
        engine = build_engine(
            probe, params, cfg, alone, optimizer=optimizer, schedule=lambda n: 1.0, step=Step()
        )
        engine.model(torch.ones(1, 2))
        assert probe.seen == (False, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = engine.model(torch.ones(1, 2)).sum()
        assert probe.seen == (True, torch.bfloat16)
        assert engine.accumulate(loss, last=True) is not None
        assert engine.export_params()["layer.weight"].dtype == torch.float32
    shutdown()
