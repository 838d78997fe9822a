"""How a video is integrated from noise along the velocity, a step at a time.

What a multistep method remembers lies in its State, as tensors like x: a sampling that was
stopped between two steps goes on from a file and ends with the same values. With x = (1 - sigma)
x0 + sigma eps the literature's alpha is 1 - sigma, its half log-SNR lambda = log(alpha / sigma),
and its data prediction m = x - sigma v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvtrain.flow.schedule import sigmas
from hvtrain.registry import Registry

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B ...], sigma [B] float32) -> d x / d sigma


@dataclass(frozen=True)
class State:
    """Between two steps: all that is needed to go on."""

    x: Tensor  # [B ...] float32
    step: int = 0  # so many are done
    history: tuple[Tensor, ...] = ()  # each like x; what they are is the solver's


Formula = Callable[[Callable[[float], Tensor], State, list[float]], State]


@dataclass(frozen=True)
class Solver:
    """`formula(velocity at x, state, sigmas so far and the next)` is the state one step further."""

    formula: Formula
    first: float = 1.0  # the noisiest level of its schedule, before the shift
    whole: bool = False  # the model is told t = 1000 sigma rounded down, as its authors' solvers do

    def schedule(self, steps: int, *, shift: float) -> Tensor:
        """[steps + 1] float64, falling to 0."""
        return sigmas(steps, shift=shift, first=self.first)

    def step(self, velocity: Velocity, state: State, schedule: Tensor) -> State:
        """From sigma number `state.step` of the schedule (falling, float64) to the
        next. One call of the velocity."""
        levels = schedule[: state.step + 2].tolist()

        def at(sigma: float) -> Tensor:
            told = math.floor(1000 * sigma) / 1000 if self.whole else sigma
            return velocity(state.x, torch.full((len(state.x),), told, device=state.x.device)).float()

        return self.formula(at, state, levels)


def solve(solver: Solver, velocity: Velocity, x: Tensor, schedule: Tensor) -> Tensor:
    """All steps: x [B ...] float32 at the schedule's first sigma -> at its last."""
    state = State(x)
    while state.step < len(schedule) - 1:
        state = solver.step(velocity, state, schedule)
    return state.x


def euler(velocity: Callable[[float], Tensor], state: State, levels: list[float]) -> State:
    """Straight on."""
    here, there = levels[-2:]
    return State(state.x + (there - here) * velocity(here), state.step + 1)


def dpm_solver_2m(velocity: Callable[[float], Tensor], state: State, levels: list[float]) -> State:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: exact for the linear part, the data prediction m
    extrapolated from two. The first step, and one to sigma 0, take one. history: m of the step before."""
    m = state.x - levels[-2] * velocity(levels[-2])
    return State(_predict(state.x, m, state.history[:1], levels), state.step + 1, (m,))


def unipc(velocity: Callable[[float], Tensor], state: State, levels: list[float]) -> State:
    """UniPC of order 2, arXiv 2302.04867, with B(h) = e^h - 1 ("bh2"): the new m first corrects the
    step that led to it, then predicts the next, as 2M does. history: the corrected x of the step
    before, its m, the m before that."""
    m, x = state.x - levels[-2] * velocity(levels[-2]), state.x
    if state.history:
        start, *known = state.history
        x = _correct(start, m, known, levels[:-1])
    return State(_predict(x, m, state.history[1:2], levels), state.step + 1, (x, m, *state.history[1:2]))


def _predict(x: Tensor, m: Tensor, before: tuple[Tensor, ...], levels: list[float]) -> Tensor:
    """One exponential step from levels[-2] to levels[-1]. m: prediction at x; `before`: the
    one a level earlier, if any."""
    here, there = levels[-2:]
    if before and there > 0:
        ratio = (_lambda(here) - _lambda(levels[-3])) / (_lambda(there) - _lambda(here))
        m = m + (m - before[0]) / (2 * ratio)
    return there / here * x + _gain(here, there) * m


def _correct(start: Tensor, m: Tensor, known: list[Tensor], levels: list[float]) -> Tensor:
    """The step from `start` at levels[-2] to levels[-1] once more, knowing m at its end. known: the m at its
    beginning, and the one a level earlier, if any."""
    here, there = levels[-2:]
    change, end = known[0], 0.5
    if len(known) > 1:
        h = _lambda(there) - _lambda(here)
        # negative; -inf where the first level is pure noise
        ratio = (_lambda(levels[-3]) - _lambda(here)) / h
        first = 1 / -math.expm1(-h) - 1 / h  # the two conditions of order 2, solved for both weights
        second = 1 / -math.expm1(-h) - 2 / h * first
        weight = (second - first) / (ratio - 1)
        change, end = change + weight / ratio * (known[1] - known[0]), first - weight
    return there / here * start + _gain(here, there) * (change + end * (m - known[0]))


def _gain(here: float, there: float) -> float:
    """-alpha (e^-h - 1) without its infinities: how much of m a step from one sigma to another takes in."""
    return (1 - there) - (1 - here) * there / here


def _lambda(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


SOLVERS = Registry("solver", {
    "euler": Solver(euler),
    "unipc": Solver(unipc, first=0.999, whole=True),
    "dpm++": Solver(dpm_solver_2m, whole=True),
})
