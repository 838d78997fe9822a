"""Files appear whole, through no link, and what a kill left is cleared by who
comes next, and nothing else is."""

import os
import subprocess
import sys

import pytest

from shards import atomic
from shards.atomic import atomic_path, clear_leftovers, no_links, write_text


def dead_pid():
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    return gone.pid


def test_only_the_leftovers_of_dead_processes_of_this_host_are_cleared(tmp_path):
    host, dead, alive = atomic._host(), dead_pid(), os.getpid()
    ours = [f".out.safetensors.{host}-{dead}-0123abcd.tmp", f".é ü.{host}-{dead}-ffffffff.tmp"]
    kept = [
        f".out.safetensors.{host}-{alive}-0123abcd.tmp",  # of somebody who is still writing
        f".out.safetensors.{'0' * 8}-{dead}-0123abcd.tmp",  # of another machine
        f".out.safetensors.{dead}.tmp", f"out.{host}-{dead}-0123abcd.tmp",
        f".out.{host}-{dead}-0123abcd.tmp.safetensors", f".out.{host}-{dead}-0123abcg.tmp",
        f".out.{host}-0{dead}-0123abcd.tmp", ".hidden.tmp", "out.safetensors",
        f".out.{host}-9999999999-0123abcd.tmp",  # beyond any PID
    ]
    for name in ours + kept:
        (tmp_path / name).write_text("x")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ours[0]).write_text("x")
    (tmp_path / f".folder.{host}-{dead}-0123abcd.tmp").mkdir()
    assert sorted(p.name for p in clear_leftovers(tmp_path)) == sorted(ours)
    assert {p.name for p in tmp_path.iterdir()} == {*kept, "below", f".folder.{host}-{dead}-0123abcd.tmp"}
    assert (tmp_path / "below" / ours[0]).exists() and clear_leftovers(tmp_path) == []


def test_a_kill_in_the_middle_leaves_only_what_is_cleared(tmp_path):
    """A real process, killed by -9 while it writes over a file that was there."""
    (tmp_path / "file").write_text("old")
    killed = "import os; from atomic import atomic_path as a\n" \
        "with a('file') as t: t.write_text('half'); os.kill(os.getpid(), 9)"
    here = os.path.dirname(atomic.__file__)  # not as `shards.atomic`: that would load torch
    done = subprocess.run(
        [sys.executable, "-c", killed], cwd=tmp_path, env={**os.environ, "PYTHONPATH": here}
    )
    assert done.returncode == -9 and (tmp_path / "file").read_text() == "old"
    (left,) = [p for p in tmp_path.iterdir() if p.name != "file"]
    assert left.read_text() == "half" and clear_leftovers(tmp_path) == [left]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_is_flushed_renamed_and_its_folder_flushed_in_that_order(tmp_path, monkeypatch):
    events = []

    def record(name, real):
        def call(*given):
            at = given[0] if name == "replace" else os.readlink(f"/proc/self/fd/{given[0]}")
            events.append((name, "folder" if str(at) == str(tmp_path) else "temporary"))
            return real(*given)

        monkeypatch.setattr(os, name, call)

    record("fsync", os.fsync)
    record("replace", os.replace)
    write_text(tmp_path / "file", "é\n")
    assert events == [("fsync", "temporary"), ("replace", "temporary"), ("fsync", "folder")]
    assert (tmp_path / "file").read_bytes() == b"\xc3\xa9\n" and len(list(tmp_path.iterdir())) == 1


def test_an_error_keeps_what_was_there_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "nowhere/file"):
        raise AssertionError("never reached")


def test_temporaries_never_go_through_links(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(os, "urandom", bytes)  # an attacker who foresees even the random part
    planted = tmp_path / f".file.{atomic._host()}-{os.getpid()}-00000000.tmp"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "new")
    assert victim.read_text() == "mine" and not (tmp_path / "file").exists()
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), open(tmp_path / "link", "wb", opener=no_links):
        raise AssertionError("never reached")
    assert victim.read_text() == "mine"
    with open(tmp_path / "plain", "wb", opener=no_links) as file:
        file.write(b"x")
    assert (tmp_path / "plain").read_bytes() == b"x"


def test_long_names_fit(tmp_path):
    name = "ä" * 127  # 254 bytes of 255
    write_text(tmp_path / name, "x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_have_the_mode_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
