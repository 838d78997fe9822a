"""Checkpoints that every rank wrote a part of: whole for any number of ranks,
sealed, and never half there."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hvtrain.config import ZeroConfig
from hvtrain.errors import CheckpointError
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.train import checkpoint
from hvtrain.train import run as train
from hvtrain.train.checkpoint import Progress
from hvtrain.train.parts import Piece, open_parts, span_of, write_part
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards

WHOLE = {
    "a": torch.arange(35.0).view(7, 5), "b": torch.arange(3.0) + 0.5, "a::m": -torch.arange(35.0).view(7, 5)
}
FULL = ("adapter.type=none", "zero.engine=deepspeed", "zero.stage=3", "data.batch_size=1", "optim.lr=1e-4",
        "run.save_every_steps=2", "run.recompute=full")


def pieces(rank: int, world: int, whole: dict[str, Tensor] = WHOLE) -> list[Piece]:
    """As ZeRO-3 cuts: equal parts, the last ones shorter or empty."""
    found = []
    for key, value in whole.items():
        part = -(-value.numel() // world)
        mine = value.flatten()[rank * part : (rank + 1) * part]
        if mine.numel():
            found.append(
                Piece(key, tuple(value.shape), rank * part, mine.numel(), partial(torch.clone, mine))
            )
    if rank == 0:
        found.append(Piece("a::step", (), 0, 1, lambda: torch.tensor(9.0)))
    return found


def save(root: Path, step: int, world: int = 3, scale: float = 1.0) -> Path:
    folder = checkpoint.begin(root, step)
    whole = {key: value * scale for key, value in WHOLE.items()}
    written = [write_part(folder, pieces(rank, world, whole), rank=rank) for rank in range(world)]
    return checkpoint.finish(folder, Progress(step, 2 * step), written, keep_last=2)


def test_what_several_ranks_wrote_is_whole_for_any(tmp_path):
    for world in (1, 3, 8):
        path = save(tmp_path / str(world), 4, world)
        assert len(list(path.glob("part-*"))) == world
        checkpoint.verify(path)  # the seals were made of what was written, not read back
        found = checkpoint.load(path)
        assert found.progress == Progress(4, 8) and found.ema == {}
        assert {k: v.shape for k, v in found.params.items()} == {"a": (7, 5), "b": (3,)}
        assert all(torch.equal(found.params[k], WHOLE[k]) for k in ("a", "b"))
        assert found.optimizer.keys() == {"a"} and set(found.optimizer["a"]) == {"m", "step"}
        assert (
            torch.equal(found.optimizer["a"]["m"], WHOLE["a::m"]) and found.optimizer["a"]["step"].shape == ()
        )
        assert found.optimizer["a"]["step"] == 9
        for low, high in [(0, 35), (11, 25), (12, 24), (34, 35), (5, 5)]:
            assert span_of(found.params, "a", low, high).tolist() == list(range(low, high))


def test_a_part_that_is_gone_or_another_s_is_refused(tmp_path):
    path = save(tmp_path, 4)
    (path / "part-00001.safetensors").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="'a' is not whole: its parts do not join"):
        open_parts(path)
    with pytest.raises(CheckpointError, match="part-00001.safetensors is missing"):
        checkpoint.verify(path)
    write_part(path, pieces(1, 4), rank=1)  # of a job of four
    with pytest.raises(CheckpointError, match="do not join"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="part-00001.safetensors is damaged"):
        checkpoint.verify(path)


def test_a_part_is_written_piece_by_piece(tmp_path):
    """A piece is read from the device when its turn comes, and nothing holds on to it."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def read() -> Tensor:
        nonlocal most
        made = torch.ones(1000)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    write_part(tmp_path, [Piece(f"p{i}", (1000,), 0, 1000, read) for i in range(20)], rank=0)
    assert len(alive) == 20 and most <= 2  # the one at hand, and the one whose bytes were just written


def _dies_while_it_saves(root: Path, call: str, at: int) -> None:
    """In a child: SIGKILL at its `at`-th call of os.`call` while it saves step 6."""
    real, n = getattr(os, call), 0

    def counted(*args, **options):
        nonlocal n
        n += 1
        if n == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(os, call, counted)
    save(root, 6, scale=2.0)
    os._exit(0)


@pytest.mark.parametrize(("call", "at"), [("pwrite", 4), ("replace", 2), ("fsync", 9), ("replace", 5)])
def test_a_kill_in_a_save_loses_nothing(tmp_path, call, at):
    save(tmp_path, 4)
    child = os.fork()
    if child == 0:
        try:
            _dies_while_it_saves(tmp_path, call, at)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found = checkpoint.newest_sound(tmp_path, print)
    assert found is not None and found.name == "step-00000004"
    assert torch.equal(checkpoint.load(found).params["a"], WHOLE["a"])
    again = save(tmp_path, 6, scale=2.0)  # over what the dead one left
    assert (
        checkpoint.newest_sound(tmp_path, print) == again
        and torch.equal(checkpoint.load(again).params["a"], 2 * WHOLE["a"])
    )


# --- through DeepSpeed --------------------------------------------------------------------------------------


