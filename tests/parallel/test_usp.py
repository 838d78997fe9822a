"""Attention over ranks, rank by rank in threads: outputs, gradients, what travels and how
often. Against the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hvtrain.errors import ConfigError
from hvtrain.models.dit import Grid, Joint, Rope, Tokens
from hvtrain.models.kernels import KERNELS, Grads, Partial
from hvtrain.parallel import usp
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.usp import RingSpec, ShardedSequence, UspAttention, _merge, _nothing, usp_attend
from tests.parallel.test_attention import DIM, HEADS, SHAPES, TEXT, make, plain, with_grads
from tests.parallel.threads import run_threads

SDPA = KERNELS["sdpa"]


def asked(function):
    """A kernel's function, of which nothing is asked without queries or without keys."""

    def ask(*tensors):
        assert all(t.shape[1] for t in tensors if isinstance(t, torch.Tensor))
        # the output's gradient, and the queries
        assert len(tensors) == 3 or tensors[0].shape == tensors[1].shape
        return function(*tensors)

    return ask


CAREFUL = replace(SDPA, partial=asked(SDPA.partial), backward=asked(SDPA.backward))


# And fewer image tokens than ranks in the ring: the last has none, and of the first sample no text either.
@pytest.mark.parametrize("n_img, txt_len", [*SHAPES, (2, (0, 4))])
@pytest.mark.parametrize("ulysses, ring", [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)])
def test_outputs_and_gradients_are_those_of_softmax(ulysses, ring, n_img, txt_len, monkeypatch):
    *qkv, d_out = make(n_img, len(txt_len))
    want, want_grads = with_grads(lambda q, k, v: plain(q, k, v, txt_len, n_img), qkv, d_out)
    sp = ulysses * ring
    chunk = -(-n_img // sp)

    def rank(ctx: ParallelContext):
        here = slice(ctx.sp_rank * chunk, (ctx.sp_rank + 1) * chunk)

        def shard(x: Joint) -> Joint:
            pad = x.img.new_full((x.img.shape[0], chunk * sp - n_img, HEADS, DIM), 3.0)  # must never be read
            return Joint(torch.cat([x.img, pad], 1)[:, here], x.txt)

        def attend(q: Joint, k: Joint, v: Joint) -> Joint:
            return UspAttention(CAREFUL, ctx=ctx).joint(q, k, v, txt_len=txt_len, n_img=n_img)

        # Text is replicated: each rank hands in its share of its output's gradient.
        return with_grads(attend, [shard(x) for x in qkv], Joint(shard(d_out).img, d_out.txt / sp))

    results, _ = run_threads(monkeypatch, rank, ulysses=ulysses, ring=ring)
    for out, _ in results:
        torch.testing.assert_close(out.txt, want.txt.float(), atol=2e-6, rtol=1e-5)
    whole = torch.cat([out.img for out, _ in results], 1)
    torch.testing.assert_close(whole[:, :n_img], want.img.float(), atol=2e-6, rtol=1e-5)
    assert not whole[:, n_img:].any(), "padding must give zeros"
    for i, ref in enumerate(want_grads):
        parts = [grads[i] for _, grads in results]
        got = sum(parts) if i % 2 else torch.cat(parts, 1)[:, :n_img]  # text: summed over the ranks
        torch.testing.assert_close(got, ref[:, : got.shape[1]].float(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("ulysses, ring", [(2, 1), (1, 3), (2, 2)])
def test_an_image_without_text_is_attended_to_without_a_message_about_text(ulysses, ring, monkeypatch):
    """Zero text tokens, as of a model that attends to its prompt elsewhere."""
    n_img, sp = 7, ulysses * ring
    *qkv, d_out = (Joint(x.img, x.txt[:, :0]) for x in make(n_img, 2))
    want, want_grads = with_grads(lambda q, k, v: plain(q, k, v, (0, 0), n_img), qkv, d_out)
    chunk = -(-n_img // sp)

    def rank(ctx: ParallelContext):
        monkeypatch.setattr(usp, "gather", None)
        here = slice(ctx.sp_rank * chunk, (ctx.sp_rank + 1) * chunk)

        def shard(x: Joint) -> Joint:
            return Joint(torch.nn.functional.pad(x.img, (0, 0, 0, 0, 0, chunk * sp - n_img))[:, here], x.txt)

        def attend(q: Joint, k: Joint, v: Joint) -> Joint:
            return usp_attend(q, k, v, txt_len=(0, 0), n_img=n_img, ctx=ctx, kernel=CAREFUL)

        return with_grads(attend, [shard(x) for x in qkv], shard(d_out))

    results, _ = run_threads(monkeypatch, rank, ulysses=ulysses, ring=ring)
    assert all(out.txt.shape == (2, 0, HEADS, DIM) for out, _ in results)
    whole = torch.cat([out.img for out, _ in results], 1)[:, :n_img]
    torch.testing.assert_close(whole, want.img.float(), atol=2e-6, rtol=1e-5)
    for i in (0, 2, 4):
        got = torch.cat([grads[i] for _, grads in results], 1)[:, :n_img]
        torch.testing.assert_close(got, want_grads[i].float(), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("ulysses, ring", [(2, 1), (1, 3), (2, 2)])
def test_across_each_rank_attends_with_its_queries_to_all_that_is_valid(ulysses, ring, monkeypatch):
    """Outputs and gradients are those of one device; those of keys and values, which all ranks hold, add up.
    A sample without keys gets zeros."""
    lengths, n_img, sp = (5, 0, 3), 7, ulysses * ring
    q, k, v, d_out = (
        torch.randn(3, n, HEADS, DIM, generator=torch.Generator().manual_seed(n + i)) for i,
        n in enumerate((n_img, TEXT, TEXT, n_img))
    )  # fmt: skip

    def run(attend, q: torch.Tensor, d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, lengths=lengths)
        out.backward(d_out)
        return out.detach(), *(x.grad for x in leaves)

    def by_definition(q, k, v, lengths):
        rows = []
        for b, n in enumerate(lengths):
            weights = (torch.einsum("snd,tnd->nst", q[b], k[b, :n]) / DIM**0.5).softmax(-1)
            rows.append(torch.einsum("nst,tnd->snd", weights, v[b, :n]))
        return torch.stack(rows)

    def rank(ctx: ParallelContext):
        here = (
            torch.arange(n_img).chunk(sp)[ctx.sp_rank]
            if ctx.sp_rank < len(torch.arange(n_img).chunk(sp)) else []
        )
        return run(UspAttention(SDPA, ctx=ctx).cross, q[:, here], d_out[:, here])

    want = run(by_definition, q, d_out)
    results, wires = run_threads(monkeypatch, rank, ulysses=ulysses, ring=ring)
    assert not wires.sent and not wires.exchanged
    for i, ref in enumerate(want):
        parts = [r[i] for r in results]
        got = torch.cat(parts, 1) if i < 2 else sum(parts)
        torch.testing.assert_close(got, ref, atol=5e-6, rtol=1e-5)
    assert not want[0][1].any() and want[0][0].any()


def attend_alike(ctx: ParallelContext, x: Joint, n_img: int, txt_len: tuple[int, ...], kernel=SDPA) -> Joint:
    chunk = -(-n_img // ctx.sp)
    mine = Joint(x.img[:, ctx.sp_rank * chunk : (ctx.sp_rank + 1) * chunk], x.txt)
    return usp_attend(mine, mine, mine, txt_len=txt_len, n_img=n_img, ctx=ctx, kernel=kernel)


def test_a_ring_sends_each_block_on_until_all_have_seen_it(monkeypatch):
    """Forward: keys and values to the next, one time fewer than there are ranks. Backward: once more, and
    their gradients home, in float32."""
    x = make(12, 1)[0]

    def rank(ctx: ParallelContext) -> None:
        leaf = Joint(*(t.detach().bfloat16().requires_grad_() for t in x))
        out = attend_alike(ctx, leaf, 12, (4,))
        (out.img.float().sum() + out.txt.float().sum()).backward()

    _, wires = run_threads(monkeypatch, rank, ulysses=1, ring=3)
    for sender in range(3):
        sent = [t for by, t in wires.sent if by == sender]
        assert all(t.shape == (2, 1, 4, HEADS, DIM) for t in sent)
        assert [t.dtype for t in sent].count(torch.bfloat16) == 2 + 2
        assert [t.dtype for t in sent].count(torch.float32) == 3
    first = next(t for by, t in wires.sent if by == 0)
    torch.testing.assert_close(first[0], x.img[:, :4].bfloat16())


def test_without_a_ring_the_kernel_is_the_one_that_was_chosen(monkeypatch):
    x, kernel = make(4, 4)[0], replace(SDPA, attend=lambda q, k, v: torch.full_like(q, 5.0))
    for out in run_threads(
        monkeypatch, lambda ctx: attend_alike(ctx, x, 4, (7,) * 4, kernel), ulysses=2, ring=1
    )[0]:
        assert (out.img == 5).all() and (out.txt == 5).all()


def test_gradients_are_summed_in_float32(monkeypatch):
    """In bfloat16, 256 + 1 is 256: every rank's own block gives its queries 256, and
    each of the others' one more."""

    def backward(dout, q, k, v, merged):
        one = 256.0 if k.shape[1] == 2 else 1.0  # with text: the own block
        return Grads(*(torch.full_like(x, n * one) for n, x in zip((1, -1, 2), (q, k, v))))

    def rank(ctx: ParallelContext) -> list[Joint]:
        leaves = [
            Joint(*(torch.ones(1, n, HEADS, DIM).bfloat16().requires_grad_() for n in (1, 3)))
            for _ in range(3)
        ]
        kernel = replace(SDPA, backward=backward)
        out = usp_attend(*leaves, txt_len=(1,), n_img=3, ctx=ctx, kernel=kernel)
        (out.img.sum() + out.txt.sum()).backward()
        return [Joint(x.img.grad, x.txt.grad) for x in leaves]

    for grads in run_threads(monkeypatch, rank, ulysses=1, ring=3)[0]:
        # the text's keys: in the own block alone
        for n, txt, grad in zip((1, -1, 2), (258, 256, 256), grads):
            assert grad.img.dtype == grad.txt.dtype == torch.bfloat16
            assert (
                (grad.img == n * 258).all() and (grad.txt[:, :1] == n * txt).all()
                and not grad.txt[:, 1:].any()
            )


def test_what_the_ring_s_operators_give_is_as_wide_as_their_inputs_and_in_order(monkeypatch):
    """However the inputs lie in memory: a trace without values, and what is
    compiled after it, rest on that."""

    def rank(ctx: ParallelContext) -> None:
        q, k, v = (

                Joint(*(torch.ones(2, HEADS, n, DIM).bfloat16().transpose(1, 2) for n in (2, 3)))
                for _ in range(3)

        )
        inputs, rest = (q.img, k.img, v.img, q.txt, k.txt, v.txt), ([2, 3], 4, SDPA.number, usp._place(ctx))
        img, txt, lse = usp._ring(*inputs, *rest)
        grads = usp._ring_backward(img, txt, *inputs, img, txt, lse, *rest)
        assert [g.shape for g in grads] == [x.shape for x in inputs] and lse.shape == (2, HEADS, 5)
        assert {x.dtype for x in (img, txt, *grads)} == {torch.bfloat16} and lse.dtype == torch.float32
        assert all(x.is_contiguous() for x in (img, txt, lse, *grads))

    run_threads(monkeypatch, rank, ulysses=1, ring=2)


def test_under_autocast_what_travels_is_half_as_wide(monkeypatch):
    x = make(8, 1)[0]

    def rank(ctx: ParallelContext) -> torch.dtype:
        with torch.autocast("cpu", torch.bfloat16):
            return attend_alike(ctx, x, 8, (4,)).img.dtype

    dtypes, wires = run_threads(monkeypatch, rank, ulysses=2, ring=2)
    assert dtypes == [torch.bfloat16] * 4
    assert {t.dtype for t in wires.exchanged} == {t.dtype for _, t in wires.sent} == {torch.bfloat16}
    # q, k and v in one exchange, the output in another; of each rank
    assert sorted(tuple(t.shape) for t in wires.exchanged) == sorted(
        [(3, 2, HEADS, DIM), (1, 4, HEADS // 2, DIM)] * 4
    )


def test_the_text_s_keys_count_once_in_a_ring(monkeypatch):
    """Equal keys everywhere: the output is the mean of the values, image and text with equal weight."""
    n_img, n_txt = 6, 2

    def joint(img: float, txt: float) -> Joint:
        return Joint(torch.full((1, n_img, HEADS, DIM), img), torch.full((1, TEXT, HEADS, DIM), txt))

    def rank(ctx: ParallelContext) -> Joint:
        keys, values = joint(0.0, 0.0), joint(1.0, 9.0)
        here = slice(ctx.sp_rank * 2, ctx.sp_rank * 2 + 2)
        parts = [Joint(x.img[:, here], x.txt) for x in (keys, keys, values)]
        return usp_attend(*parts, txt_len=(n_txt,), n_img=n_img, ctx=ctx, kernel=SDPA)

    for out in run_threads(monkeypatch, rank, ulysses=1, ring=3)[0]:
        mean = (n_img * 1.0 + n_txt * 9.0) / (n_img + n_txt)
        torch.testing.assert_close(out.img, torch.full_like(out.img, mean))
        torch.testing.assert_close(out.txt[:, :n_txt], torch.full((1, n_txt, HEADS, DIM), mean))
        assert not out.txt[:, n_txt:].any()


def test_ulysses_needs_heads_to_share(monkeypatch):
    with pytest.raises(
        ConfigError, match="parallel.ulysses: 3 does not divide the model's 4 attention heads"
    ):
        run_threads(monkeypatch, lambda ctx: attend_alike(ctx, make(6, 1)[0], 6, (4,)), ulysses=3, ring=1)


def test_who_owns_which_block_and_how_much_of_it():
    specs = [RingSpec(ParallelContext(world=4, ring=4, sp_rank=rank), SDPA, (1,), 10) for rank in range(4)]
    assert [[spec.owner(step) for step in range(4)] for spec in specs] == [
        [0, 3, 2, 1], [1, 0, 3, 2], [2, 1, 0, 3], [3, 2, 1, 0],
    ]  # fmt: skip
    assert [specs[0].n_valid(owner, 4) for owner in range(4)] == [4, 4, 2, 0]


def test_results_over_two_key_sets_merge_by_their_weights():
    """A set of keys weighs e^lse: here 1 to 3, so a quarter and three quarters;
    in float32 whatever comes in."""
    a = Partial(torch.full((1, 2, 1, 3), 4.0, dtype=torch.bfloat16), torch.zeros(1, 1, 2))
    b = Partial(torch.full((1, 2, 1, 3), 8.0, dtype=torch.bfloat16), torch.full((1, 1, 2), math.log(3.0)))
    first = _merge(None, a)
    assert (
        first.out.dtype == first.lse.dtype == torch.float32 and (first.out == 4).all()
        and (first.lse == 0).all()
    )
    both = _merge(first, b)
    torch.testing.assert_close(both.out, torch.full((1, 2, 1, 3), 7.0))
    torch.testing.assert_close(both.lse, torch.full((1, 1, 2), math.log(4.0)))
    empty = _nothing(torch.ones(2, 5, 3, 8, dtype=torch.bfloat16))
    assert empty.out.shape == (2, 5, 3, 8) and not empty.out.any() and empty.out.dtype == torch.float32
    assert empty.lse.shape == (2, 3, 5) and not empty.lse.any() and empty.lse.dtype == torch.float32


def tokens(n: int, *, first: bool) -> Tokens:
    img = torch.arange(2.0 * n * 3).view(2, n, 3)
    rope = Rope(torch.arange(n * 2.0).view(n, 2), -torch.arange(n * 2.0).view(n, 2))
    clean = {"clean": torch.arange(n)[None] < 2} if first else {}
    shared = {"vec": torch.ones(2, 3)}
    return Tokens(
        img, rope, n, Grid(1, 1, n), txt=torch.ones(2, 4, 3), txt_len=(4, 2), shared=shared, per_token=clean
    )


def test_tokens_that_need_no_padding_are_copied_once(monkeypatch):
    monkeypatch.setattr(usp.F, "pad", None)  # padding by nothing copies the whole
    parts, _ = (
        run_threads(
            monkeypatch, lambda ctx: ShardedSequence(ctx).scatter(tokens(6, first=True)), ulysses=1, ring=3
        )
    )
    assert torch.equal(torch.cat([p.img for p in parts], 1), tokens(6, first=True).img)


@pytest.mark.parametrize("first", [True, False])
def test_image_tokens_are_dealt_out_in_order_and_padded_at_the_end(first, monkeypatch):
    whole = tokens(7, first=first)

    def rank(ctx: ParallelContext):
        here = ShardedSequence(ctx)
        part = here.scatter(whole)
        return part, here.gather(part.img, 7)

    results, _ = run_threads(monkeypatch, rank, ulysses=1, ring=3)
    for r, (part, back) in enumerate(results):
        n = min(max(7 - 3 * r, 0), 3)
        assert part.img.shape == (2, 3, 3) and torch.equal(part.img[:, :n], whole.img[:, 3 * r : 3 * r + n])
        assert not part.img[:, n:].any() and not part.rope.cos[n:].any()
        assert torch.equal(part.rope.cos[:n], whole.rope.cos[3 * r : 3 * r + n])
        assert torch.equal(part.rope.sin[:n], whole.rope.sin[3 * r : 3 * r + n])
        assert part.n_img == 7 and part.txt is whole.txt and part.txt_len == (4, 2)
        assert part.img.untyped_storage().nbytes() == part.img.nbytes  # a copy, which keeps no whole alive
        assert torch.equal(back, whole.img)
        if first:
            assert part.per_token["clean"].tolist() == [[3 * r + i < 2 for i in range(3)]]
        else:
            assert not part.per_token
