"""docs/optimizers.md, cell by cell: what it says works trains the tiny model on two processes;
the rest is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import OptimConfig, TrainConfig, ZeroConfig
from hvtrain.errors import ConfigError
from hvtrain.parallel.context import start
from hvtrain.train import run as train
from hvtrain.train.engine import check_engine
from hvtrain.train.optim import OPTIMIZERS, check_optimizer
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards
from tests.train.test_both_experts import pair_config, write_pair

DOC = Path(__file__).parents[2] / "docs/optimizers.md"
# the held-out loss is above START untrained, and below REACHED after so many steps
STEPS, START, REACHED = 40, 2.1, 1.95
RATES = {
    "adamw": 3e-3, "adam": 3e-3, "adamw8bit": 3e-3, "lion": 1e-3, "adafactor": 0.3, "came": 3e-4,
    "prodigy": 1.0, "schedulefree": 1e-2, "muon": 1e-2, "torch.optim.SGD": 0.3,
}
# the usual d0 is for thousands of steps
ARGS = {"torch.optim.SGD": "{momentum: 0.9}", "prodigy": "{d0: 1e-3}"}
PLACES = {
    "plain PyTorch": ("zero.engine=torch", "zero.stage=0"),
    "ZeRO-0": ("zero.engine=deepspeed", "zero.stage=0"),
    **{f"ZeRO-{s}": ("zero.engine=deepspeed", f"zero.stage={s}") for s in (1, 2, 3)},
    **{
        f"ZeRO-{s}, offload": ("zero.engine=deepspeed", f"zero.stage={s}", "zero.offload_optimizer=cpu")
        for s in (1, 2, 3)
    },
}


def _first_table() -> list[str]:
    text = DOC.read_text()
    return text[text.index("| | plain") :].split("\n\n")[0].splitlines()


def table() -> dict[tuple[str, str], bool]:
    """(optimizer, place) -> whether the document says that it works."""
    rows = [[c.strip(" `") for c in line.strip("|\n").split("|")] for line in _first_table()]
    head = rows[0][1:]
    return {
        (row[0], place): cell == "yes" for row in rows[2:] for place, cell in zip(head, row[1:], strict=True)
    }


def cell(shards: Path, output: Path, name: str, place: str, *more: str) -> TrainConfig:
    args = f"optim.args={ARGS.get(name, '{}')}"
    return config(
        shards, output, f"optim.name={name}", f"optim.lr={RATES[name]}", f"run.steps={STEPS}",
        f"eval.shards={shards}", f"eval.every_steps={STEPS}", "eval.max_batches=1",
        "eval.quantiles=[0.3, 0.7]", "adapter.rank=16", "adapter.alpha=16", "data.batch_size=1",
        "data.calibration=0", args, *PLACES[place], *more,
    )


def held_out(output: Path) -> float:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/loss"] for row in rows if "eval/loss" in row][-1]


def test_the_document_has_every_cell_and_says_what_the_checks_do():
    says = table()
    assert set(says) == {(name, place) for name in (*OPTIMIZERS, "torch.optim.SGD") for place in PLACES}
    for (name, place), works in says.items():
        options = dict(item.removeprefix("zero.").split("=") for item in PLACES[place])
        zero = ZeroConfig(options["engine"], int(options["stage"]), options.get("offload_optimizer", "none"))
        check_engine(zero)
        if name == "adamw8bit" and works:
            continue  # its package is not everywhere
        if works:
            check_optimizer(OptimConfig(name, RATES[name]), zero)
        else:
            with pytest.raises(
                ConfigError, match=f"optim.name: {name} |which is not installed: pip install torchao"
            ):
                check_optimizer(OptimConfig(name, RATES[name]), zero)


def train_cells(folder: Path, cells: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """On each of several ranks, with folder/shards: the held-out loss that each reaches."""
    found = {}
    for number, (name, place) in enumerate(cells):
        output = folder / str(number)
        assert train.run(cell(folder / "shards", output, name, place), start()) == 0
        found[name, place] = held_out(output)
    return found


def check_reached(folder: Path, losses: dict[tuple[str, str], float]) -> None:
    shards = folder / "shards"
    untrained = config(
        shards, folder / "before", "optim.lr=0", "run.steps=1", f"eval.shards={shards}", "eval.every_steps=1",
        "eval.max_batches=1", "eval.quantiles=[0.3, 0.7]", "data.batch_size=1"
    )
    assert train.run(untrained) == 0 and held_out(folder / "before") > START
    print("\n".join(f"{name:<16} {place:<16} {loss:.4f}" for (name, place), loss in losses.items()))
    assert not {at: loss for at, loss in losses.items() if not loss < REACHED}


# In every run of the tests, by test_monitor's processes: pieces that are stepped on the host,
# and several optimizers as one.
SOME = [("lion", "ZeRO-2, offload"), ("muon", "ZeRO-0")]


@pytest.mark.slow
@pytest.mark.parametrize("name", RATES)
def test_every_cell_learns(name, tmp_path):
    if name == "adamw8bit":
        pytest.importorskip(
            "torchao", reason="the 8-bit optimizer needs torchao: pip install hvtrain[adamw8bit]"
        )
    make_shards(tmp_path / "shards", n=4)
    cells = [at for at, works in table().items() if works and at[0] == name]
    losses = run_ranks(2, train_cells, tmp_path, cells, timeout_s=1500)[0]
    assert set(losses) == set(cells)
    check_reached(tmp_path, losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(RATES) - {"adamw8bit"}))
def test_every_optimizer_trains_both_experts_of_a_model(name, tmp_path):
    """Each expert has one of its own; a run that continues has both states back."""
    folder = write_pair(tmp_path)
    look = (
        f"eval.shards={folder / 'set'}", "eval.every_steps=10", "eval.max_batches=2", "data.calibration=0"
    )
    items = (f"optim.name={name}", f"optim.lr={RATES[name]}", "run.steps=30", *look)
    assert train.run(
        pair_config(folder, "before", "optim.lr=0", *look, "run.steps=1", "eval.every_steps=1")
    ) == 0
    before = held_out(folder / "before")
    assert train.run(pair_config(folder, "run", *items)) == 0
    assert held_out(folder / "run") < 0.97 * before
    for steps in (13, 30):
        assert train.run(pair_config(folder, "cut", *items, f"run.steps={steps}")) == 0
    for expert in ("high", "low"):
        a, b = (load_file(folder / at / f"lora-{expert}.safetensors") for at in ("run", "cut"))
        assert all(torch.equal(a[n], b[n]) for n in a)