def _steps(folder: Path, *overrides: str) -> list[int]:
    """On each rank: train on to `steps`, from where the run is."""
    ctx = start()
    try:
        return [train.run(config(folder / "shards", folder / "run", *FULL, *overrides), ctx)]
    finally:
        if ctx.world == 1:
            shutdown()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_full_fine_tune_goes_on_with_another_number_of_ranks(tmp_path):
    """Two, then one; the user's files are made of the parts, in bf16."""
    make_shards(tmp_path / "shards", n=8)
    assert run_ranks(2, _steps, tmp_path, "run.steps=2") == [[0], [0]]
    two = tmp_path / "run/checkpoints/step-00000002"
    assert {p.name for p in two.iterdir()} == {
        "part-00000.safetensors", "part-00001.safetensors", "state.json", "COMPLETE"
    }
    params = dict(checkpoint.load(two).params)
    same({k: v.bfloat16() for k, v in params.items()}, load_file(tmp_path / "run/lora.safetensors"))
    best = (
        "eval.every_steps=2", "run.keep_best=true", f"eval.shards={tmp_path / 'shards'}", "eval.max_batches=1"
    )
    assert _steps(tmp_path, "run.steps=4", *best) == [0]
    four = checkpoint.load(tmp_path / "run/checkpoints/step-00000004")
    assert len(list((tmp_path / "run/checkpoints/step-00000004").glob("part-*"))) == 1
    assert (
        any(not torch.equal(four.params[n], params[n]) for n in params)
        and four.params.keys() == params.keys()
    )
    assert {float(state["step"]) for state in four.optimizer.values()} == {4.0}
    same({k: v.bfloat16() for k, v in four.params.items()}, load_file(tmp_path / "run/lora-best.safetensors"))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000002", "step-00000004"
    ]


def _saved(path: Path, world_of: Path | None = None) -> dict[str, Tensor]:
    """On each rank: train the small network, or take it from `world_of`, and write it in parts to `path`."""
    from tests.parallel import test_engine

    ctx: ParallelContext = start()
    test_engine.MICRO = 24  # divides into any number of ranks
    engine = test_engine.make_engine(ZeroConfig(stage=3), ctx)
    engine.parted = True  # though a layer of it is frozen
    if world_of is not None:
        found = checkpoint.load(world_of)
        engine.load_state(found.params, found.optimizer, n_steps=3)
    else:
        test_engine.train(engine, ctx, until=3)
    if ctx.is_main:
        checkpoint.begin(path.parent, 3)
    ctx.barrier()
    folder = path.with_name(f".writing-{path.name}")
    parts = ctx.gather_objects(write_part(folder, engine.pieces(), rank=ctx.rank))
    if ctx.is_main:
        checkpoint.finish(folder, Progress(3), parts, keep_last=0)
    moments = {f"{n}::{k}": t for n, state in engine.export_optimizer().items() for k, t in state.items()}
    return {**engine.export_params(), **moments}


@pytest.mark.slow
def test_eight_ranks_then_four_then_six_hold_the_same_bits(tmp_path):
    roots = [tmp_path / str(world) / "step-00000003" for world in (8, 4, 6)]
    eight = run_ranks(8, _saved, roots[0])[0]
    assert len(eight) == 6 * 4  # weights and biases of three layers, each with two moments and a step
    four = run_ranks(4, _saved, roots[1], roots[0])[0]
    six = run_ranks(6, _saved, roots[2], roots[1])[0]
    same(four, eight)
    same(six, eight)
    for root in roots:
        found = checkpoint.load(root)
        same({**found.params, **{f"{n}::{k}": v[k] for n, v in found.optimizer.items() for k in v}}, eight)


_SAVING = ("pwrite", "replace", "fsync")  # of the operating system: by these a save becomes files


def _steps_until(folder: Path, killer: int, at: int, *overrides: str) -> int:
    """As `_steps`, until rank `killer` comes to its `at`-th call that saves: then no rank
    goes on. How many there were."""
    ctx, n = start(), 0
    ranks = ctx.gather_objects(os.getpid())

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **options: Any) -> Any:
            nonlocal n
            where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            saves = "/checkpoints/" in where or Path(where).name.lstrip(".").startswith("lora")
            n += saves
            if saves and n == at and ctx.rank == killer:
                for pid in [*(p for p in ranks if p != os.getpid()), os.getpid()]:
                    os.kill(pid, signal.SIGKILL)
            return real(first, *args, **options)

        return call

    for name in _SAVING:
        setattr(os, name, counted(getattr(os, name)))
    train.run(config(folder / "shards", folder / "run", *FULL, *overrides), ctx)
    return n


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_in_saves_in_parts_lose_nothing(tmp_path):
    """Every rank is killed at once, while a run that saves each step writes, flushes or renames; it goes on
    from a whole checkpoint each time and ends with the weights of a run that nobody killed."""
    make_shards(tmp_path / "shards", n=8)
    (tmp_path / "plain").mkdir()
    os.symlink(tmp_path / "shards", tmp_path / "plain/shards")
    often = ("run.steps=14", "run.save_every_steps=1", "run.keep_last=3")
    calls = [n // 14 for n in run_ranks(2, _steps_until, tmp_path / "plain", 0, 0, *often)]  # of each save
    assert calls[0] > calls[1] > 4
    draw, root, before = random.Random(5), tmp_path / "run/checkpoints", 0
    for kill in range(10):
        killer = draw.choice((0, 0, 1))
        at = draw.randint(1, 3 * calls[killer] // 2)  # of this save or of the next: at most one is whole
        with pytest.raises(AssertionError, match="exit codes .*-9"):
            run_ranks(2, _steps_until, tmp_path, killer, at, *often)
        found = checkpoint.newest_sound(root, print)
        step = 0 if found is None else checkpoint.step_of(found)
        assert before <= step <= before + 1, f"kill {kill}: from step {before} to {step}"
        before = step
        assert not list(root.glob("damaged-*"))
    assert 0 < before < 14
    run_ranks(2, _steps, tmp_path, *often)
    same(load_file(tmp_path / "run/lora.safetensors"), load_file(tmp_path / "plain/run/lora.safetensors"))
    assert json.loads((root / "step-00000014/state.json").read_text())["step"] == 14
