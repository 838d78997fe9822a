"""Attention: the trimmed kernel against plain softmax, and Ulysses x ring against
one process, with gradients."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from hvtrain.errors import ConfigError
from hvtrain.models import kernels
from hvtrain.models.attention import local_attend
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import KERNELS, pick_kernel
from hvtrain.parallel.context import ParallelContext, check_heads, start
from hvtrain.parallel.usp import usp_attend
from hvtrain.rng import generator
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# (image tokens, text lengths): ragged, without text, fewer tokens than ranks, rings whose
# last ranks hold only padding
SHAPES = [(29, (3, 7, 7)), (8, (0, 5)), (3, (4,)), (5, (2, 0)), (64, (6, 6))]
HEADS, DIM, TEXT = 4, 8, 7


def make(n_img: int, n_batch: int, *, seed: int = 0) -> list[Joint]:
    """q, k, v and the gradient of the output; unit scale, so that attention is far from uniform."""
    g = generator(seed, stream=f"test/{n_img}")
    draw = lambda n: torch.randn(n_batch, n, HEADS, DIM, generator=g)  # noqa: E731
    return [Joint(draw(n_img), draw(TEXT)) for _ in range(4)]


def plain(q: Joint, k: Joint, v: Joint, txt_len: tuple[int, ...], n_img: int) -> Joint:
    """The definition: softmax over the valid keys, one sample at a time, in float64."""
    out = Joint(torch.zeros_like(q.img, dtype=torch.float64), torch.zeros_like(q.txt, dtype=torch.float64))
    for b, n in enumerate(txt_len):
        qb, kb, vb = (torch.cat([x.img[b, :n_img], x.txt[b, :n]]).double() for x in (q, k, v))
        weights = (torch.einsum("snd,tnd->nst", qb, kb) / DIM**0.5).softmax(-1)
        ob = torch.einsum("nst,tnd->snd", weights, vb)
        out.img[b, :n_img], out.txt[b, :n] = ob[:n_img], ob[n_img:]
    return out


def with_grads(attend, qkv: list[Joint], d_out: Joint) -> tuple[Joint, list[Tensor]]:
    leaves = [Joint(*(t.detach().clone().requires_grad_() for t in x)) for x in qkv]
    out = attend(*leaves)
    torch.autograd.backward([out.img, out.txt], [d_out.img.to(out.img), d_out.txt.to(out.txt)])
    return out, [t.grad for x in leaves for t in x]


@pytest.mark.parametrize("n_img, txt_len", SHAPES)
def test_local_attention_is_softmax_over_the_valid_tokens(n_img: int, txt_len: tuple[int, ...]) -> None:
    *qkv, d_out = make(n_img + 2, len(txt_len))  # two image tokens of padding
    out, grads = with_grads(lambda q, k, v: local_attend(q, k, v, txt_len=txt_len, n_img=n_img), qkv, d_out)
    ref, ref_grads = with_grads(lambda q, k, v: plain(q, k, v, txt_len, n_img), qkv, d_out)
    for got, want in zip([*out, *grads], [*ref, *ref_grads], strict=True):
        torch.testing.assert_close(got, want.to(got), atol=2e-6, rtol=1e-5)
    assert not out.img[:, n_img:].any(), "padded image positions must be zero"
    assert all(not out.txt[b, n:].any() for b, n in enumerate(txt_len)), "padded text positions must be zero"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_s_partial_results_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    """The log-sum-exp belongs to the output, and the backward takes a merged
    result: what the ring relies on."""
    kernel = KERNELS[name]
    reason = kernel.missing(torch.device(device), dtype)
    if reason:
        pytest.skip(f"{name} on {device}: {reason}")
    d_head = 64
    g = generator(1, stream="kernel")
    q, k, v, d_out = (
        torch.randn(2, s, HEADS, d_head, generator=g).to(device, dtype) for s in (33, 45, 45, 33)
    )
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("bsnd,btnd->bnst", wide[0], wide[1]) / d_head**0.5
    want = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), wide[2])
    want.backward(d_out.double())
    tol = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 4e-2}
    got = kernel.partial(q, k, v)
    torch.testing.assert_close(got.out.double(), want, **tol)
    torch.testing.assert_close(
        got.lse.double(), scores.logsumexp(-1), atol=1e-2 if name == "sage" else 2e-3, rtol=1e-4
    )
    torch.testing.assert_close(kernel.attend(q, k, v).double(), want, **tol)
    if kernel.backward is not None:
        for have, leaf in zip(kernel.backward(d_out, q, k, v, got), wide, strict=True):
            torch.testing.assert_close(have.double(), leaf.grad, **tol)


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "efficient"])
def test_torch_s_cuda_kernels_take_what_we_pass(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: these operators are private to torch, and a changed
    signature shows here without a GPU."""
    monkeypatch.setattr(kernels, "_flash_fits", lambda q: flash)
    dtype = torch.bfloat16 if flash else torch.float32
    q, k, v, d_out = (torch.empty(2, s, HEADS, 64, device="meta", dtype=dtype) for s in (33, 45, 45, 33))
    partial = KERNELS["sdpa"].partial(q, k, v)
    assert partial.out.shape == q.shape and partial.lse.shape == (2, HEADS, 33)
    assert KERNELS["sdpa"].backward is not None
    grads = KERNELS["sdpa"].backward(d_out, q, k, v, partial)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def _usp_against_local(world: int) -> dict[str, float]:
    """Largest error of outputs and gradients over all layouts of `world` ranks and all shapes."""
    warnings.simplefilter("ignore")
    errors: dict[str, float] = {}
    layouts = [(u, world // u) for u in range(1, world + 1) if world % u == 0]
    for ulysses, ring in layouts:
        ctx = start(ulysses, ring)
        for n_img, txt_len in SHAPES:
            *qkv, d_out = make(n_img, len(txt_len))
            ref, ref_grads = with_grads(
                lambda q, k, v, t=txt_len, n=n_img: local_attend(q, k, v, txt_len=t, n_img=n), qkv, d_out
            )
            chunk = -(-n_img // ctx.sp)
            mine = slice(ctx.sp_rank * chunk, (ctx.sp_rank + 1) * chunk)

            def shard(
                x: Joint, mine: slice = mine, chunk: int = chunk, n: int = n_img, size: int = ctx.sp
            ) -> Joint:
                # must never be read
                pad = x.img.new_full((x.img.shape[0], chunk * size - n, HEADS, DIM), 3.0)
                return Joint(torch.cat([x.img, pad], 1)[:, mine], x.txt)

            # Replicated text: each rank hands in its share of the output gradient, and
            # gets its share of the input's.
            d_mine = Joint(shard(d_out).img, d_out.txt / ctx.sp)
            out, grads = with_grads(
                lambda q, k, v, t=txt_len, n=n_img, c=ctx: usp_attend(
                    q, k, v, txt_len=t, n_img=n, ctx=c, kernel=KERNELS["sdpa"]
                ),
                [shard(x) for x in qkv],
                d_mine,
            )
            for i, grad in enumerate(grads):
                if i % 2:
                    torch.distributed.all_reduce(grad)  # SUM over the ranks
            pairs = list(zip([*out, *grads], [*ref, *ref_grads], strict=True))
            n_mine = min(max(n_img - mine.start, 0), chunk)
            for i, (got, want) in enumerate(pairs):
                if i % 2 == 0:
                    assert not got[:, n_mine:].any(), "padding must give zeros"
                    got, want = got[:, :n_mine], want[:, mine]
                name = f"U{ulysses}xR{ring} {n_img}+{txt_len} " + ("output" if i < 2 else "gradient")
                error = (got - want).abs().max().item() if got.numel() else 0.0
                errors[name] = max(errors.get(name, 0.0), error)
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_ulysses_and_ring_equal_one_process(world: int) -> None:
    for errors in run_ranks(world, _usp_against_local, world):
        bad = {name: error for name, error in errors.items() if not error < 1e-5}
        assert len(errors) >= 2 * len(SHAPES) and not bad, bad


def _heads_of_real_models(world: int) -> dict[str, float]:
    """Largest error of the output for the head counts of the models, at an odd length with ragged text."""
    warnings.simplefilter("ignore")
    errors = {}
    n_img, txt_len = 45, (3, 7)
    for heads in (24, 16, 40, 12):
        g = generator(heads, stream="heads")
        whole = [Joint(*(torch.randn(2, n, heads, 8, generator=g) for n in (n_img, 9))) for _ in range(3)]
        want = local_attend(*whole, txt_len=txt_len, n_img=n_img)
        for ulysses in [u for u in range(1, world + 1) if world % u == 0]:
            ctx = start(ulysses, world // ulysses)
            chunk = -(-n_img // world)
            mine = slice(ctx.sp_rank * chunk, (ctx.sp_rank + 1) * chunk)
            pad = (0, 0, 0, 0, 0, chunk * world - n_img)
            parts = [Joint(torch.nn.functional.pad(x.img, pad)[:, mine], x.txt) for x in whole]
            out = usp_attend(*parts, txt_len=txt_len, n_img=n_img, ctx=ctx, kernel=KERNELS["sdpa"])
            ref = torch.nn.functional.pad(want.img, pad)[:, mine]
            error = max((out.img - ref).abs().max().item(), (out.txt - want.txt).abs().max().item())
            errors[f"{heads} heads, U{ulysses}xR{world // ulysses}"] = error
    return errors


@pytest.mark.parametrize("world", [3, 4])
def test_the_head_counts_of_the_models(world: int) -> None:
    """24, 16, 40 and 12 heads, on 4 ranks, and on 3, where Ulysses has no way for 16 and 40 and
    says which degrees there are."""
    if world == 3:
        with pytest.raises(ConfigError, match="choose one of 1, 2, 4, 8, 16"):
            check_heads(16, 3)
        with pytest.raises(ConfigError, match="choose one of 1, 2, 4, 5, 8, 10, 20, 40"):
            check_heads(40, 3)
        return
    for errors in run_ranks(world, _heads_of_real_models, world):
        assert len(errors) == 12 and max(errors.values()) < 1e-5, errors


def _usp_under_autocast(world: int) -> list[tuple[float, float, torch.dtype]]:
    """(error, error of the same in bf16 by one process, dtype) of outputs and gradients of every layout."""
    warnings.simplefilter("ignore")
    rows = []
    for ulysses in (1, world):
        ctx = start(ulysses, world // ulysses)
        n_img, txt_len = 32, (3, 7)
        *qkv, d_out = make(n_img, len(txt_len))
        exact, exact_grads = with_grads(partial(plain, txt_len=txt_len, n_img=n_img), qkv, d_out)
        mine = slice(ctx.sp_rank * n_img // world, (ctx.sp_rank + 1) * n_img // world)
        with torch.autocast("cpu", torch.bfloat16):
            place = {"txt_len": txt_len, "n_img": n_img}
            shared = partial(usp_attend, **place, ctx=ctx, kernel=KERNELS["sdpa"])
            out, grads = with_grads(
                shared,
                [Joint(x.img[:, mine], x.txt) for x in qkv],
                Joint(d_out.img[:, mine], d_out.txt / world),
            )
            one, one_grads = with_grads(partial(local_attend, **place), qkv, d_out)
        for got, lone, ref in zip([out.img, grads[2], grads[4]], [one.img, one_grads[2], one_grads[4]],
                                  [exact.img, exact_grads[2], exact_grads[4]], strict=True):  # fmt: skip
            error, usual = ((x.double() - ref[:, mine]).norm().item() for x in (got, lone[:, mine]))
            rows.append((error, usual, out.img.dtype))
    return rows


def test_bf16_over_ranks_is_as_exact_as_on_one() -> None:
    """Partial results merge in fp32, so a ring adds at most one more rounding."""
    for rows in run_ranks(2, _usp_under_autocast, 2):
        for error, usual, dtype in rows:
            assert dtype == torch.bfloat16 and 0 < error < 2 * usual, (error, usual)


def test_kernel_choice() -> None:
    assert pick_kernel("auto", device=CPU).name == "sdpa"
    with pytest.raises(ConfigError, match="did you mean 'flash2'"):
        pick_kernel("flash_2", device=CPU)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        pick_kernel("flash3", device=CPU)


@pytest.mark.parametrize(
    "ctx, training, says",
    [
        (ParallelContext(world=2, ulysses=2), True, "gives text keys and values no gradient; train with "
        "'auto'"),
        (ParallelContext(world=2, ulysses=2), False, "needs a CUDA device, this is cpu"),
    ],
)
def test_xfuser_is_refused_with_the_reason(ctx: ParallelContext, training: bool, says: str) -> None:
    from hvtrain.parallel.apply import parallelize
    from tests.parallel.tiny_run import Case, build_model

    with pytest.raises(ConfigError, match=says):
        parallelize(build_model(Case())[0], ctx, kernel="xfuser", training=training)


def test_heads_must_be_divisible() -> None:
    check_heads(24, 8)
    with pytest.raises(ConfigError, match=r"5 does not divide .* 24 .* 1, 2, 3, 4, 6, 8, 12, 24"):
        check_heads(24, 5)
