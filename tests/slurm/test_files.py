"""The files of a sliced run: what is in them, what is said of damaged ones, who holds the lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from pathlib import Path

import pytest

from hvtrain.errors import ConfigError, LaunchError
from launcher.jobs import slices
from tests.slurm.fake import a_run, weights


def message(of, error: type[Exception] = LaunchError) -> str:
    with pytest.raises(error) as caught:
        of()
    return str(caught.value)


def test_a_run_as_it_was_asked_for(tmp_path, ascii_locale):
    """The file is read by later versions, and by jobs on other machines."""
    plan = slices.Slices(
        "/p.json", "é.yaml", ("a=1",), ("/1", "/2"), 2, 3, 4, "5:00", "/site", "slurm", 2, ("0", "1"),
        ("--output", "o"), 7
    )
    slices.save_slices(tmp_path / "a" / "run", plan)
    assert json.loads((tmp_path / "a/run/slices.json").read_text()) == {
        "plan": "/p.json", "config": "é.yaml", "overrides": ["a=1"], "data": ["/1", "/2"], "n": 2, "nproc": 3,
        "nodes": 4, "time": "5:00", "site": "/site", "backend": "slurm", "at_once": 2, "gpus": ["0", "1"],
        "merge": ["--output", "o"], "max_restarts": 7, "cwd": "",
    }
    assert slices.load_slices(tmp_path / "a/run") == slices.load_slices(str(tmp_path / "a/run")) == plan
    slices.save_slices(tmp_path / "a" / "run", plan)  # again: nothing to say
    assert sorted(path.name for path in (tmp_path / "a/run").iterdir()) == ["logs", "slices.json", "state"]


@pytest.mark.parametrize(
    ("n", "width", "name"), [(1, 2, "01"), (99, 2, "07"), (100, 3, "007"), (1000, 4, "0007")]
)
def test_names_are_as_wide_as_the_last(n, width, name):
    plan = slices.Slices("p", None, (), (), n)
    assert (plan.width(), plan.name(min(n, 7))) == (width, name)


def test_a_run_that_cannot_be_read(tmp_path):
    path = tmp_path / "slices.json"
    assert message(lambda: slices.load_slices(tmp_path)) == (
        f"{path}: cannot be read (No such file or directory); `hvtrain slices run` writes it"
    )
    slices.save_slices(tmp_path, slices.Slices("p", None, (), (), 1, merge=("--as", "lora", "--output")))
    for text in ("{", "[]", '{"odd": 1}', "\xff", path.read_text()):
        path.write_text(text, encoding="latin-1")
        assert re.match(rf"{path}: damaged \(.+\)$", message(lambda: slices.load_slices(tmp_path)))


def test_a_state_is_kept_and_never_half_written(tmp_path, monkeypatch):
    a_run(tmp_path)
    assert slices.load_state(tmp_path, "01") == slices.JobState([], None, None, None)
    slices.save_state(tmp_path, "01", slices.JobState(["7_1"], 1.0))
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    slices.save_state(tmp_path, "01", slices.JobState(["7_1", "8_1"], 1.0, 2.0, 75))
    temporary, folder = synced
    assert Path(temporary).parent == Path(folder) == tmp_path / "state"
    # and on the disk before
    assert re.fullmatch(rf"\.01\.json\.\w+-{os.getpid()}-\w+\.tmp", Path(temporary).name)
    file = tmp_path / "state/01.json"
    assert file.read_text() == (
        '{\n "jobs": [\n  "7_1",\n  "8_1"\n ],\n "started": 1.0,\n "ended": 2.0,\n "code": 75\n}\n'
    )
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["01.json"]
    assert slices.load_state(tmp_path, "01") == slices.JobState(["7_1", "8_1"], 1.0, 2.0, 75)

    def fails(number):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="full"):
        slices.save_state(tmp_path, "01", slices.JobState())
    assert slices.load_state(tmp_path, "01").code == 75


@pytest.mark.parametrize("text", ["", "{", "[]", '{"odd": 1}'])
def test_a_state_that_cannot_be_read_is_an_error(tmp_path, text):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/01.json").write_text(text)
    said = message(lambda: slices.load_state(tmp_path, "01"))
    assert re.match(
        rf"{tmp_path}/state/01\.json: cannot be read \(.+\); remove it once you know that 01 is not running$",
        said, re.S
    )


def test_marks_of_cancelled_attempts_add_up(tmp_path):
    assert slices.cancelled(tmp_path) == {}
    a_run(tmp_path)
    slices.mark_cancelled(tmp_path, {})
    assert not (tmp_path / "state/cancelled.json").exists()
    slices.mark_cancelled(tmp_path, {"01": "7_1", "02": ""})
    slices.mark_cancelled(tmp_path, {"02": "8_2"})
    assert slices.cancelled(tmp_path) == {"01": "7_1", "02": "8_2"}
    for damaged in ("{", "7"):
        (tmp_path / "state/cancelled.json").write_text(damaged)
        assert slices.cancelled(tmp_path) == {}


def test_attempts_are_noted(tmp_path, monkeypatch):
    a_run(tmp_path)
    clock = iter((10.0, 20.0, 30.0, 40.0, 50.0))
    monkeypatch.setattr(slices.time, "time", lambda: next(clock))
    slices.note_start(tmp_path, "01", "7_1")
    slices.note_end(tmp_path, "01", 75)
    assert slices.load_state(tmp_path, "01") == slices.JobState(["7_1"], 10.0, 20.0, 75)
    slices.note_start(tmp_path, "01", "7_1")  # requeued: the same job
    assert slices.load_state(tmp_path, "01") == slices.JobState(["7_1"], 30.0, None, None)
    slices.note_start(tmp_path, "01", "8_1")
    slices.note_start(tmp_path, "01", "7_1")
    assert slices.load_state(tmp_path, "01") == slices.JobState(["7_1", "8_1", "7_1"], 50.0)


# --- the lock -----------------------------------------------------------------------------------------------


def test_the_lock_names_its_holder_and_is_taken_back(tmp_path):
    run = tmp_path / "new/run"
    me = f"{os.getpid()}:{slices.process_start(os.getpid())}"
    assert slices.starter(run) == ""
    with slices.only_one(run):
        assert (run / "state/lock").read_text() == slices.starter(run) == me
        with pytest.raises(LaunchError) as caught, slices.only_one(run):
            pass
        assert str(caught.value) == (
            f"{run}: its slices are being started already, by process {os.getpid()}; `hvtrain slices status "
            f"{run}` shows them, `hvtrain slices cancel {run}` stops them"
        )
        (run / "state/lock").write_text("999999999:1")
        assert "by process unknown;" in message(lambda: slices.only_one(run).__enter__())
    assert (run / "state/lock").read_text() == ""
    (run / "state/lock").write_text("left by one that was killed")
    with pytest.raises(KeyError), slices.only_one(run):
        assert (run / "state/lock").read_text() == me
        raise KeyError
    assert (run / "state/lock").read_text() == ""


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        assert how == fcntl.LOCK_EX | fcntl.LOCK_NB
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with slices.only_one(tmp_path):
        assert slices.starter(tmp_path)
    assert capsys.readouterr() == (
        "",
        f"warning: {tmp_path}/state/lock: this file system has no locks (No locks available): start "
        f"{tmp_path} once only\n"
    )


STAT = "7 (a) S) {state} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (STAT.format(state="S"), "4711"), (STAT.format(state="Z"), ""), ("7 (a) S 1 2", ""), ("", ""),
        (None, "")
    ]
)
def test_a_process_is_known_by_its_start(monkeypatch, text, start):
    def read(path):
        assert str(path) == "/proc/7/stat"
        if text is None:
            raise ProcessLookupError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert slices.process_start(7) == start
    assert slices.alive("7:4711") == (start != "")
    assert not slices.alive("7:4712") and not slices.alive("7:") and not slices.alive("")


# --- inputs and results -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read (No such file or directory); `hvtrain slices plan` writes one"),
        ("{", "not a slice plan (Expecting property name enclosed in double quotes: line 1 column 2 (char "
        "1))"),
        ("{}", "not a slice plan ('format')"), ('{"format": "hvtrain-slices/1"}', "not a slice plan ('n')"),
        ('{"format": "hvtrain-slices/2", "n": 2}', "format 'hvtrain-slices/2', expected 'hvtrain-slices/1'"),
        ('{"format": "hvtrain-slices/1", "n": [2]}', "not a slice plan (int() argument must be"),
        ("7", "not a slice plan ('int' object is not subscriptable)"),
    ],
)
def test_a_plan_is_one_or_it_is_an_error(tmp_path, ascii_locale, text, says):
    path = tmp_path / "é.json"
    if text is not None:
        path.write_text(text)
    assert message(lambda: slices.plan_size(str(path)), ConfigError).startswith(f"--plan {path}: {says}")
    path.write_text('{"format": "hvtrain-slices/1", "n": 12, "é": "ü"}', encoding="utf-8")
    assert slices.plan_size(str(path)) == 12


def test_the_shard_sets_of_slices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(lambda: slices.data_of("parts", 2), ConfigError) == "--data parts: no such directory"
    assert slices.data_of("s3://a/b", 3) == ("s3://a/b",) * 3
    for name in ("02", "01", "10x", "rest"):
        (tmp_path / "parts" / name).mkdir(parents=True)
    (tmp_path / "parts/03").touch()  # a file is no part
    needs = (
        "--data parts: {} slices need the parts 01 to {} (`hvtrain shards split --n {}`) or one shard set; "
        "found {}"
    )
    assert slices.data_of("parts", 2) == (str(tmp_path / "parts/01"), str(tmp_path / "parts/02"))
    for n, last in ((1, "01"), (3, "03"), (12, "12")):
        assert message(
            lambda n=n: slices.data_of("parts", n), ConfigError
        ) == needs.format(n, last, n, "01, 02")
    (tmp_path / "empty").mkdir()
    assert "; found none" in message(lambda: slices.data_of("empty", 1), ConfigError)
    (tmp_path / "empty/manifest.json").touch()
    assert slices.data_of("empty", 2) == ("empty", "empty")


def header(size: int, table: str) -> bytes:
    return size.to_bytes(8, "little") + table.encode()


TABLE = '{"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": [4, 6]}, "__metadata__": {"x": "y"}}'
SOUND = header(len(TABLE), TABLE) + b"123456"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (SOUND, None), (SOUND[:-1], f"{len(SOUND) - 1} bytes"), (SOUND + b"1", f"{len(SOUND) + 1} bytes"),
        (b"", "Expecting value"), (header(2, "{}"), "10 bytes"),
        (header(2**62, TABLE), f"{len(TABLE) + 8} bytes"), (header(4, "[7] "), "'list' object"),
        (header(9, '{"a": {}}'), "'data_offsets'"), (header(8, '{"a": 1}'), "'int' object"),
        (header(27, '{"a": {"data_offsets": []}}'), "list index"), (header(1, "\xff"), "."),
    ],
)
def test_what_is_wrong_with_a_result(tmp_path, body, says):
    path = tmp_path / "x.safetensors"
    assert slices.amiss(path) == "x.safetensors is missing"
    path.write_bytes(body)
    found = slices.amiss(path)
    if says is None:
        assert found == ""
    else:
        assert re.match(
            rf"x\.safetensors is damaged \(.*{re.escape(says) if says != '.' else '.'}.*\)$", found
        ), found
    assert slices.amiss(tmp_path).startswith(f"{tmp_path.name} is damaged ([Errno 21]")


def test_where_a_result_is_and_that_a_damaged_one_makes_room(tmp_path, capsys, flushes):
    plan = a_run(tmp_path, n=100)
    path = tmp_path / "007/slice-007.safetensors"
    assert slices.result(tmp_path, plan, 7) == path
    weights(path)
    slices.set_damaged_aside(tmp_path, plan, 7)
    assert path.exists() and capsys.readouterr().out == ""
    path.write_bytes(b"")
    slices.set_damaged_aside(tmp_path, plan, 7)
    assert [p.name for p in path.parent.iterdir()] == ["slice-007.safetensors.damaged"]
    assert capsys.readouterr().out == (
        "slice-007.safetensors is damaged (Expecting value: line 1 column 1 (char 0)); it is now "
        "slice-007.safetensors.damaged\n"
    )
    assert flushes == [True]  # before the training writes to the same log
