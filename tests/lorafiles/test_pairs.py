from dataclasses import replace

import pytest
import torch

from hvtrain.lorafiles.pairs import LoraPair, add_pairs, cut_rows, fold_alpha, join_rows

ROWS = [torch.arange(0, 4), torch.arange(4, 8), torch.arange(8, 12)]


def pair(rank: int, n_out: int, *, alpha: float = 3.0, seed: int = 0) -> LoraPair:
    draw = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, 6, generator=draw), torch.randn(n_out, rank, generator=draw), alpha)


def same(a: LoraPair | None, b: LoraPair | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.alpha == b.alpha


def test_a_fused_pair_is_cut_and_joined_exactly():
    fused = pair(2, 12)
    parts = cut_rows(fused, ROWS)
    assert torch.equal(torch.cat([p.delta() for p in parts]), fused.delta())
    assert same(join_rows(parts, ROWS), fused)


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_separate_pairs_are_joined_and_cut_exactly(missing):
    parts = [pair(rank, 4, alpha=2.0 * rank, seed=rank) for rank in (1, 2, 3)]
    parts[1].up.zero_()  # an adapter that learned nothing must come back too
    if missing is not None:
        parts[missing] = None
    fused = join_rows(parts, ROWS)
    expected = torch.cat([torch.zeros(4, 6) if p is None else p.delta() for p in parts])
    torch.testing.assert_close(fused.delta(), expected)
    assert all(same(a, b) for a, b in zip(cut_rows(fused, ROWS), parts, strict=True))


@pytest.mark.parametrize("first", [0, 1])  # an alpha of 0 switches a layer off
def test_differing_scales_keep_their_delta(first):
    parts = [pair(2, 4, alpha=alpha, seed=int(alpha)) for alpha in (0.0, 1.0, 3.0, 4.0)][first:][:3]
    torch.testing.assert_close(join_rows(parts, ROWS).delta(), torch.cat([p.delta() for p in parts]))


def test_a_stack_from_another_tool_is_recognised():
    parts = [pair(2, 4, seed=seed) for seed in range(3)]
    fused = join_rows(parts, ROWS)
    foreign = LoraPair(fused.down, fused.up, fused.alpha)
    assert all(same(a, b) for a, b in zip(cut_rows(foreign, ROWS), parts, strict=True))
    foreign.up[0, 5] = 1e-3  # one value outside the blocks: not a stack
    assert cut_rows(foreign, ROWS)[0].rank == 6


def test_a_stack_is_cut_where_it_was_not_joined():
    """The sum of what it does stays, whatever its parts were: whole, in two, or with
    the ranks of an older file."""
    parts = [pair(rank, 4, alpha=2.0, seed=rank) for rank in (1, 2, 3)]
    fused = join_rows(parts, ROWS)
    for rows in ([torch.arange(12)], [torch.arange(6), torch.arange(6, 12)], [torch.arange(12).flip(0)]):
        cut = cut_rows(fused, rows)
        assert torch.equal(torch.cat([p.delta() for p in cut]), fused.delta()[torch.cat(rows)])
    for stale in ((2, 2, 2), (1, 2, 2), (3, 3, 0)):
        cut = cut_rows(replace(fused, parts=stale), ROWS)
        assert torch.equal(torch.cat([p.delta() for p in cut]), fused.delta())


def test_joining_rounds_nothing_away():
    """bfloat16 parts whose scales differ, and a float32 part beside a bfloat16 one."""
    short = [
        LoraPair(p.down.bfloat16(), p.up.bfloat16(), a) for p,
        a in ((pair(2, 4), 2.0), (pair(2, 4, seed=1), 3.3))
    ]
    for parts in ([*short, None], [short[0], replace(pair(2, 4, seed=4), alpha=2.0), None]):
        wanted = torch.cat([torch.zeros(4, 6) if p is None else p.delta() for p in parts])
        torch.testing.assert_close(join_rows(parts, ROWS).delta(), wanted, rtol=1e-6, atol=1e-6)


def test_add_pairs_sums_in_float32_and_rounds_once():
    a, b = pair(2, 12, seed=1), pair(3, 12, seed=2)
    weight = torch.randn(12, 6).bfloat16()
    expected = (weight.float() + 0.5 * a.delta() - 2.0 * b.delta()).bfloat16()
    add_pairs(weight, [(a, 0.5), (b, -2.0)])
    assert torch.equal(weight, expected)


def test_add_pairs_in_chunks_and_multiplier_zero(monkeypatch):
    big, small = torch.randn(12, 6), None
    small = big.clone()
    add_pairs(big, [(pair(2, 12), 1.0)])
    monkeypatch.setattr("hvtrain.lorafiles.pairs._CHUNK", 20)  # three rows at a time
    untouched = small.clone()
    add_pairs(small, [(pair(2, 12), 0.0)])
    assert torch.equal(small, untouched)
    add_pairs(small, [(pair(2, 12), 1.0)])
    torch.testing.assert_close(small, big)


def test_fold_alpha():
    folded = fold_alpha(pair(4, 12, alpha=2.0))
    assert folded.scale == 1.0 and torch.equal(folded.delta(), pair(4, 12, alpha=2.0).delta())
