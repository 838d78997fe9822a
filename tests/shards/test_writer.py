"""What the writer puts on the disk, byte by byte, and in which order."""

import errno
import json
import os
import tarfile
from types import SimpleNamespace

import pytest
import torch
import xxhash

from shards import ShardError, writer
from shards.schema import TarFile
from shards.tar import open_local
from shards.writer import TarWriter, full, remove_tar, write_tar


def block(name, size):
    """A ustar header: no owner, no time."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def test_a_tar_is_these_bytes(tmp_path):
    header = b'{"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   '  # safetensors pads to 8
    data = len(header).to_bytes(8, "little") + header + b"\1\2\3"
    entry = write_tar(
        tmp_path, "latents/a.tar",
        [("k", {"x": torch.tensor([1, 2, 3], dtype=torch.uint8)}, {"caption": "é"})]
    )
    row = json.dumps({"caption": "é", "xxh3": xxhash.xxh3_64_hexdigest(data)}, ensure_ascii=False).encode()
    before, after = (
        block("k.safetensors", len(data)), bytes(512 - len(data)) + block("k.json", len(row)) + row
    )
    # whole records of 20 blocks, two empty ones at least
    content = (before + data + after).ljust(10240, b"\0")
    assert (tmp_path / "latents/a.tar").read_bytes() == content
    skeleton = xxhash.xxh3_64_hexdigest(before + content[512 + len(data) :])
    assert entry == TarFile("latents/a.tar", 10240, xxhash.xxh3_128_hexdigest(content), skeleton)
    assert json.loads((tmp_path / "latents/a.idx").read_text()) == {"members": [
        ["k.safetensors", 512, len(data), xxhash.xxh3_64_hexdigest(data)],
        ["k.json", 1536, len(row), xxhash.xxh3_64_hexdigest(row)],
    ]}
    assert sorted(p.name for p in (tmp_path / "latents").iterdir()) == ["a.idx", "a.tar"]


@pytest.mark.parametrize(
    ("n_bytes", "records"), [(10240 - 512 - 1024, 1), (10240 - 512 - 1024 + 1, 2), (0, 1)]
)
def test_a_tar_ends_with_two_empty_blocks_and_a_whole_record(tmp_path, n_bytes, records):
    with TarWriter(tmp_path, "latents") as out:
        out._member("a.json", bytes(n_bytes), tensors=False)
        assert out.finish("latents/a.tar").n_bytes == out.at == (
            tmp_path / "latents/a.tar"
        ).stat().st_size == records * 10240
    with tarfile.open(tmp_path / "latents/a.tar") as tar:
        assert tar.getnames() == ["a.json"]


def test_keys_of_any_legal_length_are_written_and_read_by_tar(tmp_path):
    keys = ["a" * n for n in (1, 88, 89, 200)]  # KEY.safetensors: ustar's header holds 100 letters
    write_tar(tmp_path, "latents/a.tar", [(key, {"x": torch.ones(1)}, {}) for key in keys])
    assert open_local(tmp_path / "latents/a.tar", None).keys() == keys
    with tarfile.open(tmp_path / "latents/a.tar") as tar:
        assert tar.getnames() == [f"{key}.{kind}" for key in keys for kind in ("safetensors", "json")]
        headers = [
            tar.fileobj.seek(member.offset) and tar.fileobj.read(512) for member in tar.getmembers()[2:4]
        ]
    # the longest that the plain header holds: no extension of GNU's
    assert headers[0][257:265] == b"ustar\x0000"


@pytest.mark.parametrize("bad", ["", "../a", "a/b", "a.b", "a" * 201, "é", "a\n"])
def test_other_keys_are_refused(tmp_path, bad):
    with TarWriter(tmp_path, "latents") as out, pytest.raises(ShardError, match="sample key"):
        out.add(bad, {"x": torch.ones(1)}, {})
    assert out.members == [] and list((tmp_path / "latents").iterdir()) == []


def test_the_tar_is_flushed_then_indexed_then_named(tmp_path, monkeypatch):
    events = []

    def record(name, real):
        def call(*given):
            at = given[1] if name == "replace" else os.readlink(f"/proc/self/fd/{given[0]}")
            kind = str(at).rsplit("/", 1)[1]
            known = {"latents": "folder", ".tar": "temporary tar", ".a.idx": "temporary index"}
            events.append((name, known.get(kind.rsplit(".", 2)[0], kind)))
            return real(*given)

        monkeypatch.setattr(os, name, call)

    record("fsync", os.fsync)
    record("replace", os.replace)
    write_tar(tmp_path, "latents/a.tar", [("k", {"x": torch.ones(1)}, {})])
    assert events == [
        ("fsync", "temporary tar"), ("fsync", "temporary index"), ("replace", "a.idx"), ("fsync", "folder"),
        ("replace", "a.tar"), ("fsync", "folder"),
    ]


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TarWriter(tmp_path, "latents") as out:
        out.add("k", {"x": torch.ones(1)}, {})
        assert len(list((tmp_path / "latents").iterdir())) == 1
        raise KeyboardInterrupt
    assert list((tmp_path / "latents").iterdir()) == [] and out.file.closed
    with TarWriter(tmp_path, "latents") as out:  # left without `finish`
        out.add("k", {"x": torch.ones(1)}, {})
    assert list((tmp_path / "latents").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "open", "mkdir"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, call):
    def no_room(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_room)
        with pytest.raises(
            ShardError, match=r"latents.*: the disk is full \(\d+ MiB left\).*run the same command again"
        ):
            write_tar(tmp_path, "latents/a.tar", [("k", {"x": torch.ones(1)}, {})])
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_disk_that_fills_while_it_writes(tmp_path, monkeypatch):
    """Said by the very write that found no room: nothing waits in a buffer for a later one."""
    def nowhere(path):
        path.touch()
        return path, os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(writer, "create_temporary", nowhere)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=7 * 2**20 + 1))
    with TarWriter(tmp_path, "latents") as out, pytest.raises(ShardError) as caught:
        out.add("k", {"x": torch.ones(1)}, {})
    assert str(caught.value) == (
        f"{tmp_path}/latents: the disk is full (7 MiB left); nothing half-written was kept: make room and "
        "run the same command again, it continues"
    )
    assert list((tmp_path / "latents").iterdir()) == []


@pytest.mark.parametrize("finish", [True, False])
def test_a_disk_that_says_so_only_when_the_file_is_closed(tmp_path, finish):
    """NFS does, of a quota."""
    class Late:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data)

        def close(self):
            if not self.file.closed:
                self.file.close()
                raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with (
        pytest.raises(ShardError if finish else KeyboardInterrupt) as caught,
        TarWriter(tmp_path, "latents") as out
    ):
        out.file = Late(out.file)
        out.add("k", {"x": torch.ones(1)}, {})
        if not finish:
            raise KeyboardInterrupt
        out.finish("latents/a.tar")
    assert not finish or "latents/a.tar: the disk is full" in str(caught.value)
    assert list((tmp_path / "latents").iterdir()) == []


def test_short_writes_are_gone_on_with(tmp_path):
    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:100])

        def close(self):
            self.file.close()

    rows = [("k", {"x": torch.arange(300)}, {"caption": "c"})]
    whole = write_tar(tmp_path / "a", "latents/a.tar", rows)
    with TarWriter(tmp_path / "b", "latents") as out:
        out.file = Slow(out.file)
        for row in rows:
            out.add(*row)
        assert out.finish("latents/a.tar") == whole
    assert (tmp_path / "a/latents/a.tar").read_bytes() == (tmp_path / "b/latents/a.tar").read_bytes()


def test_what_a_failed_write_says(tmp_path):
    for code in (errno.ENOSPC, errno.EDQUOT):
        assert "the disk is full" in str(full(OSError(code, "x"), tmp_path / "no/such/folder"))
    line = str(full(OSError(errno.EROFS, "Read-only file system"), tmp_path))
    assert (
        line == f"{tmp_path}: cannot be written (Read-only file system); mend that and run the same command "
        "again"
    )


def test_a_tar_is_removed_with_its_index(tmp_path):
    write_tar(tmp_path, "latents/a.tar", [("k", {"x": torch.ones(1)}, {})])
    remove_tar(tmp_path / "latents/a.tar")
    remove_tar(tmp_path / "latents/a.tar")  # gone already
    assert list((tmp_path / "latents").iterdir()) == []
