"""What lies in a run's directory: sealed, compared when it is read, made again where it is lost,
cleared of what kills left."""

import json
import os
import shutil
import time
import weakref
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import AdapterConfig, DataConfig, FlowConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.train import checkpoint, setup
from hvtrain.train import run as train
from hvtrain.train.checkpoint import Progress, Snapshot
from hvtrain.train.engine import TorchEngine
from hvtrain.train.files import RunFiles
from hvtrain.train.rundir import cut_metrics
from hvtrain.train.setup import find_base, identity
from tests.train.shardset import config, make_shards

EMA = ("run.ema_decay=0.5",)


def snapshot(step: int, *, ema: bool = False) -> Snapshot:
    weights = {"w": torch.full((300,), float(step))}
    return Snapshot(
        Progress(step, cursor=2 * step), weights, {"w": {"exp_avg": torch.ones(300)}}, weights if ema else {}
    )


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """Six steps with a moving average, checkpoints of 3 and 6. Copy it before you harm it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train.run(config(shards, run, "run.save_every_steps=3", *EMA)) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(shards, run, *overrides):
    return train.run(config(shards, run, "run.save_every_steps=3", *EMA, *overrides))


# --- seals --------------------------------------------------------------------------------------------------


def test_a_seal_holds_size_and_checksum_of_every_file(tmp_path):
    import xxhash

    path = checkpoint.save(tmp_path, snapshot(4, ema=True), keep_last=0)
    seals = json.loads((path / "COMPLETE").read_text())["files"]
    assert set(seals) == {"params.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"}
    for name, (size, checksum) in seals.items():
        data = (path / name).read_bytes()
        assert size == len(data) and checksum == xxhash.xxh3_64_hexdigest(data)
    checkpoint.verify(path)


@pytest.mark.parametrize(
    "name", ["params.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_every_harm_is_noticed_and_the_one_before_is_taken(tmp_path, name, harm):
    checkpoint.save(tmp_path, snapshot(3, ema=True), keep_last=0)
    path = checkpoint.save(tmp_path, snapshot(6, ema=True), keep_last=0)
    {
        "flip": flip, "cut": lambda p: os.truncate(p, p.stat().st_size - 1), "gone": Path.unlink
    }[harm](path / name)
    said = []
    assert checkpoint.newest_sound(tmp_path, said.append) == tmp_path / "step-00000003"
    wanted = {"flip": "its checksum is not the one", "cut": "bytes, ", "gone": "is missing"}[harm]
    assert len(said) == 1 and wanted in said[0] and f"step-00000006/{name}" in said[0]
    assert "set aside as damaged-step-00000006, the run goes on from step-00000003" in said[0]
    assert (tmp_path / "damaged-step-00000006").is_dir() and not path.exists()
    # said once
    assert checkpoint.newest_sound(tmp_path, said.append).name == "step-00000003" and len(said) == 1


def test_without_a_sound_one_it_does_not_begin_at_zero(tmp_path):
    for step in (3, 6):
        flip(checkpoint.save(tmp_path, snapshot(step), keep_last=0) / "params.safetensors")
    with pytest.raises(
        CheckpointError, match=r"step-00000006/params.safetensors is damaged: .* no sound checkpoint is left"
    ):
        checkpoint.newest_sound(tmp_path, print)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]


def test_checkpoints_of_older_versions_open(tmp_path):
    """Their COMPLETE is empty: whole files are all that can be asked of them."""
    path = checkpoint.save(tmp_path, snapshot(3), keep_last=0)
    (path / "COMPLETE").write_text("")
    assert checkpoint.newest_sound(tmp_path, print) == path
    assert checkpoint.load(path).progress == Progress(3, cursor=6)
    os.truncate(path / "params.safetensors", 100)
    with pytest.raises(CheckpointError, match="params.safetensors is damaged"):
        checkpoint.newest_sound(tmp_path, print)


def test_everything_is_on_the_disk_before_the_name_says_so(tmp_path, monkeypatch):
    """A power cut after the rename must find the files' bytes: fsync of each file and of the
    folder, then the name, then root."""
    events, handles = [], {}
    plain_open, plain_fsync, plain_replace = os.open, os.fsync, os.replace

    def opened(path, *args, **options):
        handle = plain_open(path, *args, **options)
        handles[handle] = Path(path)
        return handle

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda h: (events.append(("sync", handles[h].name)), plain_fsync(h))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(("name", Path(b).name)), plain_replace(a, b))[1]
    )
    checkpoint.save(tmp_path / "c", snapshot(3, ema=True), keep_last=0)
    named = events.index(("name", "step-00000003"))
    files = (
        "params.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "COMPLETE",
        ".writing-step-00000003"
    )
    assert all(("sync", name) in events[:named] for name in files)
    assert events[named + 1 :] == [("sync", "c")]


def test_a_failed_write_leaves_nothing_half(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    checkpoint.save(tmp_path, snapshot(3), keep_last=0)

    def full(*args):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SafetensorError):
        checkpoint.save(tmp_path, snapshot(6), keep_last=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_full_disk_in_a_run_is_one_line(shards, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        CheckpointError, match="step 6 could not be saved .*No space left on device.*start again"
    ) as caught:
        train.run(config(shards, tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_room_counts_the_file_for_the_user(tmp_path, monkeypatch):
    found = snapshot(3)
    checkpointed = 2 * 300 * 4
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=checkpointed + 999)
    )
    checkpoint.check_room(tmp_path, found, results=999)
    with pytest.raises(CheckpointError, match="for its checkpoint and its result"):
        checkpoint.check_room(tmp_path, found, results=1000)


def test_a_run_asks_for_the_room_that_its_files_take(finished, shards, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "check_room", lambda root, found, results: asked.append(results))
    train.run(config(shards, tmp_path / "run", "run.save_every_steps=3", *EMA))
    step = (finished / "lora-step00000003.safetensors").stat().st_size
    last = sum((finished / f"lora{end}.safetensors").stat().st_size for end in ("", "-ema"))
    assert step < asked[0] < step + (2 << 20) and last < asked[1] < last + (4 << 20)


def test_the_host_holds_one_copy_of_the_run_at_a_time(shards, tmp_path, monkeypatch):
    """Two of a 13B full fine-tune are more than a node has: before the weights are copied again, also for the
    best ones, what was copied before is on the disk and let go."""
    alive: list[weakref.ref] = []
    at_export: list[int] = []
    export, state, written = TorchEngine.export_params, TorchEngine.export_optimizer, RunFiles.export

    def exported(engine):
        until = time.monotonic() + 20  # the writing thread lets go a moment after it has said that it is done
        while (n := sum(ref() is not None for ref in alive)) and time.monotonic() < until:
            time.sleep(0.01)
        at_export.append(n)
        found = export(engine)
        alive.extend(map(weakref.ref, found.values()))
        return found

    def optimizer(engine):
        found = state(engine)
        alive.extend(weakref.ref(t) for s in found.values() for t in s.values())
        return found

    def slow(*args):
        time.sleep(0.8)
        written(*args)

    monkeypatch.setattr(TorchEngine, "export_params", exported)
    monkeypatch.setattr(TorchEngine, "export_optimizer", optimizer)
    monkeypatch.setattr(RunFiles, "export", slow)
    train.run(config(
        shards, tmp_path / "run", "run.save_every_steps=1", "run.steps=2", "run.keep_best=true",
        "eval.every_steps=1", f"eval.shards={shards}", "eval.max_batches=1", "optim.lr=0.01",
    ))
    assert len(at_export) >= 3 and at_export == [0] * len(at_export)


# --- a run goes on ------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(finished, run, shards, capfd):
    """The disk lost a bit of the newest: the run goes on from the one before, says so, and ends the same."""
    flip(run / "checkpoints/step-00000006/params.safetensors")
    (run / "lora.safetensors").unlink()
    assert again(shards, run) == 0
    assert "goes on from step-00000003" in capfd.readouterr().err
    assert same(run / "lora.safetensors", finished / "lora.safetensors")
    assert same(run / "lora-ema.safetensors", finished / "lora-ema.safetensors")
    steps = [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["lora.safetensors", "lora-ema.safetensors"])
@pytest.mark.parametrize("harm", ["gone", "empty", "flip"])
def test_a_lost_result_is_made_again(finished, run, shards, name, harm, capfd, monkeypatch):
    {"gone": Path.unlink, "empty": lambda p: p.write_bytes(b""), "flip": flip}[harm](run / name)
    assert again(shards, run) == 0
    assert f"made again from its checkpoint: {name}" in capfd.readouterr().out
    assert same(run / name, finished / name)
    before = (run / name).stat().st_mtime_ns
    monkeypatch.setattr(setup, "load_dit", None)  # nothing to do: the model is not even read
    assert again(shards, run) == 0  # sealed anew
    assert "nothing to do" in capfd.readouterr().out and (run / name).stat().st_mtime_ns == before


def test_leftovers_of_kills_are_cleared_and_nothing_else(run, shards):
    left = [
        run / ".run.json.123.tmp", run / ".lora.safetensors.0a1b2c3d-123-0a1b2c3d.tmp",
        run / ".lora-step00000003.safetensors.9.tmp", run / "checkpoints/step-00000006/.COMPLETE.9.tmp",
    ]
    kept = [run / ".other.safetensors.9.tmp", run / "notes.txt", run / ".lora.safetensors.partial"]
    for path in left + kept:
        path.touch()
    (run / "checkpoints/.writing-step-00000005").mkdir()
    (run / "checkpoints/.writing-step-00000005/params.safetensors").touch()
    assert again(shards, run) == 0
    assert not any(p.exists() for p in left) and all(p.exists() for p in kept)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    rows = [json.dumps({"step": s, "train/loss": 1.0}) + "\n" for s in (1, 2, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 1, "tr')
    cut_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:3])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    cut_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before  # nothing to cut: not written
    cut_metrics(tmp_path / "none", 2)


# --- whose run it is ----------------------------------------------------------------------------------------


def test_another_run_is_told_key_by_key(run, shards):
    with pytest.raises(ConfigError) as caught:
        again(shards, run, "adapter.rank=8", "flow.sigmoid_scale=0.5", "run.seed=9")
    text = str(caught.value)
    assert (
        "adapter.rank is 4 there, 8 here; flow.sigmoid_scale is 1.0 there, 0.5 here; run.seed is 0 there, 9 "
        "here; " in text
    )
    assert "alpha" not in text and "\n" not in text


def test_every_key_of_the_noise_levels_is_part_of_a_run(shards):
    base = find_base(config(shards, Path("x")).model)
    found = identity(
        [base], AdapterConfig(), None, FlowConfig(), [], data=DataConfig(), optimizer="adamw", seed=0,
        name="lora"
    )
    assert {f"flow.{f.name}" for f in fields(FlowConfig)} <= set(found)


def test_what_may_change_is_said(run, shards, capfd):
    assert again(shards, run, "optim.lr=0.005", "run.steps=7") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "other settings" in line]
    assert said == [
        "this run goes on with other settings than before: optim.lr 0.001 -> 0.005, run.steps 6 -> 7"
    ]
    assert again(shards, run, "optim.lr=0.005", "run.steps=7") == 0
    assert "other settings" not in capfd.readouterr().err


def test_runs_of_older_versions_continue(run, shards):
    """Their run.json kept adapter and flow as lists, and did not know keys that came later."""
    old = json.loads((run / "run.json").read_text())
    adapter = [old.pop(f"adapter.{k}") for k in ("type", "rank", "alpha", "dropout", "include", "exclude")]
    names = (
        "timestep_sampling", "shift", "sigmoid_scale", "logit_mean", "min_sigma", "max_sigma", "guidance"
    )
    flow = [old.pop(f"flow.{k}") for k in names]
    (run / "run.json").write_text(json.dumps({**old, "adapter": adapter, "flow": flow}))
    assert again(shards, run) == 0
    (run / "run.json").write_text(json.dumps({**old, "adapter": [adapter[0], 5, *adapter[2:]], "flow": flow}))
    with pytest.raises(ConfigError, match="holds another run: adapter.rank is 5 there, 4 here;"):
        again(shards, run)


def test_a_moving_average_that_begins_late_is_said(shards, tmp_path, capfd):
    train.run(config(shards, tmp_path / "run", "run.steps=1"))
    train.run(config(shards, tmp_path / "run", "run.steps=2", *EMA))
    assert "step-00000001 holds no moving average; it begins at step 1" in capfd.readouterr().out
