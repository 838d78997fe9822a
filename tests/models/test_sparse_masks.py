"""Which pairs sparse attention keeps, against the definitions one token at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hvtrain.config import SparseConfig
from hvtrain.errors import ConfigError
from hvtrain.models.dit import Grid
from hvtrain.models.sparse_flex import BLOCK, Blocks
from hvtrain.models.sparse_masks import (
    Pattern,
    Radial,
    RunPairs,
    SlidingTiles,
    kept_note,
    kept_share,
    layout_of,
    pattern_of,
)

# Latent frames, rows and columns of tokens: tiles that divide and tiles that do not,
# frames of one token, one frame
GRIDS = [Grid(4, 6, 8), Grid(5, 7, 3), Grid(17, 1, 1), Grid(9, 2, 1), Grid(1, 5, 9), Grid(12, 2, 3)]


def by_token(layout: RunPairs) -> np.ndarray:
    """[S S]: of tokens in the pattern's order."""
    run = np.repeat(np.arange(len(layout.keep)), layout.sizes)
    return layout.keep[run][:, run]


def places(grid: Grid) -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, grid)))


Three = tuple[int, int, int]


def sees_tile(query: Three, key: Three, grid: Grid, tile: Three, window: Three) -> bool:
    """Sliding tile attention: along each axis the window of tiles begins half a window before the
    query's tile, moved inside."""
    for q, k, n, size, wide in zip(query, key, grid, tile, window, strict=True):
        count = math.ceil(n / size)
        begin = q // size - wide // 2
        while begin + wide > count:
            begin -= 1
        begin = max(begin, 0)
        if not begin <= k // size < begin + wide:
            return False
    return True


WINDOWS = [((2, 2, 2), (1, 3, 3)), ((1, 3, 2), (3, 1, 2)), ((4, 1, 5), (5, 3, 1)), ((1, 1, 1), (2, 4, 3))]


@pytest.mark.parametrize("tile, window", WINDOWS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_are_those_of_the_paper(grid: Grid, tile: Three, window: Three) -> None:
    pattern = SlidingTiles(tile, window)
    order, layout, tokens = pattern.order(grid), pattern.layout(grid), places(grid)
    assert sorted(order) == list(range(len(tokens)))
    seen = [tokens[i] for i in order]
    tile_of = [tuple(p // size for p, size in zip(token, tile, strict=True)) for token in seen]
    assert [len(list(group)) for _, group in itertools.groupby(tile_of)] == list(layout.sizes), (
        "a tile's tokens lie together"
    )
    want = [[sees_tile(q, k, grid, tile, window) for k in seen] for q in seen]
    assert np.array_equal(by_token(layout), want)


def test_at_the_border_a_window_is_as_large() -> None:
    layout = SlidingTiles((1, 2, 2), (3, 3, 1)).layout(Grid(5, 8, 4))
    assert set(layout.keep.sum(1)) == {9}


def sees_radial(query: tuple[int, int], key: tuple[int, int], s: int, width: float) -> bool:
    """Formula 3 of the paper, with the first frame for all."""
    (i, k), (j, n) = query, key
    power = 2 ** math.floor(math.log2(max(abs(i - j), 1)))
    near = power <= width * s and abs(k - n) + 1 <= width * s / power
    diagonal = k == n and abs(i - j) % math.ceil(power / (width * s)) == 0
    return near or diagonal or j == 0


@pytest.mark.parametrize("block, width", [(1, 1.0), (1, 0.3), (1, 2.5), (3, 0.3), (8, 1.0), (1000, 0.1)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_radial_is_that_of_the_paper_in_whole_blocks(grid: Grid, block: int, width: float) -> None:
    layout, s = Radial(block, width).layout(grid), grid.h * grid.w
    tokens = [(i // s, i % s) for i in range(grid.t * s)]
    want = np.array([[sees_radial(q, k, s, width) for k in tokens] for q in tokens])
    for rows in range(0, len(tokens), block):
        for columns in range(0, len(tokens), block):
            part = want[rows : rows + block, columns : columns + block]
            part[:] = part.any()
    assert np.array_equal(by_token(layout), want)
    assert Radial(block, width).order(grid) is None


@pytest.mark.parametrize("pattern", [SlidingTiles((2, 2, 2), (1, 3, 3)), Radial(4, 0.3)], ids=str)
def test_density_counts_pairs_with_text(pattern: Pattern) -> None:
    for grid in GRIDS:
        layout = layout_of(pattern, grid)
        n_txt, n = 5, layout.n_img
        whole = np.ones((n + n_txt, n + n_txt), bool)
        whole[:n, :n] = by_token(layout)
        assert layout.pairs(n_txt) == whole.sum() and layout.density(n_txt) == pytest.approx(whole.mean())
        assert layout.pairs() == by_token(layout).sum() and layout.n_img == math.prod(grid)


def test_densities_of_720p() -> None:
    """117 frames of 768 x 1280: 27 of 300 tiles, as in its paper. Radial's are a figure of
    ours, so that a change shows."""
    grid = Grid(30, 48, 80)
    assert pattern_of(SparseConfig("tiles")).layout(grid).density() == pytest.approx(27 / 300)
    assert pattern_of(SparseConfig("radial")).layout(grid).density() == pytest.approx(0.448, abs=0.001)


@pytest.mark.parametrize("pattern", [SlidingTiles((2, 3, 3), (9, 9, 9)), Radial(2, 1e9)], ids=str)
def test_a_window_over_everything_leaves_nothing_out(pattern: Pattern) -> None:
    assert all(pattern.layout(grid).keep.all() for grid in GRIDS)


@pytest.mark.parametrize("n_txt", [0, 7, 130])
@pytest.mark.parametrize(
    "pattern", [SlidingTiles((2, 5, 6), (1, 3, 1)), Radial(128, 0.01), SlidingTiles((4, 8, 4), (1, 1, 1))],
    ids=str
)
def test_blocks_of_flex_attention(pattern: Pattern, n_txt: int) -> None:
    """Whole where all pairs are kept, passed by where none is; what reaches beyond the tokens is masked."""
    grid = Grid(5, 11, 13)
    blocks, n = Blocks(pattern, grid, n_txt), math.prod(grid)
    kept = np.ones((n + n_txt, n + n_txt), bool)
    kept[:n, :n] = by_token(layout_of(pattern, grid))
    assert np.array_equal(blocks.keep[blocks.run][:, blocks.run], kept)
    for i, j in itertools.product(range(len(blocks.whole)), repeat=2):
        part = kept[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        assert blocks.whole[i, j] == (part.all() and part.shape == (BLOCK, BLOCK))
        assert blocks.some[i, j] == (part.any() and not blocks.whole[i, j])
    assert blocks.density == (blocks.whole | blocks.some).mean() < 1


def test_what_is_said_of_several_sizes() -> None:
    cfg = SparseConfig("tiles", tile=(1, 1, 1), window=(1, 1, 1), exact_layers=1)
    assert kept_share(cfg, Grid(1, 2, 4), 2) == pytest.approx(0.5 + 0.5 / 8)  # of two blocks one is exact
    said = kept_note(cfg, [Grid(1, 2, 4), Grid(1, 1, 2), Grid(1, 1, 2)], 2)
    assert said == "attention is NOT exact: 56.2% to 75.0% of the pairs of video tokens are computed"
    assert "NOT exact: 56.2% of" in kept_note(cfg, [Grid(1, 2, 4)], 2)


def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="sparse.pattern: no pattern 'tile'.*tiles"):
        pattern_of(SparseConfig("tile"))  # type: ignore[arg-type]
