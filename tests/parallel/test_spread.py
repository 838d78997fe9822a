"""Weights are read once for a job: what every rank then has, and what all of them together take while it is read."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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


class Seen(NamedTuple):
    """Of one rank: when it began and ended to load, the memory that it took then (PSS), and what it had."""

    begin: float
    end: float
    before: int
    after: int
    sums: dict[str, float]
    again: dict[str, list[float]]


def write_model(path: Path, *, double: int, width: int) -> int:
    """A bf16 file of so many double blocks; its bytes."""
    arch = replace(SPEC.flavor("t2v").arch, hidden_size=128 * width, heads_num=width, double=double, single=1, text_dim=64,
                   pooled_dim=64, refiner_depth=1)
    model, draw = SPEC.build(arch), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-1, 1, generator=draw)
    save_dit(model, path, spec=SPEC, flavor=SPEC.flavor("t2v"), dtype=torch.bfloat16)
    return sum(2 * p.numel() for p in model.parameters())


def _load(path: Path, what: str) -> Seen:
    """On each rank: a frozen base for a LoRA ("lora"), in float8 ("fp8"), or a full fine-tune under ZeRO-3 ("zero3")."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: else glibc keeps up to 64 MB that were given back, of any model
    ctx = start()
    model = ModelConfig(dit=str(path), quantize="fp8_scaled" if what == "fp8" else "none")
    whole = what == "zero3"
    base = find_base(model)
    adapter = AdapterConfig(type="none") if whole else LORA
    if whole:
        import deepspeed  # noqa: F401 - before the memory is looked at
    little = ModelConfig(dit="tiny:dit.safetensors")
    open_subject(find_base(little), little, LORA, None, ctx, seed=0)  # modules and first allocations are not the weights'
    ctx.barrier()
    begin, before = time.monotonic(), pss(os.getpid())
    ctx.barrier()
    subject = open_subject(base, model, adapter, None, ctx, seed=0, move=not whole)
    if whole:
        engine = build_engine(
            subject.model, subject.trainable, ZeroConfig(stage=3), ctx, optimizer=torch.optim.SGD(subject.trainable.values()),
            schedule=lambda n: 1.0, step=Step(),
        )
    _ = [t.view(-1).view(torch.uint8)[::4096].sum() for t in subject.model.state_dict().values() if t.numel()]
    ctx.barrier()  # a page is counted where it was touched
    end, after = time.monotonic(), pss(os.getpid())
    ctx.barrier()
    values = engine.export_params() if whole else subject.model.state_dict()
    sums = {n: float(t.double().sum()) for n, t in values.items()}
    ctx.barrier()
    return Seen(begin, end, before, after, sums, {} if whole else _again(ctx, path))


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
    """The job's memory over time: of each process what it alone uses, and its share of what several use (PSS). Without mapped
    files: a process's share of a library's pages grows when another program that uses it ends."""

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
        begin, end = max(r.begin for r in ranks), max(r.end for r in ranks)
        during = [n for t, n in self.seen if begin < t < end]
        return max([*during, sum(r.after for r in ranks)]) - sum(r.before for r in ranks)


def pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def load_on(world: int, path: Path, what: str) -> tuple[list[Seen], int]:
    peak = Peak()
    peak.start()
    try:
        ranks = run_ranks(world, _load, path, what)
    finally:
        peak.over.set()
        peak.join()
    return ranks, peak.grown(ranks)


def alone(path: Path, quantize: str = "none") -> dict[str, float]:
    model = ModelConfig(dit=str(path), quantize=quantize)
    subject = open_subject(find_base(model), model, LORA, None, ParallelContext(), seed=0)
    return {n: float(t.double().sum()) for n, t in subject.model.state_dict().items()}


def test_two_ranks_hold_one_copy_of_a_frozen_model(tmp_path: Path) -> None:
    n_bytes = write_model(tmp_path / "dit.safetensors", double=14, width=4)
    assert n_bytes > 250e6  # so that what else a process takes while it loads is little beside it
    ranks, grown = load_on(2, tmp_path / "dit.safetensors", "lora")
    want = alone(tmp_path / "dit.safetensors")
    assert len(want) > 100 and all(r.sums == want for r in ranks)
    assert n_bytes * 0.9 < grown < n_bytes * 1.3, grown / n_bytes
    assert all(r.again == {k: [15.0, 2.5, 0.0, 4.0, 4.0] for k in ("shared", "broadcast")} for r in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora", "fp8", "zero3"])
def test_eight_ranks_hold_one_copy_while_they_load(tmp_path: Path, what: str) -> None:
    n_bytes = write_model(tmp_path / "dit.safetensors", double=64, width=4)
    copy = {"lora": n_bytes, "fp8": n_bytes / 2, "zero3": 2 * n_bytes}[what]  # bf16, float8, fp32
    ranks, grown = load_on(8, tmp_path / "dit.safetensors", what)
    print(f"{what}: {grown / 2**20:.0f} MiB grown, one copy is {copy / 2**20:.0f} MiB: {grown / copy:.2f}")
    want = alone(tmp_path / "dit.safetensors", "fp8_scaled" if what == "fp8" else "none")
    for rank in ranks[:1] if what == "zero3" else ranks:
        shared = rank.sums.keys() & want.keys()
        assert len(shared) > 200 and all(rank.sums[n] == want[n] for n in shared)
    assert copy * 0.9 < grown < copy * 1.3, grown / copy


def test_one_process_reads_for_itself() -> None:
    with spread_weights(ParallelContext(), device=CPU, frozen=True) as spread:
        assert spread is None
