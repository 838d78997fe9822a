"""Run a few real training steps and report the peak of live bytes, and what was predicted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hvtrain.adapters.attach import inject
from hvtrain.config import ZeroConfig
from hvtrain.fit.memory import Budget, Layout, budget
from hvtrain.fit.trace import Ledger, byte_counts, simulated, trace_step
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.hunyuan_video.inputs import HunyuanInput
from hvtrain.models.hunyuan_video.model import HunyuanVideo
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import start
from hvtrain.train.engine import Step, build_engine
from tests.parallel.tiny_run import ARCH

SIZED = replace(ARCH, hidden_size=192, heads_num=4, rope_dims=(16, 16, 16), double=3, single=4)


@dataclass(frozen=True)
class Setting:
    """One configuration, small enough for a CPU and large enough that activations show."""

    lora: bool = True
    engine: str = "torch"
    stage: int = 0
    recompute: str = "none"
    ulysses: int = 1
    ring: int = 1
    world: int = 1
    tokens: tuple[int, int, int] = (5, 32, 40)  # latents T H W
    arch: object = SIZED


def make(setting: Setting) -> tuple[DiT, dict[str, nn.Parameter], ModelInput]:
    model = HunyuanVideo(setting.arch)
    if setting.lora:
        names = [
            n for n, m in model.named_modules() if type(m) is nn.Linear and "_blocks." in n and "mod" not in n
        ]
        inject(model, names, rank=8)
    a = setting.arch
    text = {
        "text": torch.zeros(1, 33, a.text_dim), "pooled": torch.zeros(1, a.pooled_dim),
        "guidance": torch.zeros(1)
    }
    x = torch.zeros(1, a.in_channels, *setting.tokens)
    inp = HunyuanInput(x=x, t=torch.zeros(1), cond=text, lengths={"text": (33,)})
    return model.train(), {n: p for n, p in model.named_parameters() if p.requires_grad}, inp


def _train(setting: Setting) -> None:
    ctx = start(setting.ulysses, setting.ring)
    model, params, inp = make(setting)
    parallelize(model, ctx, recompute=setting.recompute)
    cfg = ZeroConfig(setting.engine, setting.stage)
    optimizer = torch.optim.AdamW(list(params.values()), lr=1e-4, fused=True)
    engine = build_engine(model, params, cfg, ctx, optimizer=optimizer, schedule=lambda n: 1.0, step=Step())
    for _ in range(2):
        engine.accumulate(engine.model(inp).square().mean(), last=True)


def live_bytes(setting: Setting) -> int:
    """The worst moment of two real steps, by following every tensor's storage; run on every rank. The
    profiler would miss what gloo's own threads free."""
    with Ledger(nn.Module()) as meter:
        _train(setting)
    return meter.peak


def allocated_bytes(setting: Setting) -> int:
    """The worst moment of two real steps, as the CPU allocator saw it; for one process."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        _train(setting)
    live = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def each(measure: Callable[[Setting], int], settings: list[Setting]) -> list[int]:
    """`measure` of several settings in one process; run on every rank."""
    found = []
    for setting in settings:
        gc.collect()
        found.append(measure(setting))
    return found


def predicted(setting: Setting) -> Budget:
    layout = Layout(ZeroConfig(setting.engine, setting.stage), setting.world, overlap=False)
    with simulated(world=setting.world, ulysses=setting.ulysses, ring=setting.ring) as ctx:
        model, _, inp = make(setting)
        trace = trace_step(
            model, inp, ctx=ctx, recompute=setting.recompute, autocast=False,
            keep_gradients=layout.keeps_gradients
        )
        return budget(byte_counts(model), trace, layout)
