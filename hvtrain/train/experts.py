"""Who is computed with: the one DiT of a run, or one of several that share the noise levels.

A run that trains several is several runs in turns. Whose turn it is, is drawn first, by the expert's share
of the noise levels; sigma is then drawn from its own range. Each has an engine of its own, so that no
other's gradients, clipping or moments touch it: its steps are those of a run of its own, at the places of
this run that were drawn for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from hvtrain.models.spec import Expert
from hvtrain.parallel.swap import ModelSwap
from hvtrain.rng import generator
from hvtrain.train.engine import Engine, OptimizerState, States, StepResult
from hvtrain.train.objective import Objective
from hvtrain.train.parts import Piece
from hvtrain.train.setup import Subject, TeamMember

Models = Callable[[float], nn.Module]  # noise level -> the model that predicts there
_GOLDEN = (5**0.5 - 1) / 2


def drawn(shares: Mapping[str, float], *, seed: int, turn: int) -> str:
    """Whose turn it is, the same on every rank. Multiples of the golden ratio fill [0, 1)
    evenly from wherever they begin: each gets its share of every stretch of the run, not only
    of the whole and in expectation."""
    begin = torch.rand((), generator=generator(seed, stream="expert"), dtype=torch.float64).item()
    place = (begin + turn * _GOLDEN) % 1 * sum(shares.values())
    return next(
        (key for key, end in zip(shares, accumulate(shares.values())) if place < end), list(shares)[-1]
    )


@dataclass(frozen=True)
class Trainee:
    """A member with all that training it takes."""

    member: TeamMember
    subject: Subject
    engine: Engine
    objective: Objective  # on its noise levels
    kernel: str = ""  # of its attention


class Team:
    """The engine of a run (see engine.py), which may be several. Names of parameters begin with
    their expert's where there is more than one. `open_idle` loads an expert that is not trained,
    for as long as videos are made."""

    def __init__(
        self, trainees: Mapping[str, Trainee], *, seed: int, turn: int, idle: ModelSwap | None = None,
        open_idle: Callable[[Expert], nn.Module] | None = None,
    ) -> None:
        self.trainees, self.seed, self.turn, self.idle, self.open_idle = trainees, seed, turn, idle, open_idle
        self.shares = {key: one.member.share for key, one in trainees.items()}
        self.prefixes = {key: f"{key}." if len(trainees) > 1 else "" for key in trainees}
        self.n_steps = 0
        self.now = self._enter(next(iter(trainees)))

    def _enter(self, key: str) -> Trainee:
        if self.idle is not None:
            self.idle.enter(key)
        self.now = self.trainees[key]
        self.model = self.now.engine.model
        return self.now

    def at_step(self, step: int) -> Trainee:
        """Whose step this is, counted from 0; `model` and `accumulate` are its own from here on."""
        return self._enter(drawn(self.shares, seed=self.seed, turn=step // self.turn))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the step at hand changes."""
        return self._named({self.now.member.key: self.now.subject.trainable})

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return self._named({key: one.subject.trainable for key, one in self.trainees.items()})

    @contextmanager
    def evaluating(self, beat: Callable[[], None]) -> Iterator[Models]:
        """Who predicts at a noise level, in evaluation mode; `beat` is called whenever that is asked."""
        flavor, others = self.now.subject.flavor, dict[str, nn.Module]()

        def at(sigma: float) -> nn.Module:
            beat()
            expert = flavor.expert(sigma)
            key = expert.name if expert is not None else ""
            if key in self.trainees:
                return self._enter(key).engine.model
            if expert is not None and key not in others:
                assert self.open_idle is not None
                others[key] = self.open_idle(expert)
            return others[key]

        with self.settled():
            for one in self.trainees.values():
                one.engine.model.eval()
            try:
                yield at
            finally:
                for one in self.trainees.values():
                    one.engine.model.train()

    # --- an engine ------------------------------------------------------------------------------------------

    def accumulate(self, loss: Tensor, *, last: bool) -> StepResult | None:
        self.now.engine.n_steps = self.n_steps  # the schedule is the run's
        self.n_steps += last
        return self.now.engine.accumulate(loss, last=last)

    @contextmanager
    def settled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.trainees.values():
                stack.enter_context(one.engine.settled())
            yield

    def export_params(self) -> dict[str, Tensor]:
        return self._named({key: one.engine.export_params() for key, one in self.trainees.items()})

    def export_optimizer(self) -> OptimizerState:
        return self._named({key: one.engine.export_optimizer() for key, one in self.trainees.items()})

    def pieces(self) -> list[Piece]:
        return [
            p._replace(key=self.prefixes[key] + p.key) for key,
            one in self.trainees.items() for p in one.engine.pieces()
        ]

    def load_state(self, params: Mapping[str, Tensor], optimizer: States, *, n_steps: int) -> None:
        for key, one in self.trainees.items():
            if not self.prefixes[key]:  # of parts of a large model, no more is read than the engine asks for
                one.engine.load_state(params, optimizer, n_steps=n_steps)
                continue
            own = {name: self.prefixes[key] + name for name in one.subject.trainable}
            state = {name: optimizer[there] for name, there in own.items() if there in optimizer}
            one.engine.load_state(
                {name: params[there] for name, there in own.items()}, state, n_steps=n_steps
            )
        self.n_steps = n_steps

    def _named(self, of: Mapping[str, Mapping]) -> dict:
        return {
            self.prefixes[key] + name: value for key, values in of.items() for name, value in values.items()
        }
