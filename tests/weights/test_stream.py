import errno
import fcntl
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.weights import stream
from hvtrain.weights.stream import (
    data_sum,
    lay_out,
    open_resumable,
    open_writer,
    read_header,
    tensor_bytes,
)
from shards.tensors import Extent


def sample() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "z.norm": torch.randn(5, generator=draw),
        "a.weight": torch.randn(3, 4, generator=draw).bfloat16(),
        "b.fp8": torch.randn(3, 3, generator=draw).to(torch.float8_e4m3fn),
        "c.half": torch.randn(2, 2, generator=draw).half(),
        "d.alpha": torch.tensor(4.0),
        "e.empty": torch.zeros(0, 4),
        "f.index": torch.arange(3),
        "g.flag": torch.tensor([True, False]),
    }


def slots(tensors: dict[str, torch.Tensor]) -> list[Extent]:
    return [Extent(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def test_the_library_reads_what_was_streamed(tmp_path):
    tensors, path = sample(), tmp_path / "x.safetensors"
    with open_writer(path, slots(tensors), metadata={"who": "é \"quoted\""}) as writer:
        for name in reversed(list(tensors)):  # any order
            writer.write(name, tensors[name])
        assert not path.exists()
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
    assert loaded["d.alpha"].item() == 4.0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"who": "é \"quoted\""}


def test_a_file_equals_the_librarys_byte_for_byte(tmp_path):
    tensors = {k: v for k, v in sample().items() if v.dtype != torch.float8_e4m3fn}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_file(tensors, theirs, metadata={"one": "entry"})
    header = read_header(theirs)
    assert header.metadata == {"one": "entry"}
    data = memoryview(theirs.read_bytes())
    with open_writer(ours, header.extents.values(), metadata=header.metadata) as writer:
        for slot in header.extents.values():
            writer.write_bytes(slot.name, data[slot.start : slot.stop])
    assert read_header(ours).extents == header.extents
    assert ours.read_bytes() == theirs.read_bytes()


def test_slots_read_back(tmp_path):
    tensors, path = sample(), tmp_path / "x.safetensors"
    with open_writer(path, slots(tensors)) as writer:
        for name in writer.waiting:
            writer.write(name, tensors[name])
    data = path.read_bytes()
    for name, slot in read_header(path).extents.items():
        assert slot.start % slot.dtype.itemsize == 0 and slot.dtype == tensors[name].dtype
        assert data[slot.start : slot.stop] == bytes(tensor_bytes(tensors[name]))


def test_an_incomplete_file_never_appears(tmp_path):
    tensors, path = sample(), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="not written"), open_writer(path, slots(tensors)) as writer:
        writer.write("d.alpha", tensors["d.alpha"])
    with pytest.raises(ValueError, match="declared"), open_writer(path, slots(tensors)) as writer:
        writer.write("d.alpha", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(sample(), path)
    whole = path.read_bytes()
    for content, match in [
        (whole[:-1], "cut short"),
        (whole[:200], "not a safetensors file"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
        (b"", "not a safetensors file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_header(path)


def test_lay_out_aligns():
    head, placed = lay_out([Extent("b", torch.uint8, (3,)), Extent("a", torch.float32, (2,))])
    assert len(head) % 8 == 0 and [slot.name for slot in placed] == ["a", "b"]
    assert placed[1].stop == len(head) + 11


# --- where files go -----------------------------------------------------------------------------------------

EIGHT = [Extent(f"t{i}", torch.float32, (100,)) for i in range(8)]


def value(name, n=0):
    return torch.full((100,), float(name[1:]) + n)


def interrupted(path, monkeypatch, *, signature="s", after=4, n=0):
    """A run that ends after some tensors, each of which is noted; not by an error."""
    monkeypatch.setattr(stream, "_PROGRESS_BYTES", 1)
    with pytest.raises(KeyboardInterrupt), open_resumable(path, EIGHT, signature=signature) as writer:
        for name in writer.waiting[:after]:
            writer.write(name, value(name, n))
        raise KeyboardInterrupt
    assert not path.exists()


def finish(path, *, signature="s", n=0):
    """What was left to write."""
    with open_resumable(path, EIGHT, signature=signature) as writer:
        waiting = writer.waiting
        for name in waiting:
            writer.write(name, value(name, n))
    return waiting


def test_a_file_is_continued_by_the_same_run_only(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    interrupted(path, monkeypatch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".x.safetensors.partial", ".x.safetensors.partial.json"
    ]
    assert finish(path) == ["t4", "t5", "t6", "t7"]
    assert all(t.eq(int(n[1:])).all() for n, t in load_file(path).items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    path.unlink()
    interrupted(path, monkeypatch)
    assert len(finish(path, signature="other", n=50)) == 8
    assert all(t.eq(int(n[1:]) + 50).all() for n, t in load_file(path).items())


def test_notes_never_speak_of_another_runs_bytes(tmp_path, monkeypatch):
    """One run is cut off, another one begins in its place and is cut off before its first
    note, then the first again."""
    path = tmp_path / "x.safetensors"
    interrupted(path, monkeypatch)
    monkeypatch.setattr(stream, "_PROGRESS_BYTES", 1 << 30)
    with pytest.raises(KeyboardInterrupt), open_resumable(path, EIGHT, signature="other") as writer:
        writer.write("t0", value("t0", 50))
        raise KeyboardInterrupt
    assert len(finish(path)) == 8
    interrupted(tmp_path / "y", monkeypatch)
    (tmp_path / ".y.partial").unlink()
    assert len(finish(tmp_path / "y")) == 8  # notes without their file
    (tmp_path / "y").unlink()
    interrupted(tmp_path / "y", monkeypatch)
    (tmp_path / ".y.partial.json").write_text("[]")
    assert len(finish(tmp_path / "y")) == 8


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder; and fsync before every note."""
    seen = []

    def recorded(function, what):
        def call(*arguments):
            seen.append(what(*arguments))
            return function(*arguments)

        return call

    of_handle = lambda fd: ("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))  # noqa: E731
    monkeypatch.setattr(os, "fsync", recorded(os.fsync, of_handle))
    monkeypatch.setattr(
        os, "replace", recorded(os.replace, lambda old, new: ("rename", os.path.basename(new)))
    )
    folder = tmp_path / "out"
    finish(folder / "x")
    assert seen == [("sync", ".x.partial"), ("rename", "x"), ("sync", "out")]
    seen.clear()
    monkeypatch.setattr(stream, "_PROGRESS_BYTES", 3200)
    finish(folder / "x")
    assert seen[0] == ("sync", ".x.partial") and ("rename", ".x.partial.json") in seen
    assert seen[-3:] == [("sync", ".x.partial"), ("rename", "x"), ("sync", "out")]


def test_nothing_is_written_through_links(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "x"
    for lay in (os.symlink, os.link):
        victim.write_text("mine")
        lay(victim, tmp_path / ".x.partial")
        (tmp_path / ".x.partial.json").write_text(json.dumps({"signature": "?", "done": []}))
        assert len(finish(path)) == 8
        assert victim.read_text() == "mine" and len(load_file(path)) == 8 and not path.is_symlink()


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "x"
    with open(tmp_path / ".x.partial", "wb") as other:
        other.write(b"theirs")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            finish(path)
        assert (tmp_path / ".x.partial").read_bytes() == b"theirs"
    assert len(finish(path)) == 8


def failing(code):
    def pwrite(*arguments):
        raise OSError(code, os.strerror(code))

    return pwrite


@pytest.mark.parametrize(
    "write", [open_writer, lambda p, s: open_resumable(p, s, signature="s")], ids=["plain", "resumable"]
)
def test_a_disk_that_takes_nothing_is_one_line(tmp_path, monkeypatch, write):
    path = tmp_path / "new" / "deep" / "x.safetensors"
    for code, match in [
        (
            errno.ENOSPC,
            r"x\.safetensors: no room for it \(No space left on device; [\d.]+ [kMG]B free\).*make room"
        ),
        (errno.EFBIG, "no room for it"),
        (errno.EROFS, r"x\.safetensors: cannot be written \(Read-only file system\); choose another place"),
    ]:
        with (
            monkeypatch.context() as patch, pytest.raises(ConfigError, match=match),
            write(path, EIGHT) as writer
        ):
            patch.setattr(os, "pwrite", failing(code))
            writer.write("t0", value("t0"))
        assert list(path.parent.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), write(tmp_path / "file" / "x", EIGHT):
        pass
    # not about the place: a bug or a broken disk
    with pytest.raises(OSError, match="Input/output"), write(path, EIGHT):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_leftovers_of_killed_writers_go(tmp_path):
    path = tmp_path / "x"
    pid = os.fork()
    if pid == 0:  # killed in the middle of a file
        with open_writer(path, EIGHT):
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    finish(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_sum_is_of_the_tensors_and_not_of_the_metadata(tmp_path):
    tensors = sample()
    save_file(tensors, tmp_path / "a", metadata={"title": "one"})
    save_file(tensors, tmp_path / "b", metadata={"title": "another, longer"})
    assert data_sum(tmp_path / "a") == data_sum(tmp_path / "b")
    tensors["z.norm"][0] += 1
    save_file(tensors, tmp_path / "b")
    assert data_sum(tmp_path / "a") != data_sum(tmp_path / "b")


def test_metadata_that_are_no_texts_are_refused(tmp_path):
    table = json.dumps({"__metadata__": {"n": 1}}).encode()
    (tmp_path / "x").write_bytes(len(table).to_bytes(8, "little") + table)
    with pytest.raises(CheckpointError, match="metadata are not a table of texts"):
        read_header(tmp_path / "x")
