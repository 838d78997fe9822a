"""Checkpoints as files, without a run: what is written, what is found, what is
said of what cannot be read."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.errors import CheckpointError
from hvtrain.train import checkpoint
from hvtrain.train.checkpoint import Progress, Snapshot

WEIGHTS = {"a::b": torch.arange(6.0).reshape(2, 3).t(), "c": torch.ones(2)}  # the one is not contiguous
STEP = torch.tensor(3.0)  # one tensor for all
STATE = {name: {"exp_avg": t + 1, "step": STEP} for name, t in WEIGHTS.items()}


def save(root: Path, step: int, *, keep_last: int = 0, ema: bool = False, results=()) -> Path:
    found = Snapshot(Progress(step, 2 * step, 1, 5), WEIGHTS, STATE, {"c": torch.zeros(2)} if ema else {})
    return checkpoint.save(root, found, keep_last=keep_last, results=results)


def error_of(function, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    return str(caught.value)


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path / "new/root", 7, ema=True)
    assert path == tmp_path / "new/root/step-00000007"
    assert (
        [p.name for p in (tmp_path / "new/root").iterdir()] == [path.name] and checkpoint.step_of(path) == 7
    )
    found = checkpoint.load(path)
    assert found.progress == Progress(step=7, cursor=14, epoch=1, bad_steps=5)
    assert equal(found.params, WEIGHTS) and equal(found.ema, {"c": torch.zeros(2)})
    assert found.optimizer.keys() == STATE.keys() and all(equal(found.optimizer[n], STATE[n]) for n in STATE)
    assert set(load_file(path / "optimizer.safetensors")) == {
        "a::b::exp_avg", "a::b::step", "c::exp_avg", "c::step"
    }
    text = '{\n "step": 7,\n "cursor": 14,\n "epoch": 1,\n "bad_steps": 5\n}\n'
    assert (path / "state.json").read_text() == text
    plain = save(tmp_path, 8)
    assert not (plain / "ema.safetensors").exists() and checkpoint.load(plain).ema == {}
    # before the optimizer has a state
    fresh = checkpoint.save(tmp_path, Snapshot(Progress(9), WEIGHTS, {}), keep_last=0)
    assert checkpoint.load(fresh).optimizer == {}


def test_the_oldest_go_and_a_step_that_is_saved_again_is_replaced(tmp_path):
    (tmp_path / ".writing-step-00000004").mkdir(parents=True)
    (tmp_path / ".writing-step-00000004/rest").touch()
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003/COMPLETE").unlink()  # not whole: nobody's
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000002"
    save(tmp_path, 4, keep_last=2)
    names = ["step-00000002", "step-00000003", "step-00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names and not (tmp_path / names[2] / "rest").exists()
    save(tmp_path, 4, keep_last=1, ema=True)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == names[1:]
        and (tmp_path / names[2] / "ema.safetensors").exists()
    )
    assert (
        checkpoint.newest(tmp_path / "none") is None
        and checkpoint.newest_sound(tmp_path / "none", print) is None
    )


def test_the_result_of_a_run_is_sealed_with_it(tmp_path):
    result, other, gone = (tmp_path / f"{name}.safetensors" for name in ("lora", "other", "gone"))
    result.write_bytes(b"abc")
    path = save(tmp_path / "checkpoints", 7, results=[result])
    assert json.loads((path / "COMPLETE").read_text())["results"] == {
        "lora.safetensors": checkpoint.seal(result)
    }
    assert checkpoint.seal(result) == [3, "78af5f94892f3950"]  # XXH3 of "abc", as published
    assert checkpoint.result_is_whole(path, result) and not checkpoint.result_is_whole(path, gone)
    result.write_bytes(b"abd")
    assert not checkpoint.result_is_whole(path, result)
    result.write_bytes(b"abcd")
    assert not checkpoint.result_is_whole(path, result)
    files = json.loads((path / "COMPLETE").read_text())["files"]
    checkpoint.seal_results(path, [result])
    assert (
        checkpoint.result_is_whole(path, result)
        and json.loads((path / "COMPLETE").read_text())["files"] == files
    )
    # Without a seal it is whole if it opens.
    other.write_bytes(b"abc")
    assert not checkpoint.result_is_whole(path, other)
    other.write_bytes((path / "params.safetensors").read_bytes())
    assert checkpoint.result_is_whole(path, other)
    (path / "COMPLETE").write_text("")
    assert not checkpoint.result_is_whole(path, result) and checkpoint.result_is_whole(path, other)


def test_a_file_of_many_pieces_is_sealed_whole(tmp_path):
    import xxhash

    data = bytes(range(256)) * (1 << 17) + b"end"
    (tmp_path / "f").write_bytes(data)
    assert checkpoint.seal(tmp_path / "f") == [(32 << 20) + 3, xxhash.xxh3_64_hexdigest(data)]


def test_what_is_damaged_is_named(tmp_path):
    path = save(tmp_path, 3)
    state = path / "state.json"
    whole = state.read_text()
    state.write_text(whole + " ")
    assert error_of(
        checkpoint.verify, path
    ) == f"{state} is damaged: {len(whole) + 1} bytes, {len(whole)} were written"
    state.write_text(whole.replace("5", "6"))
    assert error_of(
        checkpoint.verify, path
    ) == f"{state} is damaged: its checksum is not the one it was written with"
    state.unlink()
    assert error_of(checkpoint.verify, path) == f"{state} is missing"
    assert error_of(checkpoint.load, path).startswith(f"{path}: cannot be read ([Errno 2] No such file")
    # An older version's, without seals: the files must open.
    (path / "COMPLETE").write_text("")
    assert error_of(checkpoint.verify, path) == f"{state} is missing"
    for text, reason in (
        ("{", "Expecting property name"), ('{"steps": 1}', "Progress.__init__() got an unexpected keyword")
    ):
        state.write_text(text)
        assert error_of(checkpoint.verify, path).startswith(f"{state} is damaged: {reason}")
        assert error_of(checkpoint.load, path).startswith(f"{path}: cannot be read ({reason}")
    state.write_text(whole)
    checkpoint.verify(path)
    for name in ("params.safetensors", "optimizer.safetensors"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-1])
        assert error_of(checkpoint.verify, path).startswith(f"{path / name} is damaged: ")
        assert error_of(checkpoint.load, path).startswith(f"{path}: cannot be read (")
        (path / name).write_bytes(data)
    (path / "COMPLETE").write_text("{")
    assert error_of(checkpoint.verify, path).startswith(
        f"{path / 'COMPLETE'} is damaged: Expecting property name"
    )


def test_a_damaged_one_is_set_aside_under_a_free_name(tmp_path):
    sound = save(tmp_path, 1)
    said = []
    for again in ("", "-2", "-3"):
        path = save(tmp_path, 2)
        os.truncate(path / "params.safetensors", 9)
        size = load_size(path)
        assert checkpoint.newest_sound(tmp_path, said.append) == sound
        assert said.pop() == (
            f"warning: {path}/params.safetensors is damaged: 9 bytes, {size} were written; set aside as "
            f"damaged-step-00000002{again}, the run goes on from step-00000001"
        )
        assert (tmp_path / f"damaged-step-00000002{again}/COMPLETE").exists() and not said
    (sound / "state.json").unlink()
    assert error_of(checkpoint.newest_sound, tmp_path, said.append) == (
        f"{sound}/state.json is missing, and no sound checkpoint is left in {tmp_path}; "
        "remove that directory to begin this run anew"
    )
    assert sound.exists() and not said


def load_size(path: Path) -> int:
    return json.loads((path / "COMPLETE").read_text())["files"]["params.safetensors"][0]


@pytest.mark.parametrize(
    "n, free, needed",
    [
        (1 << 30, "1.00 GiB", "2.00 GiB"), (3 << 29, "1.50 GiB", "2.50 GiB"),
        (4 << 20, "4.00 MiB", "1.00 GiB"), ((1 << 30) - (1 << 20), "1023.00 MiB", "2.00 GiB"),
    ],
)  # fmt: skip
def test_how_much_room_there_is_and_is_needed(tmp_path, monkeypatch, n, free, needed):
    mib = torch.zeros(1 << 18)
    big = Snapshot(Progress(4), {"a": mib}, {"a": {"m": mib, "v": mib.half()}}, {"a": mib})
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=n if path.is_dir() else 0)
    )
    rest = n - 7 * (1 << 19)  # 3.5 MiB of tensors
    checkpoint.check_room(tmp_path / "x/y", big, results=rest)
    with pytest.raises(CheckpointError):
        checkpoint.check_room(tmp_path, big, results=rest + 1)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_room(tmp_path, big, results=rest + (1 << 30))
    assert str(caught.value) == (
        f"{tmp_path}: {free} free, step 4 needs {needed} for its checkpoint and its result; "
        "make room and start again: the run continues from the checkpoint before"
    )


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    assert error_of(checkpoint.check_room, tmp_path / "file/x", Snapshot(Progress(), {}, {})) == (
        f"{tmp_path}/file/x cannot be written (Not a directory); mend that and start again"
    )
