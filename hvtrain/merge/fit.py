"""Least squares, layer after layer: what each layer must add so that the merged
model's outputs are the teachers'.

Of a layer with weight W [out, in], with X_T its inputs [n, in] in a teacher's own run (the base and one
LoRA), dW that LoRA's change and X_S the inputs for the same noisy clips in the merged model, whose
earlier layers are solved already:

    D = argmin  sum_t w_t || X_S (W + D)' - X_T (W + dW)' ||^2  +  e || D - P ||^2
      = (C + e P) (G + e)^-1,   G = sum_t w_t X_S' X_S,   C = sum_t w_t (X_T (W + dW)' - X_S W')' X_S

over noisy clips t of all teachers, e = ridge x mean of G's diagonal, P the LoRAs' sum: what no clip speaks of
is added up, one LoRA alone comes back exactly, and so do several that read different inputs. RegMean (arXiv
2212.09849) takes both inputs from the teachers; taking the merged model's own (IterIS, arXiv 2411.15231) and
the teacher's *output* is what repairs the drift of the layers before. Every output row is a regression of its
own: rows that no LoRA owns are left out, and stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from hvtrain.lorafiles.lowrank import factor, shrink
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge.changes import Change, Full, LowRank
from hvtrain.merge.stream import OnDisk, Streamed, n_bytes, placed
from hvtrain.models.dit import ModelInput, Tokens

STUDENT = "student"


@dataclass
class Stream:
    """Noisy clips of one teacher on their way through the blocks: in the teacher's own
    run, and in the merged model's."""

    teacher: Hashable  # its set of changes
    weights: Tensor  # [B] of each clip
    states: list[Tokens | OnDisk]  # taught, merged
    n_bytes: int
    folder: Path | None  # where they lie; None: in memory

    def get(self, which: int) -> Tokens:
        state = self.states[which]
        return state.read() if isinstance(state, OnDisk) else state

    def put(self, which: int, tokens: Tokens) -> None:
        self.states[which] = (
            tokens if self.folder is None else OnDisk(self.folder / f"{which}.safetensors", tokens)
        )


TAUGHT, MERGED = 0, 1


@dataclass(frozen=True)
class Segment:
    """Rows of a layer to solve, the LoRAs that change all of them, and the rank that is
    kept (None: the whole matrix)."""

    begin: int
    end: int
    parts: tuple[LowRank, ...]
    rank: int | None

    def prior(self) -> Tensor:
        """P [rows, in]."""
        own = [p.up[self.begin - p.begin : self.end - p.begin] @ p.down for p in self.parts]
        return torch.stack(own).sum(0)

    @property
    def owner(self) -> str:
        return self.parts[0].owner if len(self.parts) == 1 else ""


def targets_of(parts: Sequence[LowRank], rank: Callable[[int], int | None]) -> list[Segment]:
    """The rows that LoRAs change, cut where one begins or ends: what a slice owns stays its
    own. `rank`: from ranks' sum."""
    edges = sorted({edge for p in parts for edge in (p.begin, p.begin + len(p.up))})
    found = []
    for begin, end in pairwise(edges):
        own = tuple(p for p in parts if p.begin <= begin and end <= p.begin + len(p.up))
        if own:
            found.append(Segment(begin, end, own, rank(sum(len(p.down) for p in own))))
    return found


def streams(
    model: Streamed, inputs: Sequence[tuple[ModelInput, Hashable, Tensor]], folder: Path
) -> list[Stream]:
    """This rank's part of the (input, teacher, weights [B]), before the first block. What the host's share
    does not hold lies in `folder`."""
    found, size = [], 0
    for number, (inp, teacher, weights) in enumerate(model.ctx.share(inputs)):
        tokens = model.enter(inp)
        own = 2 * n_bytes(tokens)
        size += own
        place = folder / f"{model.ctx.rank}-{number:05d}" if size > model.host_bytes else None
        stream = Stream(teacher, weights, [tokens, tokens], own, place)
        for which in (TAUGHT, MERGED):
            stream.put(which, tokens)
        found.append(stream)
    return found


def fit_block(
    model: Streamed, block: nn.Module, targets: Mapping[str, Sequence[Segment]], found: Sequence[Stream],
    ridge: float
) -> dict[str, list[Change]]:
    """Solve a block's layers, those that do not feed one another together. The student's set has them
    afterwards. Collective: each rank sums over its streams, and all solve the same equations."""
    order = stages(model, block, list(targets), found[0].get(MERGED)) if model.ctx.is_main else []
    # another rank may have no stream to look at
    order, model.n_calls = model.ctx.gather_objects((order, model.n_calls))[0]
    return solve_stages(model, block, order, targets, found, ridge)


def solve_stages(
    model: Streamed, block: nn.Module, order: Sequence[Sequence[str]],
    targets: Mapping[str, Sequence[Segment]], found: Sequence[Stream], ridge: float,
) -> dict[str, list[Change]]:
    solved: dict[str, list[Change]] = {}
    for stage in order:
        layers = {
            name: _Sums(model.model.get_submodule(name), targets[name], model.ctx.device) for name in stage
        }
        for stream in found:
            wanted = _watched(model, block, stage, stream.get(TAUGHT), stream.teacher)
            seen = _watched(model, block, stage, stream.get(MERGED), STUDENT)
            for name, sums in layers.items():
                sums.add(seen[name], wanted[name], stream.weights.to(model.ctx.device))
        for name in stage:
            sums = layers.pop(name)
            for part in (sums.g, sums.c):
                model.ctx.sum_(part)
            solved[name] = sums.solve(targets[name], ridge)
            model.changes.put(STUDENT, {name: solved[name]})
    return solved


