"""A merge's streamed passes, traced: its own code on a few noisy clips and one block of each
kind, on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvtrain.fit.merges.feeds import stages_without_values
from hvtrain.fit.trace import TRACED, Ledger, fake_input, kinds_of
from hvtrain.fit.trace import Shape as ClipShape
from hvtrain.merge.changes import LowRank
from hvtrain.merge.fit import Segment, Stream, push, solve_stages, streams, targets_of
from hvtrain.merge.stream import Streamed, n_bytes
from hvtrain.models.dit import ModelInput
from hvtrain.models.load import Identified
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from hvtrain.weights.source import shapes_of

SUMMED = torch.float32  # in which the products of the layers' inputs are taken


class Imagined(Identified):
    """A model's file of which only the shapes are known."""

    @classmethod
    def of(cls, spec: ModelSpec, flavor: Flavor) -> Imagined:
        found = object.__new__(cls)
        with torch.device("meta"):
            shapes = shapes_of(spec.build(flavor.arch))
        for name, value in {"spec": spec, "flavor": flavor, "arch": flavor.arch, "known": shapes}.items():
            object.__setattr__(found, name, value)
        return found

    @property
    def path(self) -> Path:
        return Path(self.flavor.name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.__dict__["known"]

    def read(self, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        return torch.empty(self.shapes[name], dtype=dtype)


@dataclass(frozen=True)
class PairSize:
    """A LoRA's pair of one layer: its rank, and the rows that it changes."""

    rank: int
    begin: int
    end: int
    width: int  # of the layer's input

    @property
    def numbers(self) -> int:
        return self.rank * (self.end - self.begin + self.width)

    def pair(self) -> LowRank:
        return LowRank(
            torch.empty(self.rank, self.width), torch.empty(self.end - self.begin, self.rank), self.begin
        )


@dataclass(frozen=True)
class Cost:
    """Operations."""

    forward: int = 0  # a noisy clip through the model
    fit: int = 0  # all that `fit` does with it beside the sums
    sums: int = 0  # its share in the layers' equations, in float32
    solve: int = 0  # of all equations once, in double precision

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward, self.fit + other.fit, self.sums + other.sums,
            self.solve + other.solve
        )

    def __mul__(self, n: int) -> Cost:
        return Cost(self.forward * n, self.fit * n, self.sums * n, self.solve * n)


@dataclass(frozen=True)
class Streaming:
    """Bytes, and operations a noisy clip."""

    rest: int  # of the weights before and behind the blocks, on the device all the time
    passing: int  # the worst moment of a plain pass on the device, with the rest
    fitting: int  # of fit; 0 where it is not asked for
    state: int  # of a clip between two blocks, on the host
    inputs: int  # of a clip as the model takes it: latents, conditions
    latents: int
    cost: Cost


class StreamLedger(Ledger):
    """Float32 products apart; a number that is read from a tensor is 1."""

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.exact = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            return 1.0
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.flops > before and isinstance(out, Tensor) and out.dtype == SUMMED:
            self.exact += self.flops - before
        return out

    def _follow(self, x: Tensor) -> None:
        if x.device.type != "meta":  # weights that are not read
            super()._follow(x)

    def ops(self, work: Callable[[], object]) -> tuple[int, int]:
        """(in the model's precision, in float32)."""
        flops, exact = self.flops, self.exact
        work()
        return self.flops - flops - (self.exact - exact), self.exact - exact


def trace_streaming(
    spec: ModelSpec, flavor: Flavor, parts: Mapping[str, Sequence[PairSize]], shape: ClipShape,
    ctx: ParallelContext, *, dtype: torch.dtype, fit: bool, rank: Callable[[int], int | None],
) -> Streaming:
    """Inside trace.simulated. `shape`: of a batch of noisy clips; `rank`: that fit leaves of
    added-up ranks, None: matrices."""
    meter, n = StreamLedger(), shape.batch
    with meter:
        model = Streamed(Imagined.of(spec, flavor), ctx, dtype, kernel=TRACED)
        rest, inp = meter.live, fake_input(spec, flavor, shape)
        entering = meter.ops(lambda: model.enter(inp))[0]
        tokens = model.enter(inp)
        state, leaving = n_bytes(tokens), meter.ops(lambda: model.leave(tokens))[0]
        cost, passing, fitting = Cost(entering + leaving, 2 * entering), 0, 0
        for blocks in kinds_of(model.model):
            number = next(i for i, block in enumerate(model.model.blocks) if block is blocks[0])
            targets = _targets(model, number, parts, rank)
            one, plain, solving = _block(model, meter, number, targets, inp, fit=fit and bool(targets))
            cost, passing, fitting = cost + one * len(blocks), max(passing, plain), max(fitting, solving)
    moved = 2 * state  # what comes from the host, and what goes back
    cost = Cost(cost.forward // n, cost.fit // n, cost.sums // n, cost.solve)
    return Streaming(
        rest, rest + passing + moved, rest + fitting + moved if fit else 0, state // n, n_bytes(inp) // n,
        inp.x.nbytes // n, cost
    )


def _targets(
    model: Streamed, number: int, parts: Mapping[str, Sequence[PairSize]], rank: Callable[[int], int | None]
) -> dict[str, list[Segment]]:
    return {n: targets_of([p.pair() for p in parts[n]], rank) for n in model.layers[number] if n in parts}


def _block(
    model: Streamed, meter: StreamLedger, number: int, targets: Mapping[str, list[Segment]], inp: ModelInput,
    *, fit: bool
) -> tuple[Cost, int, int]:
    """Operations of one block; the worst moments beyond what lies there before it, of a pass and of fit."""
    model.changes.put(0, {name: list(found[0].parts[:1]) for name, found in targets.items()})
    (stream,) = streams(model, [(inp, 0, torch.ones(len(inp.t)))], Path())
    before = meter.peak = meter.live
    with model.block(number) as block:
        pushed = sum(meter.ops(lambda: push(model, block, [stream])))
        plain, cost, solving = meter.peak - before, Cost(pushed // 2), 0
        if fit:
            stages = stages_without_values(model, block, list(targets), stream.get(0), 0)
            # what two clips take more than one is a clip's; the rest is there once
            one, two = (_solved(model, meter, block, stages, targets, [stream] * n) for n in (1, 2))
            solving = meter.peak - before
            once = sum(2 * one[i] - two[i] for i in (0, 1)) + sum(
                _decomposed(found) for found in targets.values()
            )
            cost += Cost(0, two[0] - one[0] + pushed, two[1] - one[1], once)
    model.changes.sets.clear()
    return cost, plain, solving


def _solved(
    model: Streamed, meter: StreamLedger, block: nn.Module, stages: Sequence[Sequence[str]],
    targets: Mapping[str, list[Segment]], running: list[Stream],
) -> tuple[int, int]:
    model.changes.sets.pop("student", None)
    return meter.ops(lambda: solve_stages(model, block, stages, targets, running, 1e-3))


def _decomposed(targets: Sequence[Segment]) -> int:
    """Of a layer, what no counter knows: the root of its inputs' sums, and the solution from it."""
    width = targets[0].parts[0].down.shape[1]
    return width**3 // 3 + 2 * width**2 * sum(t.end - t.begin for t in targets)
