"""The mathematics of one low-rank pair: what it adds to a weight, and how it is
cut and joined along output rows.

Checkpoints disagree on whether q, k and v are one Linear or three. Cutting a fused pair gives each part
its rows of `up` and the same `down`. Joining parts whose `down` differ has to stack: down [r1+r2+r3,
in] and a block-diagonal up. `LoraPair.parts` remembers such a stack, so that cutting it again gives
back the very tensors that went in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from pathlib import Path

import torch

from hvtrain.errors import CheckpointError

_CHUNK = 2**20  # weight elements taken to float32 at a time: 4 MiB, which stay in the cache


@dataclass(frozen=True)
class LoraPair:
    """up [out, rank] @ down [rank, in], scaled by alpha / rank."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    parts: tuple[int, ...] | None = None  # ranks of a block-diagonal stack, 0 where a part has no adapter
    # [out]: of a DoRA, what length the changed weight's rows are brought to
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> torch.Tensor:  # [out, in], float32
        if self.magnitude is not None:
            raise ValueError("what a DoRA adds depends on the weight")
        return (self.up.float() @ self.down.float()) * self.scale

    def check_shape(self, path: Path | str, name: str, shape: tuple[int, int]) -> None:
        """Raise unless the pair fits a weight of this [out, in]."""
        own = self.shape
        if own != shape:
            raise CheckpointError(
                f"{path}: '{name}' adapts a layer of shape {own[0]}x{own[1]}, this model's is "
                f"{shape[0]}x{shape[1]}: the LoRA was trained on a model of another size"
            )


