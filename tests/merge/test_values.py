"""The writing half of a merge on files of a few numbers: homes, sums, rounding, continuing, and every refusal in full."""

import hashlib
import json
import math
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.overlap import Contribution
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge import write
from hvtrain.merge.policies import Dense
from hvtrain.merge.write import Addition, Target, plan_parts, refuse_scaled, signature, write_model
from hvtrain.weights import stream
from hvtrain.weights.containers import open_weights
from tests.adapters.models import SPEC


def target(output, **given):
    return Target(**{"output": output, "dtype": None, "max_shard_bytes": None, "device": "cpu", "signature": "s", **given})


def pair(column, row, alpha=1.0):
    return LoraPair(torch.tensor([row], dtype=torch.float32), torch.tensor(column, dtype=torch.float32)[:, None], alpha)


def model(path, metadata=None, **tensors):
    save_file(tensors, path, metadata=metadata)
    return open_weights(path)


@pytest.fixture
def three(tmp_path):
    """a [2, 2] bfloat16, b [3] float32, c [2] int64."""
    tensors = {"a": torch.tensor([[1.0, 2], [3, 4]]).bfloat16(), "b": torch.tensor([1.0, 2, 3]), "c": torch.tensor([5, 6])}
    return model(tmp_path / "in.safetensors", **tensors)


# --- sums and rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float16, torch.float32])
def test_a_sum_is_made_in_float32_and_rounded_once(tmp_path, own, wanted):
    """257 + 2^-9 shows where a value was rounded on its way: bfloat16 keeps 8 bits of it, float16 11."""
    weights = model(tmp_path / "in.safetensors", w=torch.tensor([[256.0], [1.0], [0.0]]).to(own), untouched=torch.tensor([1.0]))
    part = Addition(((pair([1, 2**-9, 1], [1.0]), 1.0), (pair([2**-9, 2**-9, 0], [1.0]), 1.0)))
    (path,) = write_model(weights, {"w": part}, target(tmp_path / "o.safetensors", dtype=wanted), metadata={})
    got = load_file(path)
    exact = torch.tensor([[257 + 2**-9], [1 + 2**-8], [1.0]])
    assert got["w"].dtype == (wanted or own) and torch.equal(got["w"], exact.to(wanted or own))
    assert got["untouched"].tolist() == [1.0] and got["untouched"].dtype == (wanted or torch.float32)


def test_dense_changes_and_pairs(tmp_path):
    weight = torch.tensor([[1.0, 2], [3, 4]])
    Addition(dense=lambda: torch.tensor([[10.0, 0], [0, 20]])).add_to(weight)
    assert weight.tolist() == [[11, 2], [3, 24]]
    Addition(((pair([1, 1], [1, 0]), 2.0),)).add_to(weight)
    assert weight.tolist() == [[13, 2], [5, 24]]
    Addition(dense=lambda: torch.ones(2, 2)).add_to(weight.to("meta"))  # it goes where the weight is
    short = torch.tensor([[256.0]]).bfloat16()
    Addition(dense=lambda: torch.tensor([[1.0 + 2**-9]])).add_to(short)  # to 258, not by way of 257 to 256
    assert short.item() == torch.tensor(257 + 2**-9).bfloat16().item()


def test_only_floats_take_another_dtype(three, tmp_path):
    (path,) = write_model(three, {}, target(tmp_path / "o.safetensors", dtype=torch.float16), metadata={"k": "v"})
    got = load_file(path)
    assert {n: t.dtype for n, t in got.items()} == {"a": torch.float16, "b": torch.float16, "c": torch.int64}
    assert got["c"].tolist() == [5, 6] and got["a"].tolist() == [[1, 2], [3, 4]]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"k": "v"}


def test_untouched_tensors_are_copied_byte_for_byte(three, tmp_path, monkeypatch):
    """Without reading them into tensors; also where the system cannot copy between files."""
    monkeypatch.setattr(write, "_read_into", None)
    monkeypatch.setattr(write, "_write_converted", None)
    write_model(three, {}, target(tmp_path / "o.safetensors"), metadata={})
    monkeypatch.setattr(os, "copy_file_range", lambda *a: (_ for _ in ()).throw(OSError()))
    write_model(three, {}, target(tmp_path / "p.safetensors"), metadata={})
    for name in "op":
        got = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(got[n], three.get(n)) and got[n].dtype == three.dtype(n) for n in three)


def test_the_input_is_never_written_to(three, tmp_path):
    before = (tmp_path / "in.safetensors").read_bytes()
    part = Addition(((pair([1, 1], [1, 1]), 1.0),))
    for dtype in (None, torch.float32):
        write_model(three, {"a": part}, target(tmp_path / "o.safetensors", dtype=dtype), metadata={})
        assert load_file(tmp_path / "o.safetensors")["a"].tolist() == [[2, 3], [4, 5]]
        assert three.get("a").tolist() == [[1, 2], [3, 4]]
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_another_device_takes_the_sums(three, tmp_path, monkeypatch):
    seen = []
    real = write._write_converted
    monkeypatch.setattr(write, "_write_converted", lambda *a: seen.append((a[2], a[5])) or real(*a[:5], "cpu"))
    parts = {"a": Addition(((pair([1, 1], [1, 1]), 1.0),))}
    write_model(three, parts, target(tmp_path / "o.safetensors", device="cuda"), metadata={})
    assert seen == [("a", "cuda")]  # what does not change stays on the disk
    assert load_file(tmp_path / "o.safetensors")["a"].tolist() == [[2, 3], [4, 5]]


