"""Tokens rounded to float8: the formula's values, and the one kernel that torch.compile makes of it."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import torch._dynamo.utils
from torch._inductor import config as inductor
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.common import BackendFeature
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hvtrain.parallel.recompute import keeping_attention
from hvtrain.weights import float8_tokens
from hvtrain.weights.float8_tokens import fused, plain, quantize_tokens
from tests.weights.scaled import needs_compiler

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(float8_tokens, "_refused", {})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = float8_tokens._compiled
    made.cache_clear()
    yield
    made.cache_clear()
    torch._dynamo.reset()


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_each_token_has_its_own_factor():
    x = torch.tensor([[448.0, -224.0, 1.0], [0.0, 0.0, 0.0], [1.75, 0.109375, -0.21875], [4e30, 1e30, 0.0]])
    values, factors = plain(x)
    assert values.dtype == FLOAT8 and factors.dtype == torch.float32
    torch.testing.assert_close(factors, torch.tensor([[1.0], [1e-30], [1.75 / 448], [4e30 / 448]]))
    assert values.float().tolist() == [[448, -224, 1], [0, 0, 0], [448, 28, -56], [448, 112, 0]]
    # 17 lies between 16 and 18: to the even one; 0.001 is below half of the smallest number
    rounded = plain(torch.tensor([[448.0, 17.0, 19.0, 0.0009]]))[0].float()
    assert rounded.tolist() == [[448, 16, 20, 0]]
    values, factors = plain(torch.tensor([[2.0, 1.0]]).bfloat16(), torch.tensor([1.0, 4.0]))
    assert values.float().tolist() == [[224, 448]] and float(factors) == pytest.approx(4 / 448)


@pytest.mark.parametrize("size", [1e-3, 1e-9, 1e-20])
def test_gradients_are_small_and_keep_their_bits(size):
    x = (torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    values, factors = plain(x)
    assert (values.float() * factors - x.float()).norm() < 0.03 * x.float().norm()


def test_what_is_no_number_stays_one_s_own():
    values, factors = plain(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    assert values[0].float().isnan().all() and factors[0].isnan().all()
    assert values[1].float().tolist() == [224, 448]


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("hvtrain")]


def unlike(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of all sizes; the first is zero, the last as large as the dtype has them."""
    draw = torch.Generator().manual_seed(m)
    x = torch.randn(m, n, generator=draw) * torch.logspace(-6, 4, m)[:, None]
    x[0], x[-1] = 0, torch.finfo(dtype).max / 4 * torch.rand(n, generator=draw)
    return x.to(dtype)


@needs_compiler
@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16 by", "float16", "float32"])
def test_one_kernel_gives_the_formula_s_bits_for_any_number_of_tokens(kind):
    dtype, n = getattr(torch, kind.split()[0]), 48
    by = torch.linspace(0.01, 3, n) if "by" in kind else None
    for m in (2, 3, 17, 64, 257, 1001):
        x = unlike(m, n, dtype)
        (values, factors), want = fused(x, by), plain(x, by)
        assert torch.equal(values.view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(factors, want[1])
        turned = x.t().contiguous().t()  # a gradient may come in any layout
        assert torch.equal(fused(turned, by)[0].view(torch.uint8), values.view(torch.uint8))
    assert n_graphs() == 1 and not float8_tokens._refused


@pytest.mark.parametrize("by", [None, torch.ones(48)], ids=["plain", "by"])
def test_it_is_one_kernel_with_nothing_in_between(by, monkeypatch):
    """Also where it is made for few tokens, and so for less work than a GPU has processors: there the
    compiler cuts a long row's maximum in parts, each a kernel's, and would for many tokens after."""
    able = CppScheduling.backend_features - {BackendFeature.REDUCE_TO_SINGLE_ELEMENT}
    monkeypatch.setattr(CppScheduling, "backend_features", able)
    monkeypatch.setattr(InductorChoices, "reduction_split_factor", lambda *asked, **options: 4)
    with inductor.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(fused, torch.randn(5, 48).bfloat16(), by)
    assert code.count("async_compile.cpp_pybinding(") == 1
    made = [line for line in code.splitlines() if "= empty_strided_cpu(" in line]
    assert [("48" in line, "float8" in line) for line in made] == [(False, False), (True, True)]


def test_every_width_of_a_model_gets_its_kernel(monkeypatch, caplog):
    """More than torch.compile makes of one function before it gives up."""
    monkeypatch.setattr(float8_tokens.torch, "compile", partial(torch.compile, backend="eager"))
    for n in range(16, 16 * 12, 16):
        assert torch.equal(fused(torch.ones(5, n))[1], torch.full((5, 1), 1 / 448))
    assert n_graphs() == 11 and not float8_tokens._refused and not said(caplog)


def test_where_it_is_used(monkeypatch):
    """On a GPU in eager mode; not for one token, for somebody who counts operations, in a compiled block."""
    seen = []
    monkeypatch.setattr(float8_tokens, "FUSED_ON", "cpu")
    monkeypatch.setattr(float8_tokens, "fused", lambda x, by: seen.append(len(x)) or plain(x, by))
    x = torch.randn(5, 16)
    quantize_tokens(x)
    with keeping_attention()[0]:  # of a block that is computed again
        quantize_tokens(x)
    assert seen == [5, 5]
    quantize_tokens(x[:1])
    with FlopCounterMode(display=False):
        quantize_tokens(x)
    with FakeTensorMode() as mode:
        values, factors = quantize_tokens(mode.from_tensor(x))
    assert (values.dtype, values.shape, factors.shape) == (FLOAT8, (5, 16), (5, 1))
    got = torch.compile(quantize_tokens, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(got[0].float(), plain(x)[0].float()) and n_graphs() == 1
    assert seen == [5, 5]
    monkeypatch.setattr(float8_tokens, "FUSED_ON", "cuda")
    quantize_tokens(x)
    assert seen == [5, 5]


def test_without_a_compiler_it_is_said_once(caplog):
    x, y = torch.randn(5, 48), torch.randn(5, 32)
    none = inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with none, caplog.at_level(logging.WARNING):
        for given in (x, y, x):
            assert torch.equal(fused(given)[0].view(torch.uint8), plain(given)[0].view(torch.uint8))
    (once,) = said(caplog)
    assert "torch.compile cannot make the kernel" in once and "InvalidCxxCompiler" in once
    assert "slower" in once and sorted(float8_tokens._refused) == [32, 48]


def test_no_memory_is_not_a_missing_compiler(monkeypatch):
    def full(x, by):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(float8_tokens, "_compiled", lambda width: full)
    with pytest.raises(torch.OutOfMemoryError):
        fused(torch.ones(2, 16))
    assert not float8_tokens._refused
