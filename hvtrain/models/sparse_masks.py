"""Which pairs of video tokens sparse attention keeps: pure functions of the latent grid.

Video tokens come in runs, and a pair of runs (queries, keys) is kept whole or left out whole. Text is no
part of it: text tokens and all video tokens attend each other fully. Nothing here is exact attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from hvtrain.config import SparseConfig
from hvtrain.models.dit import Grid
from hvtrain.registry import Registry


class RunPairs(NamedTuple):
    """`bounds` [n + 1]: where each run of video tokens begins, and the end; `keep` [n n] bool: queries'
    run x keys' run."""

    bounds: np.ndarray
    keep: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.bounds)

    @property
    def n_img(self) -> int:
        return int(self.bounds[-1])

    def pairs(self, n_txt: int = 0) -> int:
        """Pairs of tokens that are computed, those with text among them."""
        return int(self.sizes @ self.keep.astype(float) @ self.sizes) + (2 * self.n_img + n_txt) * n_txt

    def density(self, n_txt: int = 0) -> float:
        """Of all pairs."""
        return self.pairs(n_txt) / (self.n_img + n_txt) ** 2


class Pattern(Protocol):
    def __hash__(self) -> int: ...

    def order(self, grid: Grid) -> np.ndarray | None:
        """[S]: which token of t, h, w order each place takes; None: that order itself."""
        ...

    def layout(self, grid: Grid) -> RunPairs: ...

    def describe(self) -> str: ...


PATTERNS: Registry[Callable[[SparseConfig], Pattern]] = Registry("pattern", also=("none",))


def pattern_of(cfg: SparseConfig) -> Pattern:
    return PATTERNS.find(cfg.pattern, key="sparse.pattern")(cfg)


@lru_cache(maxsize=64)
def layout_of(pattern: Pattern, grid: Grid) -> RunPairs:
    return pattern.layout(grid)


def kept_share(cfg: SparseConfig, grid: Grid, n_blocks: int) -> float:
    """Of the pairs of video tokens, over all blocks, exact ones among them."""
    exact = min(cfg.exact_layers, n_blocks) / n_blocks
    return exact + (1 - exact) * layout_of(pattern_of(cfg), grid).density()


def kept_note(cfg: SparseConfig, grids: Iterable[Grid], n_blocks: int) -> str:
    """For people: how much of attention is left at these sizes."""
    shares = sorted(kept_share(cfg, grid, n_blocks) for grid in set(grids))
    least, most = f"{shares[0]:.1%}", f"{shares[-1]:.1%}"
    return (
        f"attention is NOT exact: {least if least == most else f'{least} to {most}'} of the pairs of video "
        "tokens are computed"
    )


@dataclass(frozen=True)
class SlidingTiles:
    """Sliding tile attention (arXiv:2502.04507): the video is cut into tiles of [t h w] tokens, and a
    tile's queries attend the window of [t h w] tiles around it; at the border the window stays inside, so
    that all have as many. What does not divide is left to the last tile of an axis. Tokens are put into
    the order of their tiles."""

    tile: tuple[int, int, int]
    window: tuple[int, int, int]

    def order(self, grid: Grid) -> np.ndarray | None:
        return np.argsort(self._number(grid), kind="stable")

    def layout(self, grid: Grid) -> RunPairs:
        counts = [-(-n // tile) for n, tile in zip(grid, self.tile, strict=True)]
        t, h, w = (_near(n, window) for n, window in zip(counts, self.window, strict=True))
        keep = np.einsum("ad,be,cf->abcdef", t, h, w).reshape(math.prod(counts), -1)
        sizes = np.bincount(self._number(grid), minlength=math.prod(counts))
        return RunPairs(np.concatenate([[0], sizes.cumsum()]), keep)

    def _number(self, grid: Grid) -> np.ndarray:
        """[S]: of each token its tile."""
        t, h, w = (np.arange(n) // tile for n, tile in zip(grid, self.tile, strict=True))
        n_h, n_w = -(-grid.h // self.tile[1]), -(-grid.w // self.tile[2])
        return ((t[:, None, None] * n_h + h[:, None]) * n_w + w).ravel()

    def describe(self) -> str:
        return f"tiles {'x'.join(map(str, self.tile))} in windows of {'x'.join(map(str, self.window))}"


def _near(n: int, window: int) -> np.ndarray:
    """[n n] bool: the `window` tiles around each of n along an axis, kept inside."""
    first = np.clip(np.arange(n) - window // 2, 0, max(n - window, 0))[:, None]
    return (np.arange(n) >= first) & (np.arange(n) < first + window)


@dataclass(frozen=True)
class Radial:
    """Radial attention (arXiv:2506.19852, section 4): of frames i and j with s tokens each, token k of the
    one attends token l of the other where |k - l| + 1 <= s / p, p being the largest power of two up to
    max(|i - j|, 1); where s / p < 1, only k = l, and only if ceil(p / s) divides |i - j|; and all attend
    the first frame. `width` multiplies s / p. As in the paper, for the hardware's sake whole blocks are
    computed: a pair of `block` consecutive tokens each is kept if any pair in it is. The order stays t, h,
    w."""

    block: int
    width: float

    def order(self, grid: Grid) -> np.ndarray | None:
        return None

    def layout(self, grid: Grid) -> RunPairs:
        s = grid.h * grid.w
        n = grid.t * s
        edges = np.unique([*range(0, n, self.block), *range(0, n, s), n])
        begin, end = edges[:-1], edges[1:]  # of pieces that lie in one block and one frame
        frame, block = begin // s, begin // self.block
        low, high = begin - frame * s, end - frame * s
        apart = np.maximum(low[None] - high[:, None], low[:, None] - high[None]) + 1
        near = self._kept(np.abs(frame[:, None] - frame), apart.clip(0), s) | (frame == 0)[None]
        # pieces are in the order of their blocks
        firsts = np.searchsorted(block, np.arange(-(-n // self.block)))
        keep = np.logical_or.reduceat(np.logical_or.reduceat(near, firsts, axis=0), firsts, axis=1)
        return RunPairs(np.append(np.arange(len(firsts)) * self.block, n), keep)

    def _kept(self, frames: np.ndarray, apart: np.ndarray, s: int) -> np.ndarray:
        """Of pieces so many frames apart, whose nearest tokens are `apart` from each other within their
        frames."""
        power = 2.0 ** (np.frexp(frames.clip(1))[1] - 1)
        reach = self.width * s / power
        return ((reach >= 1) & (apart + 1 <= reach)) | ((apart == 0) & (frames % np.ceil(1 / reach) == 0))

    def describe(self) -> str:
        return f"radial in blocks of {self.block}" + (
            f", {self.width:g} times as wide" if self.width != 1 else ""
        )


PATTERNS |= {
    "tiles": lambda cfg: SlidingTiles(cfg.tile, cfg.window),
    "radial": lambda cfg: Radial(cfg.block, cfg.width),
}