def device_bytes(model: Streamed, layers: Mapping[str, Sequence[object]]) -> int:
    """The most that a block takes beside one clip's activations: its weights, G and C of its layers, and of
    the largest of them G's root and the solution; all in double precision."""
    most = 0
    for block, names in zip(model.model.blocks, model.layers, strict=True):
        shapes = [model.model.get_parameter(f"{name}.weight").shape for name in names if name in layers]
        sums = [width * (width + out) for out, width in shapes]
        weights = sum(p.numel() for p in block.parameters()) * model.dtype.itemsize
        most = max(most, weights + 8 * (sum(sums) + max(sums, default=0)))
    return most


def push(model: Streamed, block: nn.Module, found: Sequence[Stream]) -> None:
    """All streams through a solved block."""
    for stream in found:
        stream.put(TAUGHT, model.step(block, stream.get(TAUGHT), stream.teacher))
        stream.put(MERGED, model.step(block, stream.get(MERGED), STUDENT))


class _Sums:
    """G and C of one layer, on the device: products in float32, their sums in double precision, or the
    solution would depend on the order of the clips, and so on the number of ranks."""

    def __init__(self, layer: nn.Module, targets: Sequence[Segment], device: torch.device) -> None:
        width = targets[0].parts[0].down.shape[1]
        self.rows = slice(targets[0].begin, targets[-1].end)
        self.g = torch.zeros(width, width, device=device, dtype=torch.float64)
        self.c = torch.zeros(self.rows.stop - self.rows.start, width, device=device, dtype=torch.float64)

    def add(self, seen: list[_Call], wanted: list[_Call], weights: Tensor) -> None:
        """`seen`: in the merged model, where this layer has no change yet, so its output is X_S W'."""
        for mine, theirs in zip(seen, wanted, strict=True):
            # tokens of a clip: each clip counts once, whatever its size
            n = mine.x[..., 0].numel() // len(weights)
            root = (weights / n).sqrt().view(-1, *[1] * (mine.x.ndim - 1))
            x = (mine.x.float() * root).flatten(0, -2)
            error = ((theirs.out - mine.out)[..., self.rows].float() * root).flatten(0, -2)
            self.g += x.T @ x
            self.c += error.T @ x

    def solve(self, targets: Sequence[Segment], ridge: float) -> list[Change]:
        g = self.g
        shift = ridge * g.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        g.diagonal().add_(shift)
        root = torch.linalg.cholesky(g)
        solved: list[Change] = []
        for target in targets:
            c = self.c[target.begin - self.rows.start : target.end - self.rows.start]
            matrix = torch.cholesky_solve((c + shift * target.prior().to(c)).T, root).T.float()
            solved.append(
                Full(matrix.cpu, target.begin) if target.rank is None else _cut(matrix, root.float(), target)
            )
        return solved


def _cut(matrix: Tensor, root: Tensor, target: Segment) -> LowRank:
    """The best of this rank for the outputs: what G's inputs (root root' = G) make of it, not
    the matrix itself, is kept."""
    rank = min(target.rank or 0, *matrix.shape)
    basis = torch.linalg.qr(factor(matrix @ root, rank=rank).pair.up).Q  # [rows, rank]
    pair = shrink([(LoraPair(basis.T @ matrix, basis, float(rank)), 1.0)], rank=rank).pair
    return LowRank(pair.down.cpu(), pair.up.cpu(), target.begin, target.owner)


# --- looking into a block -----------------------------------------------------------------------------------


@dataclass
class _Call:
    x: Tensor
    out: Tensor


class _Enough(Exception):
    """All that was asked for has been seen."""


def _watched(
    model: Streamed, block: nn.Module, layers: Sequence[str], tokens: Tokens, key: Hashable, stop: bool = True
) -> dict[str, list[_Call]]:
    """Inputs and outputs of layers in one pass through the block, which ends when all are seen."""
    with _watching(model, layers, stop=stop) as calls:
        try:
            with model.computing(), model.changes.using(key):
                block(placed(tokens, model.ctx.device))
        except _Enough:
            pass
    return calls


@contextmanager
def _watching(model: Streamed, layers: Sequence[str], *, stop: bool) -> Iterator[dict[str, list[_Call]]]:
    calls: dict[str, list[_Call]] = {name: [] for name in layers}

    def watch(name: str):
        def see(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            calls[name].append(_Call(args[0], out))
            if stop and all(len(calls[n]) == model.n_calls.get(n, 1) for n in calls):
                raise _Enough

        return see

    handles = [model.model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def stages(model: Streamed, block: nn.Module, layers: Sequence[str], tokens: Tokens) -> list[list[str]]:
    """The layers in groups that can be solved together: none of a group reads what another of it writes.

    Found out by changing each layer's output and looking whose input moves: no architecture has to say.
    """
    plain = _watched(model, block, layers, tokens, STUDENT, stop=False)
    order = [name for name in layers if plain[name]]
    model.n_calls.update({name: len(plain[name]) for name in order})
    fed: dict[str, list[str]] = {}
    for name in order:
        handle = model.model.get_submodule(name).register_forward_hook(lambda m, a, out: out * 1.5 + 1)
        try:
            moved = _watched(model, block, order, tokens, STUDENT, stop=False)
        finally:
            handle.remove()
        fed[name] = [
            other for other in order
            if other != name
            and any(not torch.equal(a.x, b.x) for a, b in zip(plain[other], moved[other], strict=True))
        ]
    return levels(order, fed)


def levels(order: Sequence[str], fed: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Layers in groups, none of which feeds another of its group. `fed`: by each, directly or not."""
    level = dict.fromkeys(order, 0)
    for _ in order:  # as long as the longest chain
        for name in order:
            for other in fed[name]:
                level[other] = max(level[other], level[name] + 1)
    return [[n for n in order if level[n] == depth] for depth in sorted(set(level.values()))]