@torch.no_grad()
def add_pairs(weight: torch.Tensor, pairs: Iterable[tuple[LoraPair, float]]) -> None:
    """weight [out, in] += sum of multiplier * delta, in place: float32 sums, one
    rounding to the weight's dtype.

    In row chunks, so that a big layer costs no float32 copy of itself. A
    multiplier of 0 leaves the weight alone.
    """
    device = weight.device
    factors = []
    for pair, multiplier in pairs:
        whole = pair.up if multiplier != 0.0 else pair.up[:0]
        begin, end = changed_rows(whole)
        if begin < end:  # a slice's `up` is zero outside its rows: they cost nothing
            factor = pair.scale * (multiplier if pair.magnitude is None else 1.0)
            up = whole[begin:end].to(device, torch.float32) * factor
            lengths = None if pair.magnitude is None else pair.magnitude[begin:end].to(device, torch.float32)
            factors.append((begin, end, up, pair.down.to(device, torch.float32), lengths, multiplier))
    edges = sorted({edge for begin, end, *_ in factors for edge in (begin, end)})
    n_rows = max(1, _CHUNK // weight.shape[1])
    scratch = torch.empty(n_rows, weight.shape[1], device=device) if factors else weight
    for first, last in pairwise(edges):
        own = [
            (up[first - begin :], down, None if m is None else m[first - begin :], multiplier)
            for begin, end, up, down, m, multiplier in factors if begin <= first and last <= end
        ]  # fmt: skip
        for start in range(first, last if own else first, n_rows):
            rows = weight[start : min(last, start + n_rows)]
            mine = slice(start - first, start - first + len(rows))
            total = scratch[: len(rows)].copy_(rows)
            for up, down, lengths, multiplier in own:
                if lengths is None:
                    total.addmm_(up[mine], down)
                    continue
                changed = torch.addmm(rows.float(), up[mine], down)
                changed *= lengths[mine, None] / torch.linalg.vector_norm(
                    changed, dim=1, keepdim=True
                ).clamp(min=1e-12)
                total += multiplier * (changed - rows.float())
            rows.copy_(total)


def changed_rows(up: torch.Tensor) -> tuple[int, int]:
    """The range of rows that are not all zero; (0, 0) if there is none."""
    found = torch.nonzero(up.ne(0).any(dim=1)).flatten()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def _take(up: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """These rows; of a whole range without a copy."""
    first, n = int(rows[0]), len(rows)
    whole = int(rows[-1]) - first + 1 == n and bool((rows.diff() == 1).all())
    return up[first : first + n] if whole else up[rows]


def cut_rows(pair: LoraPair, rows: Sequence[torch.Tensor]) -> list[LoraPair | None]:
    """One pair for each set of output rows; None for a part that had no adapter when the pair was joined."""
    n_out = pair.shape[0]
    if len(rows) == 1 and torch.equal(rows[0], torch.arange(n_out)):
        return [replace(pair, parts=None) if pair.parts else pair]
    whole, down, m = pair.up, pair.down, pair.magnitude
    ups = [_take(whole, index) for index in rows]
    ranks = _stacked_ranks(pair, ups)
    lengths = [None if m is None else m[index] for index in rows]
    if ranks is None:
        return [LoraPair(down, up, pair.alpha, magnitude=own) for up, own in zip(ups, lengths, strict=True)]
    cut: list[LoraPair | None] = []
    for i, rank in enumerate(ranks):
        first = sum(ranks[:i])
        mine = slice(first, first + rank)
        up = ups[i][:, mine].contiguous()
        part = LoraPair(down[mine].contiguous(), up, _single(pair.scale * rank), magnitude=lengths[i])
        cut.append(part if rank else None)
    return cut


def _stacked_ranks(pair: LoraPair, ups: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    """The ranks of a block-diagonal `up`, one block for each set of rows: those of `parts`, else equal ones.

    The tensors decide. A stack is also cut in other places than where it was joined (a model that fuses
    q, k and v takes it whole), another tool may have resized it and kept its metadata, or made one
    without any. None: no such stack.
    """
    n = len(ups)
    ranks = pair.parts if pair.parts is not None else (pair.rank // n,) * n if n > 1 else ()
    if len(ranks) != n or sum(ranks) != pair.rank:
        return None
    for i, (up, rank) in enumerate(zip(ups, ranks, strict=True)):
        first = sum(ranks[:i])
        own = torch.count_nonzero(up[:, first : first + rank])
        if own != torch.count_nonzero(up) or (own == 0 and pair.parts is None):
            return None
    return ranks


def join_rows(pairs: Sequence[LoraPair | None], rows: Sequence[torch.Tensor]) -> LoraPair:
    """The inverse: one pair from the parts of its rows. Its `down` stays shared
    where the parts share theirs."""
    present = [pair for pair in pairs if pair is not None]
    first = present[0]
    n_out = sum(len(index) for index in rows)
    dtype = reduce(torch.promote_types, (pair.up.dtype for pair in present))
    lengths = _joined_lengths(pairs, rows, n_out)
    if all(p is not None and p.alpha == first.alpha and torch.equal(p.down, first.down) for p in pairs):
        up = first.up.new_empty(n_out, first.rank, dtype=dtype)
        for index, pair in zip(rows, present, strict=True):
            up[index] = pair.up.to(dtype)
        return LoraPair(first.down, up, first.alpha, magnitude=lengths)
    ranks = tuple(0 if pair is None else pair.rank for pair in pairs)
    # One alpha for all: differing scales move into `up`, which is float32 then, so
    # that they round nothing away.
    scale = next((part.scale for part in present if part.scale), 1.0)
    equal = all(math.isclose(part.scale, scale, rel_tol=1e-12) for part in present)
    up = first.up.new_zeros(n_out, sum(ranks), dtype=dtype if equal else torch.float32)
    for i, (index, part) in enumerate(zip(rows, pairs, strict=True)):
        if part is not None:
            block = part.up if equal else part.up.float() * (part.scale / scale)
            up[index, sum(ranks[:i]) : sum(ranks[: i + 1])] = block.to(up.dtype)
    return LoraPair(torch.cat([p.down for p in present]), up, _single(scale * sum(ranks)), ranks, lengths)


def _joined_lengths(
    pairs: Sequence[LoraPair | None], rows: Sequence[torch.Tensor], n_out: int
) -> torch.Tensor | None:
    """Raises ValueError where some rows are to have a length and others just something added."""
    held = [None if pair is None else pair.magnitude for pair in pairs]
    if all(lengths is None for lengths in held):
        return None
    if any(lengths is None for lengths in held):
        raise ValueError(
            "is a DoRA in a part of a layer only; merge it into a model whose layers are apart as in the file"
        )
    whole = torch.empty(n_out)
    for index, lengths in zip(rows, held, strict=True):
        whole[index] = lengths.float()  # type: ignore[union-attr]
    return whole


def fold_alpha(pair: LoraPair) -> LoraPair:
    """The same delta with a scale of 1. Exact, and exactly undone, where the scale is a power of two."""
    if pair.scale == 1.0:
        return pair
    return replace(pair, up=pair.up * pair.scale, alpha=float(pair.rank))


def unfold_alpha(pair: LoraPair, alpha: float) -> LoraPair:
    """Undo `fold_alpha` of a pair that had this alpha."""
    return replace(pair, up=pair.up / (alpha / pair.rank), alpha=alpha)


def _single(alpha: float) -> float:
    """Rounded to float32, as files hold it: going there and back then ends where it began."""
    return torch.tensor(alpha, dtype=torch.float32).item()
