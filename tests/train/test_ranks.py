"""A training run on two processes: stopping together, continuing bit for bit,
naming what another rank saw."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import TrainConfig
from hvtrain.errors import HvtrainError
from hvtrain.parallel.context import start
from hvtrain.train import run as train
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards

STEPS = 8
ENGINES = {
    "torch": ("zero.engine=torch",),
    "zero2": ("zero.engine=deepspeed", "zero.stage=2"),
    "ulysses": ("zero.engine=deepspeed", "zero.stage=1", "parallel.ulysses=2"),
}


def _config(shards: Path, output: Path, engine: str) -> TrainConfig:
    return config(
        shards, output, f"run.steps={STEPS}", "data.batch_size=1", "run.grad_accum=2", "adapter.dropout=0.1",
        "data.caption_dropout=0.3", "data.workers=1", *ENGINES[engine]
    )


def _interrupt_soon(log: Path) -> None:
    """A signal to this process once the run has logged a step."""

    def wait() -> None:
        while not log.exists() or not log.read_text():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _runs(folder: Path) -> dict[str, list[int] | str]:
    """Exit codes of: the whole run; the run of which only rank 1 is signalled; its continuation."""
    rank, found = int(os.environ["RANK"]), {}
    for engine in ENGINES:
        cut = folder / f"{engine}-cut"
        cfg = _config(folder / "shards", cut, engine)
        ctx = start(cfg.parallel.ulysses)  # one process group for all runs
        whole = train.run(_config(folder / "shards", folder / engine, engine), ctx)
        if rank == 1:
            _interrupt_soon(cut / "metrics.jsonl")
        stopped = train.run(cfg, ctx)
        found[engine] = [whole, stopped, train.run(cfg, ctx)]
    with pytest.raises(HvtrainError) as caught:
        train.run(config(folder / "bad", folder / "nan", "data.batch_size=1", "run.max_bad_steps=2"), start())
    return {**found, "nan": str(caught.value)}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    make_shards(folder / "shards")
    make_shards(folder / "bad", n=2, poison="clip0")
    return folder, run_ranks(2, _runs, folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_signalled_rank_stops_all_and_the_rest_is_the_same(outcome, engine):
    folder, codes = outcome
    assert [found[engine] for found in codes] == [[0, 75, 0]] * 2
    stopped = min(int(p.stem[-8:]) for p in (folder / f"{engine}-cut").glob("lora-step*.safetensors"))
    assert 0 < stopped < STEPS
    for name in ("lora.safetensors", f"checkpoints/step-{STEPS:08d}/optimizer.safetensors"):
        a, b = load_file(folder / engine / name), load_file(folder / f"{engine}-cut" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), name


def test_every_rank_names_the_bad_sample_of_one(outcome):
    for found in outcome[1]:
        assert "clip0 loss nan" in found["nan"] and "clip1" not in found["nan"]
