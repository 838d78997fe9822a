"""Kernels on the device at hand: errors are seen, the fastest right one is taken, and the choice is kept."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hvtrain.models import kernels, measure
from hvtrain.models.kernels import KERNELS, Partial
from hvtrain.models.measure import LONG, Errors, Size, Workload, class_of, errors, fastest, wrongs

CPU, FP32 = torch.device("cpu"), torch.float32
SDPA = KERNELS["sdpa"]
LITTLE, SHORT = Size(256, 256), Workload(256, 2, 16, learns=True)


def spoiled(**parts):
    return replace(SDPA, name="spoiled", **parts)


def nan_at(residue: int):
    """As a cuDNN did: gradients of some lengths are no numbers where the log-sum-exp is far below zero."""

    def backward(dout, q, k, v, merged):
        grads = SDPA.backward(dout, q, k, v, merged)
        bad = q.shape[1] % 128 == residue and float(merged.lse.min()) < -88.7
        return grads._replace(q=grads.q * float("nan")) if bad else grads

    return spoiled(backward=backward)


def test_the_own_kernel_is_right_at_every_length():
    assert list(wrongs(SDPA, CPU, FP32)) == []
    found = errors(SDPA, Size(130, 70, batch=2), CPU, FP32, low=True)
    assert 0 < found.worst < 1e-3
    q, k, v, _ = measure.drawn(LITTLE, CPU, FP32, low=True)
    assert SDPA.partial(q, k, v).lse.max() < -88.7  # low scores are


@pytest.mark.parametrize(
    "kernel, where",
    [
        (nan_at(64), ["320 x 320, low scores", "64 x 448, low scores"]),
        (nan_at(0), ["256 x 256, low scores"]),
        (
            spoiled(
                partial=lambda q, k, v: Partial(SDPA.partial(q, k, v).out, SDPA.partial(q, k, v).lse + 0.5)
            ), None
        ),
        (spoiled(backward=lambda *a: SDPA.backward(*a)._replace(v=SDPA.backward(*a).v * 1.01)), None),
    ],
    ids=["nan at 64", "nan at 0", "log-sum-exp", "dv"],
)
def test_what_is_wrong_is_found(kernel, where):
    found = dict(wrongs(kernel, CPU, FP32))
    if where is None:
        assert len(found) == 16 and all(1e-4 < e.worst < 1 for e in found.values())
    else:
        assert sorted(found) == where and all(e.worst != e.worst for e in found.values())


def test_the_worst_of_nan_is_nan():
    nan = float("nan")
    assert Errors(1.0, 0.0, nan, 2.0, 3.0).worst != Errors(1.0, 0.0, nan, 2.0, 3.0).worst
    assert Errors(1.0, 0.0, 0.5, 2.0, 3.0).worst == 3.0


def clock(monkeypatch, **times: float):
    """Kernels that take so long, by no real clock."""
    monkeypatch.setattr(measure, "seconds", lambda kernel, *asked: times[kernel.name])
    return [replace(SDPA, name=name) for name in times]


def test_the_fastest_right_one_is_taken_and_kept(tmp_path, caplog, monkeypatch):
    kept = tmp_path / "cache/kernels.json"
    (late, quick), wrong = clock(monkeypatch, late=2.0, quick=1.0), replace(nan_at(1), name="wrong")
    with caplog.at_level(logging.INFO):
        assert fastest([wrong, late, quick], CPU, FP32, work=SHORT, kept=kept).name == "quick"
    assert (
        "wrong is wrong on this device at 257 x 257, low scores: error nan" in caplog.text
        and "quick" in caplog.text
    )
    monkeypatch.setattr(measure, "seconds", lambda *a: 1 / 0)  # not measured again
    assert fastest([wrong, late, quick], CPU, FP32, work=SHORT, kept=kept).name == "quick"
    (key,) = json.loads(kept.read_text())
    assert all(part in key for part in ("CPU", torch.__version__, "float32", "wrong | late | quick"))
    with pytest.raises(ZeroDivisionError):  # other kernels, another question
        fastest([late, quick], CPU, FP32, work=SHORT, kept=kept)
    for text in ("{", "[1]", json.dumps({key: ["quick"]})):  # broken, or somebody else's
        kept.write_text(text)
        with pytest.raises(ZeroDivisionError):
            fastest([wrong, late, quick], CPU, FP32, work=SHORT, kept=kept)


def test_each_class_of_shapes_has_its_own_answer(tmp_path, monkeypatch):
    """Measured once at what stands for the class, in its head's width; forward
    alone where nothing is learnt."""
    asked, checked, calls = [], [], []

    def attend(q, k, v):
        calls.append("attend")
        return SDPA.attend(q, k, v)

    def backward(*args):
        calls.append("backward")
        return SDPA.backward(*args)

    quick = {"short": {1024}, "long": {4096, 65536}}

    def seconds(kernel, work, device, dtype):
        asked.append((kernel.name, work))
        return 1.0 if work.tokens in quick[kernel.name] else 2.0

    def wrongs_of(kernel, device, dtype, *, dim):
        checked.append((kernel.name, dim))
        return iter(())

    monkeypatch.setattr(measure, "seconds", seconds)
    monkeypatch.setattr(measure, "wrongs", wrongs_of)
    pair = [replace(SDPA, name=name) for name in quick]

    def pick(tokens, heads=24, dim=128, learns=True):
        return fastest(
            pair, CPU, FP32, work=Workload(tokens, heads, dim, learns), kept=tmp_path / "k.json"
        ).name

    assert pick(2048) == "short" and pick(2049) == "long" and pick(119_056) == "long"
    assert {work.tokens for _, work in asked} == {1024, 4096, 65536} and len(asked) == 6
    # kept
    assert pick(700) == "short" and pick(8000) == "long" and pick(40_000) == "long" and len(asked) == 6
    # other classes
    assert pick(700, dim=64) == "short" and pick(700, learns=False) == "short" and len(asked) == 10
    assert ("short", 64) in checked and ("long", 128) in checked
    assert [
        name for key, name in sorted(json.loads((tmp_path / "k.json").read_text()).items())
    ].count("long") == 2
    monkeypatch.undo()
    own = replace(SDPA, attend=attend, backward=backward)
    measure.seconds(own, SHORT._replace(learns=False), CPU, FP32)
    assert set(calls) == {"attend"}
    calls.clear()
    measure.seconds(own, SHORT, CPU, FP32)
    assert set(calls) == {"backward"}


def test_classes():
    assert class_of(LONG) == LONG
    assert class_of(Workload(119_056, 24, 128, learns=True)) == Workload(65536, 1, 128, learns=True)
    assert class_of(Workload(500, 3, 64, learns=False)) == Workload(1024, 3, 64, learns=False)
    assert class_of(Workload(18_616, 24, 128, learns=True)) == LONG


def test_who_has_kept_an_answer_first_is_followed(tmp_path, monkeypatch):
    """Of two processes that measure at a time."""
    kept, pair = tmp_path / "k.json", [replace(SDPA, name="a"), replace(SDPA, name="b")]
    monkeypatch.setattr(measure, "wrongs", lambda *a, **k: iter(()))

    def seconds(kernel, work, device, dtype):
        if kernel.name == "b":  # the other process is done meanwhile, and found a the fastest
            monkeypatch.setattr(measure, "seconds", lambda kernel, *a: {"a": 1.0, "b": 2.0}[kernel.name])
            assert fastest(pair, CPU, FP32, work=SHORT, kept=kept).name == "a"
        return {"a": 2.0, "b": 1.0}[kernel.name]

    monkeypatch.setattr(measure, "seconds", seconds)
    assert fastest(pair, CPU, FP32, work=SHORT, kept=kept).name == "a"
    assert list(json.loads(kept.read_text()).values()) == ["a"]


def test_where_none_is_right_pytorch_s_own_is_taken(tmp_path, monkeypatch):
    assert fastest(
        [replace(nan_at(0), name="a"), nan_at(1)], CPU, FP32, work=SHORT, kept=tmp_path / "no"
    ).name == "spoiled"
    (tmp_path / "file").touch()
    quick, late = clock(monkeypatch, quick=1.0, late=2.0)
    assert fastest([late, quick], CPU, FP32, work=SHORT, kept=tmp_path / "file/kernels.json") is quick


def test_the_clock_runs(monkeypatch):
    """The least of three, without the first, which may have to compile something."""
    ticks, done = iter([0, 9, 10, 12, 20, 21, 30, 35]), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    assert measure.timed(lambda: done.append(1), CPU) == 1 and len(done) == 4


# --- cuDNN's, which runs on no CPU: what PyTorch's operator is called with ----------------------------------


def test_what_cudnn_is_called_with(monkeypatch):
    """The operators' own schemas, with stand-ins behind: layouts of q, the log-sum-exp as [B N S 1]."""
    q, k, v, d_out = (
        x.to(torch.bfloat16) for x in measure.drawn(Size(3, 5, batch=2, heads=4, dim=16), CPU, FP32)
    )
    out, lse = torch.randn(2, 3, 4, 16).bfloat16(), torch.randn(2, 4, 3)
    calls = {}

    def forward(*args):
        calls["forward"] = args
        return out.transpose(1, 2), lse.unsqueeze(-1), *[None] * 7

    def backward(*args):
        calls["backward"] = args
        return tuple(x.transpose(1, 2) for x in (q * 2, k * 3, v * 4))

    real, base = torch.ops.aten, "_scaled_dot_product_cudnn_attention"
    fake = type("Aten", (), {base: staticmethod(forward), base + "_backward": staticmethod(backward)})
    monkeypatch.setattr(kernels, "aten", fake)
    found = KERNELS["cudnn"].partial(q, k, v)
    assert torch.equal(found.out, out) and torch.equal(found.lse, lse) and found.lse.shape == (2, 4, 3)
    assert [tuple(x.shape) for x in calls["forward"][:3]] == [(2, 4, 3, 16), (2, 4, 5, 16), (2, 4, 5, 16)]
    assert calls["forward"][3:] == (None, True)
    # of a ring: fp32, another layout
    merged = Partial(out.float(), lse.transpose(1, 2).contiguous().transpose(1, 2))
    grads = KERNELS["cudnn"].backward(d_out.transpose(1, 2).contiguous().transpose(1, 2), q, k, v, merged)
    assert [torch.equal(g, x * n) for n, g, x in zip((2, 3, 4), grads, (q, k, v))] == [True] * 3
    args = calls["backward"]
    assert args[0].stride() == args[4].stride() == q.transpose(1, 2).stride() and args[4].dtype == q.dtype
    assert (
        args[5].shape == (2, 4, 3, 1) and args[5].stride() == (12, 3, 1, 1)
        and torch.equal(args[5][..., 0], lse)
    )
    for name, given in (("", calls["forward"]), ("_backward", args)):
        schema = getattr(real, base + name).default._schema
        needed = [a for a in schema.arguments if not a.has_default_value()]
        assert len(needed) <= len(given) <= len([a for a in schema.arguments if not a.kwarg_only])
        for argument, value in zip(schema.arguments, given):
            kind = str(argument.type)
            if kind == "Tensor" and argument.name not in ("attn_bias", "cum_seq_q", "cum_seq_k"):
                assert isinstance(value, torch.Tensor), argument.name
            elif kind in ("int", "float", "bool"):
                assert type(value).__name__ == kind, argument.name


