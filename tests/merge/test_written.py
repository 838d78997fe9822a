"""The files that a merge writes, on a few numbers: their names and shards, reading, continuing."""

import hashlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.merge import write
from hvtrain.merge.write import Addition, signature, write_model
from hvtrain.weights import stream
from hvtrain.weights.containers import open_weights
from tests.merge.few import pair, target


def test_one_file(three, tmp_path):
    out = tmp_path / "new" / "o.safetensors"
    assert write_model(three, {}, target(out), metadata={}) == [out]
    assert [p.name for p in out.parent.iterdir()] == ["o.safetensors"]


def test_cut_into_shards(three, tmp_path):
    """a has 8 bytes, b 12, c 16; at most 20 in a file."""
    files = write_model(three, {}, target(tmp_path / "out", max_shard_bytes=20), metadata={"k": "v"})
    assert [p.name for p in files] == [
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    assert [sorted(load_file(p)) for p in files] == [["c"], ["a", "b"]]
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 36} and sorted(index["weight_map"]) == ["a", "b", "c"]
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"k": "v"}
    exact = write_model(three, {}, target(tmp_path / "exact", max_shard_bytes=36), metadata={})
    assert (
        len(exact) == 1 and (tmp_path / "exact" / "diffusion_pytorch_model.safetensors.index.json").exists()
    )
    third = write_model(three, {}, target(tmp_path / "third", max_shard_bytes=35), metadata={})
    assert [sorted(load_file(p)) for p in third] == [["b", "c"], ["a"]]  # one byte too few for all three
    tiny = write_model(three, {}, target(tmp_path / "tiny", max_shard_bytes=1), metadata={})
    assert len(tiny) == 3
    with pytest.raises(ConfigError) as refused:
        write_model(three, {}, target(tmp_path / "o.safetensors", max_shard_bytes=20), metadata={})
    assert str(refused.value) == (
        f"output: {tmp_path / 'o.safetensors'} must be a directory, because max_shard_gb cuts the model into "
        "several files"
    )
    with pytest.raises(ConfigError) as refused:
        write_model(three, {}, target(tmp_path / "folder"), metadata={})
    assert str(refused.value) == (
        f"output: {tmp_path / 'folder'} must end in .safetensors: {three.path} is a single file "
        "(max_shard_gb cuts it)"
    )
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("index", [None, "m.safetensors.index.json", "other.index.json"])
def test_shards_keep_their_names(tmp_path, index):
    source = tmp_path / "in"
    source.mkdir()
    names = ["m-00001-of-00002", "m-00002-of-00002"]
    for i, name in enumerate(names):
        save_file({f"t{i}": torch.full((2,), float(i))}, source / f"{name}.safetensors")
    if index:
        table = {f"t{i}": f"{name}.safetensors" for i, name in enumerate(names)}
        (source / index).write_text(json.dumps({"weight_map": table}))
    places = [source, source / index] if index else [source]
    for number, place in enumerate(places):
        out = tmp_path / f"out{number}"
        files = write_model(open_weights(place), {}, target(out), metadata={})
        assert [f.name for f in files] == [f"{name}.safetensors" for name in names]
        text = (out / (index or "diffusion_pytorch_model.safetensors.index.json")).read_text()
        written = json.loads(text)
        assert text.startswith('{\n  "metadata": {\n    "total_size": 16')  # to be read by people
        table = {f"t{i}": f"{name}.safetensors" for i, name in enumerate(names)}
        assert written == {"metadata": {"total_size": 16}, "weight_map": table}
    (one,) = write_model(open_weights(source), {}, target(tmp_path / "one.safetensors"), metadata={})
    assert sorted(load_file(one)) == ["t0", "t1"]


