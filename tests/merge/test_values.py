"""The sums of a merge on files of a few numbers: rounding, memory, threads, which tensors
change, and refusals in full."""

import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.overlap import Contribution
from hvtrain.merge import write
from hvtrain.merge.policies import Dense
from hvtrain.merge.write import Addition, plan_parts, plan_whole, refuse_scaled, write_model
from hvtrain.weights.keymap import Fused, KeyMap, Rule
from tests.adapters.models import SPEC
from tests.merge.few import model, pair, target

# --- sums and rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float16, torch.float32])
def test_a_sum_is_made_in_float32_and_rounded_once(tmp_path, own, wanted):
    """257 + 2^-9 shows where a value was rounded on its way: bfloat16 keeps 8 bits of it, float16 11."""
    weights = model(
        tmp_path / "in.safetensors", w=torch.tensor([[256.0], [1.0], [0.0]]).to(own),
        untouched=torch.tensor([1.0])
    )
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
    (path,) = write_model(
        three, {}, target(tmp_path / "o.safetensors", dtype=torch.float16), metadata={"k": "v"}
    )
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
    monkeypatch.setattr(
        write, "_write_converted", lambda *a: seen.append((a[2], a[5])) or real(*a[:5], "cpu")
    )
    parts = {"a": Addition(((pair([1, 1], [1, 1]), 1.0),))}
    write_model(three, parts, target(tmp_path / "o.safetensors", device="cuda"), metadata={})
    assert seen == [("a", "cuda")]  # what does not change stays on the disk
    assert load_file(tmp_path / "o.safetensors")["a"].tolist() == [[2, 3], [4, 5]]


def test_memory_is_one_tensor_of_scratch_for_each_thread(tmp_path, monkeypatch):
    """The scratch is as large as the largest tensor of the file, and each thread makes one."""
    tensors = {f"t{i}": torch.full((n, 2), float(i)) for i, n in enumerate((1, 8, 3, 8, 2, 5))}
    weights = model(tmp_path / "in.safetensors", **tensors)
    made, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: made.append((a, k, threading.get_ident())) or empty(*a, **k)
    )
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
        write._in_threads(
            lambda _: (threads.add(threading.get_ident()), threading.Event().wait(0.01)), range(8)
        )
        assert len(threads) == 2
        assert write._THREADS == 2
        torch.set_num_threads(1)
        write._in_threads(lambda name: None, ["a"])
        assert torch.get_num_threads() == 1
        torch.set_num_threads(5)
        with pytest.raises(KeyError, match="first"):
            write._in_threads(
                lambda name: (_ for _ in ()).throw(KeyError(name)), ["first", *map(str, range(50))]
            )
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


# --- which tensors change -----------------------------------------------------------------------------------


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
    # as the official file has it: whole
    (own,) = plan_parts(found(), {QKV: Dense(delta(0))}, {QKV: (6, 1)}).values()
    assert own.dense().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    swapped = "final_layer.adaLN_modulation.1"
    parts = plan_parts(found("diffusers"), {swapped: Dense(delta(0))}, {swapped: (6, 1)})
    assert parts["norm_out.linear.weight"].dense().flatten().tolist() == [3, 4, 5, 0, 1, 2]
    with pytest.raises(ZeroDivisionError):  # what was kept goes before the next is computed
        write._Last(lambda: 1 / 0)()
    assert write._Last.kept is None


FUSED = KeyMap([Rule(letter, ("qkv",), share=(i, 3)) for i, letter in enumerate("qkv")], passthrough=True)
FOUND = SimpleNamespace(
    spec=SimpleNamespace(name="x", key_maps={"fused": FUSED}), dialect="fused", prefix="p."
)