def test_memory_is_one_tensor_of_scratch_for_each_thread(tmp_path, monkeypatch):
    """The scratch is as large as the largest tensor of the file, and each thread makes one."""
    tensors = {f"t{i}": torch.full((n, 2), float(i)) for i, n in enumerate((1, 8, 3, 8, 2, 5))}
    weights = model(tmp_path / "in.safetensors", **tensors)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append((a, k, threading.get_ident())) or empty(*a, **k))
    parts = {n: Addition(((pair([1] * len(t), [1, 1]), 1.0),)) for n, t in tensors.items()}
    write_model(weights, parts, target(tmp_path / "o.safetensors"), metadata={})
    scratch = [(a, thread) for a, k, thread in made if k.get("dtype") == torch.uint8]
    assert 1 <= len(scratch) <= 2 and all(a == (8 * 2 * 4,) for a, _ in scratch)
    assert len({thread for _, thread in scratch}) == len(scratch)
    got = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(got[n], t + 1) for n, t in tensors.items())


def test_threads_share_the_cores_and_the_first_error_ends_it():
    cores = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        seen = set()
        write._in_threads(lambda name: seen.add((name, torch.get_num_threads())), ["a", "b"])
        assert {name for name, _ in seen} == {"a", "b"} and torch.get_num_threads() == 6
        threads = set()
        write._in_threads(lambda _: (threads.add(threading.get_ident()), threading.Event().wait(0.01)), range(8))
        assert len(threads) == 2
        assert write._THREADS == 2
        torch.set_num_threads(1)
        write._in_threads(lambda name: None, ["a"])
        assert torch.get_num_threads() == 1
        torch.set_num_threads(5)
        with pytest.raises(KeyError, match="first"):
            write._in_threads(lambda name: (_ for _ in ()).throw(KeyError(name)), ["first", *map(str, range(50))])
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(cores)


