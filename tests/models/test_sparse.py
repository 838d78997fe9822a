"""Sparse attention computes softmax over the pairs that are kept: both ways of it, whole
models, and who is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hvtrain.config import SparseConfig
from hvtrain.errors import ConfigError
from hvtrain.models import all_specs, sparse, sparse_flex
from hvtrain.models.attend_op import attend
from hvtrain.models.attention import Fewer, local_attend
from hvtrain.models.dit import DiT, Grid, Joint
from hvtrain.models.kernels import KERNELS
from hvtrain.models.sparse import OP, WAYS, Sparse, attend_sparse, check_sparse, pick_sparse
from hvtrain.models.sparse_masks import Pattern, Radial, SlidingTiles, layout_of
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from tests.models.any_model import an_input, n_parameters, random_model

CPU, SDPA = torch.device("cpu"), KERNELS["sdpa"]
GRID = Grid(3, 14, 11)
PATTERNS = [SlidingTiles((2, 4, 4), (1, 3, 2)), Radial(16, 0.003)]
OVER_ALL = [SlidingTiles((2, 4, 4), (9, 9, 9)), Radial(16, 1e9)]


def draw(n_txt: int, *, grid: Grid = GRID) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    g = generator(n_txt, stream="sparse")
    return [torch.randn(2, math.prod(grid) + n_txt, 3, 16, generator=g) for _ in range(4)]


def mask_of(pattern: Pattern, n_txt: int, grid: Grid = GRID) -> Tensor:
    """[S S] bool, by token."""
    layout = layout_of(pattern, grid)
    run = torch.repeat_interleave(torch.arange(len(layout.keep)), torch.from_numpy(layout.sizes))
    n = len(run)
    mask = torch.ones(n + n_txt, n + n_txt, dtype=torch.bool)
    mask[:n, :n] = torch.from_numpy(layout.keep)[run][:, run]
    return mask


def masked(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *, n_txt: int) -> list[Tensor]:
    """The definition in float64: output, log-sum-exp and gradients."""
    with torch.enable_grad():
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        scores = torch.einsum("bsnd,btnd->bnst", wide[0], wide[1]) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask_of(pattern, n_txt), -math.inf)
        out = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), wide[2])
        grads = torch.autograd.grad(out, wide, d_out.double())
    return [out.detach(), scores.logsumexp(-1).detach(), *grads]


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention's own operators, not compiled: the only way that all of them run on a CPU."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(sparse_flex, "_compiled", lambda function: function)


@pytest.mark.parametrize("n_txt", [0, 5])
@pytest.mark.parametrize("pattern", [*PATTERNS, *OVER_ALL], ids=str)
@pytest.mark.parametrize("way", sorted(WAYS))
def test_softmax_over_what_is_kept(way: str, pattern: Pattern, n_txt: int, plain_flex: None) -> None:
    q, k, v, d_out = draw(n_txt)
    one = Sparse(pattern, WAYS[way], SDPA)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = sparse.sparse_attention(*leaves, list(GRID), one.number)
    grads = torch.autograd.grad(out, leaves, d_out)
    for have, want in zip((out, lse, *grads), masked(pattern, q, k, v, d_out, n_txt=n_txt), strict=True):
        torch.testing.assert_close(have.double(), want, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", OVER_ALL, ids=str)
def test_a_window_over_everything_is_exact_attention(pattern: Pattern) -> None:
    q, k, v, d_out = draw(5)
    found = []
    for how in (
        lambda *x: attend(SDPA, *x),
        lambda *x: attend_sparse(Sparse(pattern, WAYS["gather"], SDPA), *x, grid=GRID)
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = how(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, d_out)])
    for exact, have in zip(*found, strict=True):
        torch.testing.assert_close(have, exact, atol=1e-6, rtol=1e-6)


def test_each_sample_has_its_own_text() -> None:
    """Padding of text and of image tokens is neither read nor written."""
    n, lengths = math.prod(GRID), (5, 0)
    fewer = Fewer(Sparse(PATTERNS[0], WAYS["gather"], SDPA), GRID)
    x = [Joint(t[:, : n + 2], t[:, n + 2 :]) for t in draw(9)[:3]]
    out = local_attend(*x, txt_len=lengths, n_img=n, fewer=fewer)
    for row, n_txt in enumerate(lengths):
        q, k, v = (torch.cat([j.img[row, :n], j.txt[row, :n_txt]])[None] for j in x)
        want = masked(PATTERNS[0], q, k, v, torch.zeros_like(q), n_txt=n_txt)[0][0]
        torch.testing.assert_close(out.img[row, :n].double(), want[:n], atol=4e-6, rtol=1e-5)
        torch.testing.assert_close(out.txt[row, :n_txt].double(), want[n:], atol=4e-6, rtol=1e-5)
        assert not out.img[row, n:].any() and not out.txt[row, n_txt:].any()


def test_autocast_reaches_the_operator() -> None:
    q, k, v, _ = draw(0)
    one = Sparse(PATTERNS[0], WAYS["gather"], SDPA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend_sparse(one, q, k, v, grid=GRID).dtype == torch.bfloat16


def test_operations_are_those_of_the_pairs_that_are_kept() -> None:
    q, k, v, d_out = draw(5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        attend_sparse(Sparse(PATTERNS[0], WAYS["gather"], SDPA), *leaves, grid=GRID).backward(d_out)
    pairs = int(mask_of(PATTERNS[0], 5).sum())
    assert counter.get_total_flops() == 7 * 2 * pairs * 2 * 3 * 16  # products of 2 samples and 3 heads of 16


def test_the_operator_is_what_torch_asks_of_one() -> None:
    q, k, v, _ = (x[:1, :, :1] for x in draw(3, grid=Grid(2, 2, 2)))
    one = Sparse(SlidingTiles((1, 2, 1), (1, 1, 1)), WAYS["gather"], SDPA)
    args = tuple(x.clone().requires_grad_() for x in (q, k, v))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP.default, (*args, [2, 2, 2], one.number), test_utils=checks)


# --- whole models -------------------------------------------------------------------------------------------

TINY = [
    pytest.param(spec, flavor, id=f"{spec.name}-{flavor.name}")
    for spec in all_specs() for flavor in spec.flavors.values() if n_parameters(spec, flavor) < 5e6
]  # fmt: skip
ALONE = ParallelContext()
LITTLE = SparseConfig("tiles", tile=(1, 1, 2), window=(1, 1, 1))


def run(model: DiT, inp, cfg: SparseConfig) -> tuple[Tensor, Tensor]:
    """Velocity, and all gradients in one row."""
    parallelize(model, ALONE, sparse=cfg)
    model.zero_grad()
    out = model(inp)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("spec, flavor", TINY)
def test_models_put_their_tokens_back(spec, flavor) -> None:
    """In tiles whose windows leave nothing out a model computes what it did; with less it computes something
    else, unless told to be exact."""
    model, inp = random_model(spec, flavor), an_input(spec, flavor)
    exact = run(model, inp, SparseConfig())
    with torch.no_grad():
        unlearnt = model(inp)
    for cfg in (
        replace(LITTLE, tile=(2, 1, 2), window=(9, 9, 9)), SparseConfig("radial", block=3, width=1e9)
    ):
        for have, want in zip(run(model, inp, cfg), exact, strict=True):
            assert (have - want).norm() <= 1e-5 * want.norm()
    for cfg in (LITTLE, SparseConfig("radial", block=1, width=0.05)):
        for have, want in zip(run(model, inp, cfg), exact, strict=True):
            assert (have - want).norm() > 0.02 * want.norm()
    with torch.no_grad():
        assert torch.equal(model(replace(inp, exact=True)), unlearnt)


def test_the_first_layers_are_exact() -> None:
    spec, flavor = TINY[0].values
    model = random_model(spec, flavor)
    parallelize(model, ALONE, sparse=replace(LITTLE, exact_layers=2))
    ways = [
        [m.attend.sparse is None for m in block.modules() if hasattr(m, "attend")] for block in model.blocks
    ]
    assert ways == [[True]] * 2 + [[False]] * (len(ways) - 2)
    parallelize(model, ALONE)
    assert (
        model.order is None
        and not any(getattr(m, "attend", None) and m.attend.sparse for m in model.modules())
    )


def test_a_run_says_that_it_is_not_exact() -> None:
    spec, flavor = TINY[0].values
    kernel = parallelize(random_model(spec, flavor), ALONE, sparse=replace(LITTLE, exact_layers=2))
    assert kernel.name == (
        "sparse (tiles 1x1x2 in windows of 1x1x1, by gather, the first 2 blocks exact; NOT exact), else sdpa"
    )
    assert Radial(128, 0.5).describe() == "radial in blocks of 128, 0.5 times as wide"


# --- who is refused -----------------------------------------------------------------------------------------


def test_where_it_does_not_apply() -> None:
    spec, flavor = TINY[0].values
    model = random_model(spec, flavor)
    for said, at in {
        "parallel.ring is 2": {"ring": 2}, "parallel.kernel is xfuser": {"kernel": "xfuser"},
        "exact_layers is 99 of": {"cfg": replace(LITTLE, exact_layers=99)},
    }.items():
        asked = {"cfg": LITTLE, "ring": 1, "kernel": "auto", **at}
        with pytest.raises(
            ConfigError, match=f"sparse.pattern 'tiles' cannot be used: .*{said}.*set it to none"
        ):
            check_sparse(asked["cfg"], model, ring=asked["ring"], kernel=asked["kernel"])
    model.__class__ = type("Other", (type(model),), {"may_be_sparse": False})
    with pytest.raises(ConfigError, match="the blocks of Other do not say where their tokens lie"):
        check_sparse(LITTLE, model, ring=1, kernel="auto")
    check_sparse(SparseConfig(), model, ring=2, kernel="xfuser")


def test_flex_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    flex = replace(LITTLE, kernel="flex")
    with pytest.raises(
        ConfigError, match=r"'flex' cannot be used: it needs a CUDA device, .*; sparse.kernel=gather computes"
    ):
        pick_sparse(flex, dense=SDPA, device=CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(sparse_flex.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'triton' is not installed"):
        pick_sparse(LITTLE, dense=SDPA, device=cuda)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(ConfigError, match="needs PyTorch 2.13 or newer, this is 2.11.0"):
        pick_sparse(LITTLE, dense=SDPA, device=cuda)


def test_gather_trains_with_what_has_a_backward() -> None:
    blind = replace(SDPA, name="blind", backward=None)
    with pytest.raises(
        ConfigError, match="'gather' cannot be used: blind has no backward; set parallel.kernel to auto$"
    ):
        pick_sparse(LITTLE, dense=blind, device=CPU)
    assert pick_sparse(LITTLE, dense=blind, device=CPU, training=False) is not None


@pytest.mark.parametrize("broken", [False, True, "raises"])
def test_flex_is_tried_with_values_before_it_is_taken(
    broken: object, plain_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log-sum-exp of the wrong base gives other gradients."""
    monkeypatch.setattr(sparse_flex, "missing", lambda device: None)
    monkeypatch.setitem(WAYS, "flex", replace(WAYS["flex"], missing=lambda device: None))
    grads = sparse_flex._grads
    if broken == "raises":
        monkeypatch.setattr(sparse_flex, "_grads", lambda *args: 1 // 0)
    elif broken:
        monkeypatch.setattr(
            sparse_flex, "_grads", lambda d, q, k, v, o, lse, m: grads(d, q, k, v, o, lse * math.log(2), m)
        )
    sparse._trial.cache_clear()
    try:
        if not broken:
            found = pick_sparse(replace(LITTLE, kernel="flex"), dense=SDPA, device=CPU)
            assert found is not None and found.way.name == "flex"
            return
        why = (
            "a call of it fails: ZeroDivisionError"
            if broken == "raises" else "it computes something else here"
        )
        with pytest.raises(ConfigError, match=f"'flex' cannot be used: {why}.*sparse.kernel=gather"):
            pick_sparse(replace(LITTLE, kernel="flex"), dense=SDPA, device=CPU)
    finally:
        sparse._trial.cache_clear()


# --- flex_attention compiled --------------------------------------------------------------------------------


def _compiled_counts(function, backend: str, texts: tuple[int, ...]) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for pattern in PATTERNS:
        for n_txt in texts:
            q, k, v, d_out = draw(n_txt)
            out, lse, *grads = masked(pattern, q, k, v, d_out, n_txt=n_txt)
            mask = sparse_flex.block_mask(pattern, GRID, n_txt, CPU)
            first = [x.transpose(1, 2) for x in (q, k, v)]
            if function is sparse_flex._grads:
                want, last = grads, (out.float().transpose(1, 2), lse.float(), mask)
                have = compiled(d_out.transpose(1, 2), *first, *last)
            else:
                want, have = [out], [compiled(*first, mask)]
            for a, b in zip(have, want, strict=True):
                torch.testing.assert_close(a.transpose(1, 2).double(), b, atol=4e-6, rtol=1e-5)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_the_backward_is_traced_whole_and_not_for_every_text() -> None:
    assert _compiled_counts(sparse_flex._grads, "aot_eager", (0, 5, 7, 9)) <= 4


@pytest.mark.slow
def test_generated_code_of_the_forward() -> None:
    """The CPU's, which gives no log-sum-exp: the masks are those of the GPU's."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: torch_flex.BlockMask) -> Tensor:
        return torch_flex.flex_attention(q, k, v, block_mask=mask)

    with torch.no_grad():
        assert _compiled_counts(forward, "inductor", (0, 5, 9)) <= 4