def test_cudnn_s_shapes_on_a_pretended_card():
    """Through PyTorch's own operators, without values: arguments are accepted, and what
    comes out is laid out as said."""
    with FakeTensorMode():
        q, k, v, d_out = (
            torch.empty(2, n, 4, 128, dtype=torch.bfloat16, device="cuda") for n in (3, 5, 5, 3)
        )
        found = KERNELS["cudnn"].partial(q, k, v)
        assert (
            found.out.shape == q.shape and found.lse.shape == (2, 4, 3) and found.lse.dtype == torch.float32
        )
        grads = KERNELS["cudnn"].backward(d_out, q, k, v, found)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and grads.q.device.type == "cuda"


def test_cudnn_is_for_new_cards_and_new_cudnns(monkeypatch):
    gpu, missing = torch.device("cuda", 0), KERNELS["cudnn"].missing
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing(CPU, torch.bfloat16) == "it needs a CUDA device, this is cpu"
    assert missing(gpu, FP32) == "it computes in bfloat16 or float16, not float32"
    assert missing(gpu, torch.bfloat16) == "it needs cuDNN 9.15.1 or newer, this is 91500"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(kernels, "_trial", lambda *asked: None)
    assert missing(gpu, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert missing(gpu, torch.bfloat16) == "it needs compute capability 9.0 or newer, this is 8.9"