def test_threads_use_their_share(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    write._in_threads(lambda name: None, [])
    assert asked == [4, 9]
    asked.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    write._in_threads(lambda name: None, [])
    assert asked == [1, 1]


def test_an_error_stops_what_has_not_begun():
    begun = []

    def work(name):
        begun.append(name)
        if name == "0":
            raise ValueError("stop")
        threading.Event().wait(0.02)

    with pytest.raises(ValueError, match="stop"):
        write._in_threads(work, [str(i) for i in range(200)])
    assert len(begun) < 100


# --- which tensors change -----------------------------------------------------------------------------------------------


def found(dialect="official", prefix=""):
    return SimpleNamespace(spec=SPEC, dialect=dialect, prefix=prefix)


QKV = "double_blocks.0.img_attn_qkv"


def test_parts_by_the_files_own_names():
    one, two = pair([1, 2, 3, 4, 5, 6], [1.0]), pair([6, 5, 4, 3, 2, 1], [1.0])
    layers = {QKV: [Contribution("a", one, 2.0), Contribution("b", two, 3.0)]}
    whole = plan_parts(found(prefix="model."), layers, {QKV: (6, 1)})
    assert list(whole) == [f"model.{QKV}.weight"]
    assert [m for _, m in whole[f"model.{QKV}.weight"].pairs] == [2.0, 3.0]
    cut = plan_parts(found("diffusers", "p."), layers, {QKV: (6, 1)})
    there = "p.transformer_blocks.0.attn"
    assert list(cut) == [f"{there}.to_q.weight", f"{there}.to_k.weight", f"{there}.to_v.weight"]
    wanted = {"q": [2 + 18, 4 + 15], "k": [6 + 12, 8 + 9], "v": [10 + 6, 12 + 3]}
    for letter, values in wanted.items():
        weight = torch.zeros(2, 1)
        cut[f"{there}.to_{letter}.weight"].add_to(weight)
        assert weight.flatten().tolist() == values
    stack = replace(pair([1, 2, 0, 0, 0, 0], [1.0]), parts=(1, 0, 0))
    only_q = plan_parts(found("diffusers"), {QKV: [Contribution("a", stack, 1.0)]}, {QKV: (6, 1)})
    assert list(only_q) == ["transformer_blocks.0.attn.to_q.weight"]


def test_a_dense_change_is_computed_once_for_its_pieces():
    computed = []

    def delta(n):
        return lambda: computed.append(n) or torch.arange(6.0)[:, None] + n

    layers = {QKV: Dense(delta(0)), "double_blocks.1.img_attn_qkv": Dense(delta(100))}
    parts = plan_parts(found("diffusers", "x."), layers, dict.fromkeys(layers, (6, 1)))
    assert len(parts) == 6 and all(part.pairs == () for part in parts.values())
    values = {name: part.dense().flatten().tolist() for name, part in parts.items()}
    assert values["x.transformer_blocks.0.attn.to_k.weight"] == [2, 3]
    assert values["x.transformer_blocks.1.attn.to_v.weight"] == [104, 105]
    assert computed == [0, 100]
    parts["x.transformer_blocks.0.attn.to_q.weight"].dense()  # it was dropped for the next
    assert computed == [0, 100, 0]
    swapped = "final_layer.adaLN_modulation.1"
    parts = plan_parts(found("diffusers"), {swapped: Dense(delta(0))}, {swapped: (6, 1)})
    assert parts["norm_out.linear.weight"].dense().flatten().tolist() == [3, 4, 5, 0, 1, 2]
    with pytest.raises(ZeroDivisionError):  # what was kept goes before the next is computed
        write._Last(lambda: 1 / 0)()
    assert write._Last.kept is None


def test_scaled_eight_bit_weights_are_refused_by_name(tmp_path):
    eight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    part = {"w": Addition()}
    scaled = model(tmp_path / "a.safetensors", w=eight, **{"w.scale_weight": torch.tensor(2.0)})
    with pytest.raises(CheckpointError) as refused:
        refuse_scaled(scaled, part)
    assert str(refused.value) == (
        f"{tmp_path / 'a.safetensors'}: 'w' is scaled 8-bit: merge into the bfloat16 file and quantise the result"
    )
    refuse_scaled(scaled, {})
    refuse_scaled(scaled, {"w.scale_weight": Addition()})
    marked = model(tmp_path / "b.safetensors", w=torch.ones(1).to(torch.float8_e5m2), scaled_fp8=torch.ones(1))
    with pytest.raises(CheckpointError):
        refuse_scaled(marked, part)
    plain = model(tmp_path / "c.safetensors", w=eight)
    refuse_scaled(plain, part)
    (tmp_path / "c_map.pt").write_bytes(b"")
    with pytest.raises(CheckpointError):
        refuse_scaled(plain, part)


# --- files --------------------------------------------------------------------------------------------------------------


def test_one_file(three, tmp_path):
    out = tmp_path / "new" / "o.safetensors"
    assert write_model(three, {}, target(out), metadata={}) == [out]
    assert [p.name for p in out.parent.iterdir()] == ["o.safetensors"]


def test_cut_into_shards(three, tmp_path):
    """a has 8 bytes, b 12, c 16; at most 20 in a file."""
    files = write_model(three, {}, target(tmp_path / "out", max_shard_bytes=20), metadata={"k": "v"})
    assert [p.name for p in files] == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [sorted(load_file(p)) for p in files] == [["c"], ["a", "b"]]
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 36} and sorted(index["weight_map"]) == ["a", "b", "c"]
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"k": "v"}
    exact = write_model(three, {}, target(tmp_path / "exact", max_shard_bytes=36), metadata={})
    assert len(exact) == 1 and (tmp_path / "exact" / "diffusion_pytorch_model.safetensors.index.json").exists()
    third = write_model(three, {}, target(tmp_path / "third", max_shard_bytes=35), metadata={})
    assert [sorted(load_file(p)) for p in third] == [["b", "c"], ["a"]]  # one byte too few for all three
    tiny = write_model(three, {}, target(tmp_path / "tiny", max_shard_bytes=1), metadata={})
    assert len(tiny) == 3
    with pytest.raises(ConfigError) as refused:
        write_model(three, {}, target(tmp_path / "o.safetensors", max_shard_bytes=20), metadata={})
    assert str(refused.value) == (
        f"output: {tmp_path / 'o.safetensors'} must be a directory, because max_shard_gb cuts the model into several files"
    )
    with pytest.raises(ConfigError) as refused:
        write_model(three, {}, target(tmp_path / "folder"), metadata={})
    assert str(refused.value) == (
        f"output: {tmp_path / 'folder'} must end in .safetensors: {three.path} is a single file (max_shard_gb cuts it)"
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


# --- continuing ---------------------------------------------------------------------------------------------------------


def test_signature_is_of_the_inputs(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("12345")
    b.write_text("12345")
    os.utime(a, ns=(1, 1_000_000_007))
    one = signature([a], "said")
    assert one == signature([a], "said") == hashlib.sha256(f"said{a}/5/1000000007\n".encode()).hexdigest()
    assert one != signature([a], "other") and one != signature([b], "said") and signature([a, b], "") != signature([b, a], "")
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
    assert got.dtype == torch.int32 and got.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and math.prod(got.shape) == 10


def test_a_file_that_was_cut_while_it_is_read_ends_the_merge(three, tmp_path):
    part = Addition(((pair([1, 1], [1, 1]), 1.0),))
    content = (tmp_path / "in.safetensors").read_bytes()
    for parts in ({"a": part}, {}):  # summed, copied
        os.truncate(tmp_path / "in.safetensors", len(content) - 1)  # the last value of a
        with pytest.raises(CheckpointError, match="ends too early; it was changed while it was read"):
            write_model(three, parts, target(tmp_path / "o.safetensors"), metadata={})
        assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