def test_layers_that_are_one_in_the_file_change_their_own_rows():
    """Pairs, with a DoRA's lengths, and dense changes, of one layer and of several."""
    one = pair([1, 2], [1.0])
    parts = plan_parts(
        FOUND, {"k": [Contribution("a", one, 2.0), Contribution("b", one, 1.0)]}, {"k": (2, 1)}
    )
    weight = torch.zeros(6, 1)
    parts["p.qkv.weight"].add_to(weight)
    assert list(parts) == ["p.qkv.weight"] and weight.flatten().tolist() == [0, 0, 3, 6, 0, 0]
    layers = {"q": Dense(lambda: torch.tensor([[1.0], [2.0]])), "k": [Contribution("a", one, 10.0)],
              "v": Dense(lambda: torch.tensor([[5.0], [6.0]]))}  # fmt: skip
    parts = plan_parts(FOUND, layers, dict.fromkeys(layers, (2, 1)))
    weight = torch.full((6, 1), 100.0)
    parts["p.qkv.weight"].add_to(weight)
    assert list(parts) == ["p.qkv.weight"] and weight.flatten().tolist() == [101, 102, 110, 120, 105, 106]
    long = replace(one, magnitude=torch.tensor([7.0, 8.0]))
    (name, part), = plan_parts(FOUND, {"v": [Contribution("a", long, 1.0)]}, {"v": (2, 1)}).items()
    weight = torch.ones(6, 1)
    part.add_to(weight)
    assert name == "p.qkv.weight" and weight.flatten().tolist() == [1, 1, 1, 1, 7, 8]


def test_what_is_added_to_whole_parameters():
    """Beside the pairs of the same tensor; one that the file cuts, turns round or
    fuses with others is refused."""
    sources = {"w": Fused(("a.w",)), "cut": Fused(("b", "c")), "turned": Fused(("d",), swap=True)}
    sources["q"] = Fused(("e",), share=(0, 3))
    found = SimpleNamespace(prefix="p.", path="f.safetensors", sources=sources)
    before = {"p.a.w": Addition(((pair([1, 1], [1, 0]), 2.0),)), "p.other": Addition()}
    parts = plan_whole(found, {"w": torch.tensor([[10.0, 20], [30, 40]])}, before)
    weight = torch.ones(2, 2)
    parts["p.a.w"].add_to(weight)
    assert list(parts) == ["p.a.w", "p.other"] and weight.tolist() == [[13, 21], [33, 41]]
    assert parts["p.other"] is before["p.other"] and before["p.a.w"].dense is None
    alone = plan_whole(found, {"w": torch.full((2, 2), 3.0)}, {})
    assert (
        list(alone) == ["p.a.w"] and alone["p.a.w"].pairs == ()
        and alone["p.a.w"].dense().tolist() == [[3, 3], [3, 3]]
    )
    both = plan_whole(
        found, {"w": torch.full((2, 2), 3.0)},
        {"p.a.w": Addition(dense=lambda: torch.tensor([[1.0, 2], [4, 8]]))}
    )
    assert both["p.a.w"].dense().tolist() == [[4, 5], [7, 11]]
    away = plan_whole(
        found, {"w": torch.ones(2, 2)}, {"p.a.w": Addition(dense=lambda: torch.ones(2, 2, device="meta"))}
    )
    assert away["p.a.w"].dense().is_meta  # summed where the layers' change was computed
    for name in ("cut", "turned", "q"):
        with pytest.raises(CheckpointError) as refused:
            plan_whole(found, {name: torch.ones(2, 2)}, {})
        assert str(
            refused.value
        ) == f"f.safetensors: '{name}' is cut otherwise in this file; merge into the official one"


def test_scaled_eight_bit_weights_are_refused_by_name(tmp_path):
    eight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    part = {"w": Addition()}
    scaled = model(tmp_path / "a.safetensors", w=eight, **{"w.scale_weight": torch.tensor(2.0)})
    with pytest.raises(CheckpointError) as refused:
        refuse_scaled(scaled, part)
    assert str(refused.value) == (
        f"{tmp_path / 'a.safetensors'}: 'w' is scaled 8-bit: merge into the bfloat16 file and quantise the "
        "result"
    )
    refuse_scaled(scaled, {})
    refuse_scaled(scaled, {"w.scale_weight": Addition()})
    marked = model(
        tmp_path / "b.safetensors", w=torch.ones(1).to(torch.float8_e5m2), scaled_fp8=torch.ones(1)
    )
    with pytest.raises(CheckpointError):
        refuse_scaled(marked, part)
    plain = model(tmp_path / "c.safetensors", w=eight)
    refuse_scaled(plain, part)
    (tmp_path / "c_map.pt").write_bytes(b"")
    with pytest.raises(CheckpointError):
        refuse_scaled(plain, part)
