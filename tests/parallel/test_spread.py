"""Weights are read once for a job: what every rank then has, and what all of them
together take while it is read."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hvtrain.config import AdapterConfig, ModelConfig, ZeroConfig
from hvtrain.errors import CheckpointError
from hvtrain.models import find
from hvtrain.models.load import save_dit
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.spread import spread_weights
from hvtrain.train.engine import Step, build_engine
from hvtrain.train.setup import find_base, open_subject
from tests.parallel.ranks import run_ranks

SPEC = find("hunyuan-video")
LORA = AdapterConfig(rank=2, alpha=2.0, include=())
CPU = torch.device("cpu")


class Moment(NamedTuple):
    """When, and how much memory a rank had (PSS). Of all ranks at once."""

    at: float
    n_bytes: int


class Seen(NamedTuple):
    """Of one rank: before it loaded and after, and what it had."""

    before: Moment
    after: Moment
    sums: dict[str, float]
    again: dict[str, list[float]]


def write_model(path: Path, *, double: int, width: int) -> int:
    """A bf16 file of so many double blocks; its bytes."""
    arch = replace(
        SPEC.flavor("t2v").arch, hidden_size=128 * width, heads_num=width, double=double, single=1,
        text_dim=64, pooled_dim=64, refiner_depth=1
    )
    model, draw = SPEC.build(arch), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-1, 1, generator=draw)
    save_dit(model, path, spec=SPEC, flavor=SPEC.flavor("t2v"), dtype=torch.bfloat16)
    return sum(2 * p.numel() for p in model.parameters())


def _load(path: Path, what: str) -> Seen:
    """On each rank: a frozen base for a LoRA ("lora"), of float32 ("wide") or in float8 ("fp8");
    under ZeRO-3 a LoRA ("zero3-lora") and a full fine-tune ("zero3"), until DeepSpeed has cut the
    weights: what its optimizer then makes (a copy of its own, gradients) lies where the training
    is, on a GPU if there is one."""
    # M_MMAP_THRESHOLD: else glibc keeps up to 64 MB that were given back, of any model
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
    ctx = start()
    model = _config(path, what)
    cut, whole = what.startswith("zero3"), what == "zero3"
    base = find_base(model)
    adapter = AdapterConfig(type="none") if whole else LORA
    import deepspeed  # before the memory is looked at

    little = ModelConfig(dit="tiny:dit.safetensors")
    # modules and first allocations are not the weights'
    open_subject(find_base(little), little, LORA, None, ctx, seed=0)
    before, seen = _now(ctx), []
    subject = open_subject(base, model, adapter, None, ctx, seed=0, move=not cut)
    sums: dict[str, float] = {}
    if cut:

        def looked(*args: Any, **options: Any) -> Any:
            seen.append(_now(ctx))
            for name, p in subject.model.named_parameters():
                with deepspeed.zero.GatheredParameters([p]):
                    sums[name] = float(p.double().sum())
            raise _Cut

        sgd = torch.optim.SGD(subject.trainable.values())
        with patch("deepspeed.initialize", looked), suppress(_Cut):
            build_engine(
                subject.model, subject.trainable, ZeroConfig(stage=3), ctx, optimizer=sgd,
                schedule=lambda n: 1.0, step=Step()
            )
    else:
        state = subject.model.state_dict()
        _ = [t.view(-1).view(torch.uint8)[::4096].sum() for t in state.values() if t.numel()]
        seen.append(_now(ctx))  # a page is counted where it was touched
        sums = {n: float(t.double().sum()) for n, t in state.items()}
    ctx.barrier()
    return Seen(before, seen[0], sums, {} if cut else _again(ctx, path))


class _Cut(Exception):
    """No more is to be seen."""


def _config(path: Path, what: str) -> ModelConfig:
    quantize, dtype = (
        ("fp8_scaled" if what == "fp8" else "none"), ("float32" if what == "wide" else "bfloat16")
    )
    return ModelConfig(dit=str(path), quantize=quantize, dtype=dtype)


def _now(ctx: ParallelContext) -> Moment:
    ctx.barrier()
    moment = Moment(time.monotonic(), pss(os.getpid()))
    ctx.barrier()
    return moment


def _again(ctx: ParallelContext, path: Path) -> dict[str, list[float]]:
    """What is not shared: broadcast, a mistake of the one that reads, and tensors of every kind."""

    def make() -> list[Tensor | None]:
        assert ctx.is_main, "only one reads"
        eight = torch.ones(4, dtype=torch.float8_e4m3fn)
        return [torch.arange(6.0).view(2, 3).t(), None, torch.tensor(2.5), torch.empty(0, 3), eight]

    def fail() -> list[Tensor | None]:
        raise CheckpointError("no scale")

    found = {}
    for name, frozen in (("shared", True), ("broadcast", False)):
        with spread_weights(ctx, device=CPU, frozen=frozen) as spread:
            assert spread is not None
            got = [spread(make) for _ in range(2)][1]
            with pytest.raises(CheckpointError, match="no scale"):
                spread(fail if ctx.is_main else make)
        assert got[1] is None and [tuple(t.shape) for t in got if t is not None] == [(3, 2), (), (0, 3), (4,)]
        found[name] = [float(t.float().sum()) for t in got if t is not None] + [float(got[0][1, 1])]
    with spread_weights(ctx, device=CPU, frozen=False, cut=True) as spread:
        assert spread is not None and tuple(spread(make)[0].shape) == (3, 2)  # room
    return found


class Peak(threading.Thread):
    """The job's memory over time: of each process what it alone uses, and its share of what
    several use (PSS). Without mapped files: a process's share of a library's pages grows when
    another program that uses it ends."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, int]] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            pids = [p.pid for p in multiprocessing.active_children() if p.pid]
            self.seen.append((time.monotonic(), sum(map(pss, pids))))

    def grown(self, ranks: list[Seen]) -> int:
        """Bytes at the worst moment of loading, above those before it."""
        begin, end = max(r.before.at for r in ranks), max(r.after.at for r in ranks)
        during = [n for t, n in self.seen if begin < t < end]
        return max([*during, sum(r.after.n_bytes for r in ranks)]) - sum(r.before.n_bytes for r in ranks)


def pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024
        for line in text.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))
    )


def load_on(world: int, path: Path, what: str) -> tuple[list[Seen], int]:
    peak = Peak()
    peak.start()
    try:
        ranks = run_ranks(world, _load, path, what)
    finally:
        peak.over.set()
        peak.join()
    return ranks, peak.grown(ranks)


def alone(path: Path, what: str = "lora") -> tuple[dict[str, float], int]:
    """What one process has: of each tensor the sum, and the bytes of all."""
    model = _config(path, what)
    state = open_subject(find_base(model), model, LORA, None, ParallelContext(), seed=0).model.state_dict()
    return {n: float(t.double().sum()) for n, t in state.items()}, sum(t.nbytes for t in state.values())


def test_two_ranks_hold_one_copy_of_a_frozen_model(tmp_path: Path) -> None:
    n_bytes = write_model(tmp_path / "dit.safetensors", double=14, width=4)
    assert n_bytes > 250e6  # so that what else a process takes while it loads is little beside it
    ranks, grown = load_on(2, tmp_path / "dit.safetensors", "lora")
    want, copy = alone(tmp_path / "dit.safetensors")
    assert len(want) > 100 and all(r.sums == want for r in ranks)
    assert n_bytes < copy < n_bytes * 1.05 and n_bytes * 0.9 < grown < n_bytes * 1.3, grown / n_bytes
    assert all(r.again == {k: [15.0, 2.5, 0.0, 4.0, 4.0] for k in ("shared", "broadcast")} for r in ranks)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "dit.safetensors"
    assert write_model(path, double=17, width=8) > 2**30
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["lora", "wide", "fp8", "zero3-lora", "zero3"])
def test_eight_ranks_hold_one_copy_while_they_load(large: Path, what: str) -> None:
    ranks, grown = load_on(8, large, what)
    want, copy = alone(large, "wide" if what == "zero3" else what)
    print(f"{what}: {grown / 2**20:.0f} MiB grown, one copy is {copy / 2**20:.0f} MiB: {grown / copy:.2f}")
    for rank in ranks:
        shared = rank.sums.keys() & want.keys()
        assert len(shared) > 200 and all(rank.sums[n] == want[n] for n in shared)
    assert copy * 0.9 < grown < copy * 1.3, grown / copy


def test_one_process_reads_for_itself() -> None:
    with spread_weights(ParallelContext(), device=CPU, frozen=True) as spread:
        assert spread is None
