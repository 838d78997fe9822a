"""A few steps of real training of a very small model under any layout and engine, for parity tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvtrain.adapters.attach import inject, seed_dropout
from hvtrain.config import ZeroConfig
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch
from hvtrain.models.hunyuan_video.inputs import HunyuanInput
from hvtrain.models.hunyuan_video.model import HunyuanVideo
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.swap import BlockSwap
from hvtrain.rng import generator
from hvtrain.train.engine import Step, build_engine

ARCH = HunyuanVideoArch(
    in_channels=4,
    out_channels=4,
    hidden_size=48,
    heads_num=4,
    double=2,
    single=2,
    rope_dims=(4, 4, 4),
    text_dim=20,
    pooled_dim=12,
    guidance_embed=True,
    refiner_depth=1,
)
MICRO, BATCH, TEXT = 2, 2, 9  # micro-batches of a global step, samples in each, padded text length
# Latent sizes [T H W] taken in turn: 45, 8 and 77 image tokens; no layout divides them all.
SIZES = [(3, 6, 10), (1, 4, 8), (1, 14, 22)]


@dataclass(frozen=True)
class Case:
    """A way to compute what one process computes."""

    ulysses: int = 1
    ring: int = 1
    engine: str = "deepspeed"
    stage: int = 2
    offload: str = "none"
    lora: bool = False
    recompute: str = "none"
    swap: int = 0
    micro: int = MICRO  # micro-batches of a global step
    arch: HunyuanVideoArch = ARCH

    def __str__(self) -> str:
        parts = [f"U{self.ulysses}xR{self.ring}", f"{self.engine}-{self.stage}", self.recompute]
        return " ".join([*parts, "offload" if self.offload == "cpu" else "", "lora" if self.lora else "full"])


@cache
def place(ulysses: int, ring: int) -> ParallelContext:
    """This rank's, whose groups are made once; called by all ranks in the same order."""
    return start(ulysses, ring)


class Outcome(NamedTuple):
    losses: list[float]
    params: dict[str, Tensor]


def build_model(case: Case) -> tuple[DiT, dict[str, nn.Parameter]]:
    """Unit-scale random weights: with small ones attention is uniform and nothing would show."""
    model = HunyuanVideo(case.arch)
    if case.lora:
        targets = [
            n for n, m in model.named_modules() if type(m) is nn.Linear and "_blocks." in n and "mod" not in n
        ]
        inject(model, targets, rank=3, alpha=6.0, dropout=0.1)
    for name, p in model.named_parameters():
        scale = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
        p.data.normal_(generator=generator(0, stream=name)).mul_(scale)
        if name.endswith("norm.weight"):
            p.data.add_(1.0)
    return model.train(), {n: p for n, p in model.named_parameters() if p.requires_grad}


def make_batch(step: int, micro: int) -> tuple[ModelInput, Tensor]:
    """Input and target of one micro-batch: ragged text, guidance, a different video size each step."""
    g = generator(1, step=step, micro=micro, stream="batch")
    x, target = (
        torch.randn(BATCH, ARCH.in_channels, *SIZES[step % len(SIZES)], generator=g) for _ in range(2)
    )
    lengths = tuple((torch.randperm(TEXT, generator=g)[:BATCH] + 1).tolist())
    t = torch.rand(BATCH, generator=g) * 1000
    text = torch.randn(BATCH, TEXT, ARCH.text_dim, generator=g)
    pooled = torch.randn(BATCH, ARCH.pooled_dim, generator=g)
    cond = {"text": text, "pooled": pooled, "guidance": torch.full((BATCH,), 6000.0)}
    inp = HunyuanInput(x=x, t=t, cond=cond, lengths={"text": lengths})
    return inp, target


def train(
    case: Case, ctx: ParallelContext, *, optimizer: type, rate: float, n_steps: int, clip: float
) -> Outcome:
    model, params = build_model(case)
    swap = BlockSwap(model.blocks, case.swap, ctx.device) if case.swap else None
    parallelize(model, ctx, recompute=case.recompute, visits=swap)
    zero, step = ZeroConfig(case.engine, case.stage, case.offload), Step(case.micro // ctx.dp, clip)
    opt = optimizer(list(params.values()), lr=rate)
    engine = build_engine(model, params, zero, ctx, optimizer=opt, schedule=lambda n: 1.0, step=step)
    losses = []
    for step in range(n_steps):
        total, mine = 0.0, range(ctx.dp_rank, case.micro, ctx.dp)
        for micro in mine:
            inp, target = make_batch(step, micro)
            seed_dropout(model, 7, step=step, micro=micro)
            loss = (engine.model(inp) - target).square().mean()
            engine.accumulate(loss, last=micro == mine[-1])
            total += loss.item() / case.micro
        losses.append(ctx.all_reduce_sum(total) / ctx.sp)
    return Outcome(losses, engine.export_params())


def loss_curve(case: Case, ctx: ParallelContext, n_steps: int = 30) -> list[float]:
    return train(case, ctx, optimizer=torch.optim.AdamW, rate=2e-3, n_steps=n_steps, clip=1.0).losses


def gradients(case: Case, ctx: ParallelContext) -> dict[str, Tensor]:
    """Every parameter's gradient as the optimizer gets it: one step of SGD at a rate so large that the
    parameter's own rounding vanishes. Works alike for sharded, offloaded and plain parameters."""
    rate = 2.0**14
    after = train(case, ctx, optimizer=torch.optim.SGD, rate=rate, n_steps=1, clip=0.0).params
    before = build_model(case)[1]
    return {name: (before[name].detach() - p) / rate for name, p in after.items()}


def alone(case: Case) -> Case:
    """The same computation by one process of plain PyTorch."""
    return replace(Case(lora=case.lora), engine="torch", stage=0)


def relative_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over norm of the reference; infinite where one has a
    gradient and the other has none."""
    assert got.keys() == want.keys()
    errors = {}
    for name, ref in want.items():
        scale, error = ref.norm().item(), (got[name] - ref).norm().item()
        errors[name] = error / scale if scale else (0.0 if error == 0 else math.inf)
    return errors
