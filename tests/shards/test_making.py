"""split, merge and export: killed or out of disk anywhere, the same command finishes
what another one may not touch."""

import errno
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from shards import ShardError, edit, open_set, ways
from shards.schema import save_manifest
from shards.verify import verify
from tests.shards.sets import make_set

COMMANDS = {
    "split": lambda source, out: edit.split(str(source), out, ways.by_number(2)),
    "merge": lambda source, out: edit.merge([str(source), str(source.parent / "b")], out),
    "export": lambda source, out: edit.export(str(source), out),
}
WRITES = ("replace", "link", "fsync")
STEPS = (*WRITES, "unlink")  # what moves the disk from one state to the next
REAL = {name: getattr(os, name) for name in STEPS}


class Killed(BaseException):
    """Nothing catches it, and nothing after it reaches the disk."""


def files(folder):
    return {
        str(p.relative_to(folder)): contents(p.read_bytes()) for p in Path(folder).rglob("*") if p.is_file()
    }


def contents(data):
    """Of a safetensors file the header as a dict: its library writes the metadata in any order."""
    n = int.from_bytes(data[:8], "little")
    return (json.loads(data[8 : 8 + n]), data[8 + n :]) if data[8:9] == b"{" and n < len(data) else data


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    make_set(root / "a", sizes=((3, 5), (1, 4)))  # of two tars one is cut in two, one stays whole
    make_set(root / "b", sizes=((3, 5), (1, 4), (2, 3)))  # a's, and two more
    return root / "a"


@pytest.fixture(scope="module")
def dead():
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    return gone.pid


def kill(name):
    raise Killed(name)


def until(monkeypatch, step, what, steps=STEPS):
    """Let `step` steps happen, then `what` in place of every other; returns the counter."""
    seen = [0]

    def wrapped(name):
        def call(*given, **named):
            seen[0] += 1
            if seen[0] > step:
                what(name)
            return REAL[name](*given, **named)

        return call

    for name in steps:
        monkeypatch.setattr(os, name, wrapped(name))
    return seen


def steps_of(monkeypatch, command, source, out, steps=STEPS):
    with monkeypatch.context() as patch:
        seen = until(patch, 10**9, None, steps)
        COMMANDS[command](source, out)
    return seen[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_anywhere_the_same_command_finishes(tmp_path, monkeypatch, sources, dead, command):
    n = steps_of(monkeypatch, command, sources, tmp_path / "whole")
    wanted = files(tmp_path / "whole")
    assert n > 8 and not [name for name in wanted if "/." in f"/{name}"]

    for step in range(n):
        out = tmp_path / f"{step}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            until(patch, step, kill)
            patch.setattr(os, "getpid", lambda: dead)
            COMMANDS[command](sources, out)
        half = files(out)
        named = {name: data for name, data in half.items() if "/." not in f"/{name}"}
        assert all(wanted[name] == data for name, data in named.items()), step  # whole or not at all
        COMMANDS[command](sources, out)
        assert files(out) == wanted, step


@pytest.mark.parametrize("command", COMMANDS)
def test_out_of_disk_it_says_so_and_the_same_command_finishes(tmp_path, monkeypatch, sources, command):
    n = steps_of(monkeypatch, command, sources, tmp_path / "whole", WRITES)
    wanted = files(tmp_path / "whole")

    def no_room(name):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(0, n, 3):
        out = tmp_path / f"{step}"
        with (
            monkeypatch.context() as patch,
            pytest.raises(ShardError, match="disk is full.*same command again, it continues")
        ):
            until(patch, step, no_room, WRITES)
            COMMANDS[command](sources, out)
        assert not list(out.rglob("*.tmp")), step
        COMMANDS[command](sources, out)
        assert files(out) == wanted, step


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch, sources):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        until(patch, 30, kill)
        COMMANDS["split"](sources, tmp_path / "out")
    before = {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*.tar")}
    assert len(before) > 2
    COMMANDS["split"](sources, tmp_path / "out")
    assert {p: p.stat().st_ino for p in before} == before


def test_another_command_or_another_set_is_refused(tmp_path, monkeypatch, sources):
    out = tmp_path / "out"
    for source in (tmp_path / "a", tmp_path / "b"):
        make_set(source, sizes=((3, 5), (2, 4)))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        until(patch, 20, kill)
        COMMANDS["split"](tmp_path / "a", out)
    half = files(out)
    for other in (
        lambda: edit.split(str(tmp_path / "a"), out, ways.by_number(3)),
        lambda: edit.split(str(tmp_path / "a"), out, ways.by_number(2, seed=1)),
        lambda: edit.split(str(tmp_path / "a"), out, ways.by_caption(["clip0"])),
        lambda: edit.split(str(tmp_path / "b"), out, ways.by_number(2)),
        lambda: COMMANDS["merge"](tmp_path / "a", out),
        lambda: COMMANDS["export"](tmp_path / "a", out),
    ):
        with pytest.raises(
            ShardError, match=r"half made by another command, 'shards split \S+/a --n 2'; run that again"
        ):
            other()
    manifest = open_set(tmp_path / "a").manifest
    save_manifest(tmp_path / "a", replace(manifest, chunks=manifest.chunks[::-1]))
    with pytest.raises(ShardError, match="sets that have changed since"):
        COMMANDS["split"](tmp_path / "a", out)
    assert files(out) == half
    save_manifest(tmp_path / "a", manifest)
    COMMANDS["split"](tmp_path / "a", out)
    assert list(verify(out / "01")) == [] and not (out / ".making.json").exists()
    with pytest.raises(ShardError, match="holds something already"):
        COMMANDS["split"](tmp_path / "a", out)


def test_a_directory_of_others_and_a_file_are_refused_before_anything_is_read(tmp_path, sources):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/.making.json").write_text("[]")
    for name in ("full", "file", "odd"):
        for command in COMMANDS.values():
            with pytest.raises(ShardError, match=f"output: {tmp_path / name} holds something already"):
                command(sources, tmp_path / name)
    assert {n: len(files(tmp_path / n)) for n in ("full", "odd")} == {"full": 1, "odd": 1}