def test_a_pt_file_is_converted(tmp_path):
    torch.save({"w": torch.tensor([[1.0, 2.0]]), "v": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "m.pt")
    weights = open_weights(tmp_path / "m.pt")
    part = Addition(((pair([1], [1, 1]), 1.0),))
    (path,) = write_model(weights, {"w": part}, target(tmp_path / "o.safetensors"), metadata={})
    got = load_file(path)
    assert got["w"].tolist() == [[2, 3]] and got["v"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert weights.get("w").tolist() == [[1, 2]]


def test_a_tensor_is_summed_on_the_device_and_rows_that_none_changes_keep_their_values(tmp_path):
    """2^-40 beside 1 needs float64, which no sum has."""
    torch.save({"w": torch.full((2, 1), 1 + 2**-40, dtype=torch.float64)}, tmp_path / "m.pt")
    weights, part, written = open_weights(tmp_path / "m.pt"), Addition(((pair([0, 1], [1]), 1.0),)), []
    writer = SimpleNamespace(write=lambda name, tensor: written.append((name, tensor)))
    for device in ("cpu", "meta"):
        write._write_converted(weights, part, "w", torch.float64, writer, device)
    (name, tensor), (_, away) = written
    assert name == "w" and tensor.tolist() == [[1 + 2**-40], [2.0]] and away.device.type == "meta"


def test_signature_is_of_the_inputs(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("12345")
    b.write_text("12345")
    os.utime(a, ns=(1, 1_000_000_007))
    one = signature([a], "said")
    assert one == signature([a], "said") == hashlib.sha256(f"said{a}/5/1000000007\n".encode()).hexdigest()
    assert (
        one != signature([a], "other") and one != signature([b], "said")
        and signature([a, b], "") != signature([b, a], "")
    )
    os.utime(a, ns=(1, 1_000_000_008))
    assert signature([a], "said") != one
    a.write_text("123456")
    os.utime(a, ns=(1, 1_000_000_007))
    assert signature([a], "said") != one
    os.symlink(b, tmp_path / "link")
    assert signature([tmp_path / "link"], "x") == signature([b], "x")


def test_a_merge_is_continued_only_with_the_same_inputs(three, tmp_path, monkeypatch):
    """Cut off after the first tensor: the same signature writes the other two, another one all three."""
    monkeypatch.setattr(stream, "_PROGRESS_BYTES", 1)
    monkeypatch.setattr(write, "_THREADS", 1)
    copy = stream.TensorWriter.copy
    for again, n in (("s", 2), ("another", 3)):
        written = []

        def stop(writer, name, *where, written=written):
            if written:
                raise KeyboardInterrupt
            written.append(name)
            copy(writer, name, *where)

        monkeypatch.setattr(stream.TensorWriter, "copy", stop)
        with pytest.raises(KeyboardInterrupt):
            write_model(three, {}, target(tmp_path / "o.safetensors"), metadata={})
        assert (tmp_path / ".o.safetensors.partial").exists()
        rest = []
        noted = lambda w, name, *where, rest=rest: rest.append(name) or copy(w, name, *where)  # noqa: E731
        monkeypatch.setattr(stream.TensorWriter, "copy", noted)
        write_model(three, {}, target(tmp_path / "o.safetensors", signature=again), metadata={})
        assert len(rest) == n and set(rest) >= set(three) - set(written)
        got = load_file(tmp_path / "o.safetensors")
        assert all(torch.equal(got[name], three.get(name)) for name in three)


def test_reading_goes_on_where_a_read_ends_early(tmp_path, monkeypatch):
    path = tmp_path / "f"
    values = torch.arange(10, dtype=torch.int32)
    path.write_bytes(b"head" + values.numpy().tobytes() + b"tail")
    entry = SimpleNamespace(shape=(2, 5), dtype=torch.int32, start=4)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
    with path.open("rb") as file:
        got = write._read_into(torch.zeros(100, dtype=torch.uint8), file.fileno(), entry)
    assert (
        got.dtype == torch.int32 and got.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        and math.prod(got.shape) == 10
    )


def test_a_file_that_was_cut_while_it_is_read_ends_the_merge(three, tmp_path):
    part = Addition(((pair([1, 1], [1, 1]), 1.0),))
    content = (tmp_path / "in.safetensors").read_bytes()
    for parts in ({"a": part}, {}):  # summed, copied
        os.truncate(tmp_path / "in.safetensors", len(content) - 1)  # the last value of a
        with pytest.raises(CheckpointError, match="ends too early; it was changed while it was read"):
            write_model(three, parts, target(tmp_path / "o.safetensors"), metadata={})
        assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
