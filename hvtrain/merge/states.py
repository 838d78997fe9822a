"""What a merge is reconciled by: noisy clips of each LoRA's own data, with the caption
and how far from done they are.

A set gives the clips as its data (`states_of`), or only the captions, and the LoRA itself samples the clips
(`own_states`). Part of them is held out: the merge is made from the others, and measured on these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hvtrain.flow.loss import add_noise, squared_error
from hvtrain.flow.schedule import sigmas
from hvtrain.models.conditions import batch_of_one
from hvtrain.models.dit import ModelInput
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.rng import generator
from shards import ShardSet
from shards.collate import choose_caption
from shards.reader import Sample


@dataclass
class NoisyClip:
    """One noisy clip; what the teacher says of it is filled in by `measure`."""

    x: Tensor  # [C T H W] float32
    clean: Tensor  # the same without noise
    sigma: float
    cond: Mapping[str, Tensor]  # a batch of one
    taught: Tensor = field(default_factory=lambda: torch.empty(0))  # velocity by the teacher
    told: float = 0.0  # mean square of what the teacher changes
    size: float = 0.0  # of the base's velocity itself
    sampled: bool = False  # x is the teacher's own: clean has nothing to do with it

    @property
    def form(self) -> tuple:
        """States of equal form make a batch without padding."""
        lengths = {
            n: tuple(v.tolist()) if n.endswith("_len") else tuple(v.shape) for n, v in self.cond.items()
        }
        return (tuple(self.x.shape), *sorted(lengths.items()))

    def noised(self, sigma: float, noise: torch.Generator) -> NoisyClip:
        """The clip with other noise, of which no teacher has said anything yet."""
        clean = self.clean[None]
        x = add_noise(clean, torch.randn(clean.shape, generator=noise), torch.tensor([sigma]))[0]
        return replace(self, x=x, sigma=sigma, taught=torch.empty(0))


@dataclass
class Task:
    """One teacher's (or the base's) behaviour on one set."""

    name: str
    teacher: Hashable  # its set of changes; None: the base, whose words are to be kept
    weight: float
    states: list[NoisyClip]
    held: list[NoisyClip]


LEAK_CLIPS = 2  # of each set, on which every LoRA is looked at
OWN_STEPS = 10  # Euler steps of a sampled clip
SILENT = 0.05  # of what a LoRA changes at most: where it changes less there is nothing of it to keep
# Streamed.velocities
Forward = Callable[[Sequence[tuple[ModelInput, Sequence[Hashable]]]], list[list[Tensor]]]


@dataclass(frozen=True)
class Clips:
    """How states are made of samples."""

    spec: ModelSpec
    flavor: Flavor
    n: int
    n_held: int
    seed: int
    levels: tuple[float, float] = (0.0, 1.0)  # of noise: an expert's own, of a model of several

    def input(self, states: Sequence[NoisyClip]) -> ModelInput:
        """States of one form as a batch."""
        cond = {name: torch.cat([s.cond[name] for s in states]) for name in states[0].cond}
        sigma = torch.tensor([s.sigma for s in states], dtype=torch.float32)
        x, x0 = torch.stack([s.x for s in states]), torch.stack([s.clean for s in states])
        task, guidance = self.flavor.tasks[0], self.flavor.defaults.guidance
        return self.spec.make_input(x, sigma, cond, task=task, guidance=guidance, x0=x0)

    def states_of(self, sets: Sequence[ShardSet], name: str, n: int | None = None) -> tuple[
        list[NoisyClip], list[NoisyClip]
    ]:
        """(to merge by, held out): clips spread over the sets, noised at levels spread over the
        sampling schedule. A clip is taken again, with other noise, only where there are too few;
        held-out ones are never used for both."""
        chosen, held = self._chosen(sets, n or self.n)
        return (
            self._noised(chosen, f"{name}/fit", n or self.n), self._noised(held, f"{name}/held", self.n_held)
        )

    def _chosen(self, sets: Sequence[ShardSet], n: int) -> tuple[list[Sample], list[Sample]]:
        places = [(found, index) for found in sets for index in range(len(found))]
        n_held = min(self.n_held, max(1, len(places) // 4))
        held = {round((i + 0.5) * len(places) / n_held - 0.5) for i in range(n_held)}
        rest = [place for i, place in enumerate(places) if i not in held] or places
        n = min(n, len(rest))
        used = [rest[int((i + 0.5) * len(rest) / n)] for i in range(n)]
        columns = self.flavor.columns
        read = [
            [found.get(i, columns) for found, i in part] for part in (used, [places[i] for i in sorted(held)])
        ]
        return read[0], read[1]

    def _noised(self, samples: Sequence[Sample], stream: str, n: int) -> list[NoisyClip]:
        levels = torch.arange(n, dtype=torch.float64).add(0.5).div(n)
        levels = levels[torch.randperm(n, generator=generator(self.seed, stream=f"levels/{stream}"))]
        shift = self.flavor.defaults.shift
        low, high = (sigma / (shift - (shift - 1) * sigma) for sigma in self.levels)  # before the shift
        found = []
        for number, share in enumerate(levels.tolist()):
            cond = _conditions(samples[number % len(samples)], self.flavor)
            x0, u = cond.pop("latents"), low + (high - low) * share
            sigma = shift * u / (1 + (shift - 1) * u)
            noise = torch.randn(
                x0.shape, generator=generator(self.seed, step=number, stream=f"noise/{stream}")
            )
            found.append(NoisyClip(add_noise(x0, noise, torch.tensor([sigma]))[0], x0[0], sigma, cond))
        return found

    def own_states(
        self, forward: Forward, tasks: Sequence[Task], batch_size: int, *, steps: int = OWN_STEPS
    ) -> None:
        """Replace the tasks' clips by what their own teachers make of the captions: a place of a trajectory
        each, of Euler steps from noise. All teachers' clips go through the model together."""
        every = [
            (task, s, kind, i) for task in tasks for kind in ("states", "held") for i,
            s in enumerate(getattr(task, kind))
        ]
        schedule = sigmas(steps, shift=self.flavor.defaults.shift).tolist()
        moving = []
        for task, state, kind, number in every:
            draw = generator(self.seed, step=number, stream=f"own/{task.name}/{kind}")
            stop = int(torch.randint(steps, (1,), generator=draw))
            moving.append(
                (task, state, replace(state, x=torch.randn(state.x.shape, generator=draw), sigma=1.0), stop)
            )
        for number, (here, there) in enumerate(pairwise(schedule)):
            left = [entry for entry in moving if entry[3] > number]
            jobs = batches([(task.teacher, now) for task, _, now, _ in left], batch_size)
            results = forward([(self.input([now for _, now in job]), [job[0][0]]) for job in jobs])
            for job, (velocity,) in zip(jobs, results, strict=True):
                for (_, now), v in zip(job, velocity, strict=True):
                    now.x, now.sigma = now.x + (there - here) * v, there
        for _, state, now, _ in moving:
            state.x, state.sigma, state.sampled = now.x, now.sigma, True


def _conditions(sample: Sample, flavor: Flavor) -> dict[str, Tensor]:
    """A batch of one as training makes it: "latents" [1 C T H W] and conditions, floats in float32."""
    one = batch_of_one(choose_caption(sample, seed=0, epoch=0, index=0).tensors, flavor.cond)
    return {name: v.float() if v.is_floating_point() else v for name, v in one.items()}


def batches(entries: Sequence[tuple[Any, NoisyClip]], size: int) -> list[list[tuple[Any, NoisyClip]]]:
    """Entries (key, state) in batches of one key and one form."""
    groups: dict[tuple, list[tuple[Any, NoisyClip]]] = defaultdict(list)
    for key, state in entries:
        groups[(key, state.form)].append((key, state))
    return [own[i : i + size] for own in groups.values() for i in range(0, len(own), size)]


def measure(clips: Clips, forward: Forward, tasks: Sequence[Task], batch_size: int) -> None:
    """Fill in what the teacher and the base say of every state."""
    every = [(task.teacher, s) for task in tasks for s in (*task.states, *task.held)]
    jobs = batches(every, batch_size)
    keys = [(None,) if job[0][0] is None else (None, job[0][0]) for job in jobs]
    inputs = [clips.input([s for _, s in job]) for job in jobs]
    results = forward(list(zip(inputs, keys, strict=True)))
    for job, inp, (plain, *others) in zip(jobs, inputs, results, strict=True):
        taught = others[0] if others else plain
        told = squared_error(taught, plain, inp.loss_mask).tolist()
        sizes = squared_error(plain, torch.zeros_like(plain), inp.loss_mask).tolist()
        for (_, state), velocity, change, size in zip(job, taught, told, sizes, strict=True):
            state.taught, state.told, state.size = velocity, change, size
    for task in tasks:
        most = max(s.told for s in task.states)
        task.states = [s for s in task.states if task.teacher is None or s.told >= SILENT * most]


def fidelity(
    clips: Clips, forward: Forward, tasks: Sequence[Task], key: Hashable, batch_size: int
) -> dict[str, float]:
    """Of each task, on its held-out states: squared distance of the velocity from the teacher's over the
    base's, so 0 is as the LoRA alone and 1 as if it were not there. A state counts by what its teacher
    changes there, as one to merge by: a LoRA's small change of clips from which it learnt nothing need not
    be kept. Of the base's own words: over the base's velocity, so 0 is unchanged."""
    shares = [(task.held, told_shares(task, task.held).tolist()) for task in tasks]
    counts = {id(s): count for held, own in shares for s, count in zip(held, own, strict=True)}
    jobs = batches([(task.name, s) for task in tasks for s in task.held], batch_size)
    inputs = [clips.input([s for _, s in job]) for job in jobs]
    away: dict[Hashable, float] = defaultdict(float)
    for job, inp, (velocity,) in zip(jobs, inputs, forward([(inp, (key,)) for inp in inputs]), strict=True):
        errors = squared_error(velocity, torch.stack([s.taught for _, s in job]), inp.loss_mask)
        for (name, state), error in zip(job, errors.tolist(), strict=True):
            away[name] += counts[id(state)] * error
    scale = {
        task.name: sum(counts[id(s)] * (s.size if task.teacher is None else s.told) for s in task.held)
        for task in tasks
    }
    return {task.name: away[task.name] / max(scale[task.name], 1e-12) for task in tasks}


def leak(
    clips: Clips, forward: Forward, tasks: Sequence[Task], n: int = LEAK_CLIPS
) -> dict[str, dict[str, float]]:
    """Of each task, how strongly every other LoRA changes its clips, as a share of what its own does: 0 is
    silence. The reason why LoRAs do not add up."""
    own = [task for task in tasks if task.teacher is not None]
    teachers = list(dict.fromkeys(task.teacher for task in own))
    jobs = batches([(task.name, s) for task in own for s in task.held[:n]], 1)
    inputs = [clips.input([s for _, s in job]) for job in jobs]
    found: dict[str, dict[str, float]] = {
        task.name: dict.fromkeys((t.name for t in own), 0.0) for task in own
    }
    told: dict[str, float] = defaultdict(float)
    results = forward([(inp, (None, *teachers)) for inp in inputs])
    for job, inp, (plain, *others) in zip(jobs, inputs, results, strict=True):
        name, state = job[0]
        told[name] += state.told
        for teacher, velocity in zip(teachers, others, strict=True):
            for task in (t for t in own if t.teacher == teacher):
                found[name][task.name] += squared_error(velocity, plain, inp.loss_mask).item()
    return {
        name: {other: v / max(told[name], 1e-12) for other, v in row.items()} for name, row in found.items()
    }


def spread(tasks: Sequence[Task]) -> Iterator[tuple[Task, NoisyClip, float]]:
    """Every state to merge by, with what it counts: a task's weight, shared out by how much its teacher
    changes there. Clips that a slice was trained with but learnt nothing of (old words among its own
    data) then count for little."""
    for task in tasks:
        for state, share in zip(task.states, told_shares(task).tolist(), strict=True):
            yield task, state, task.weight * share


def told_shares(task: Task, states: Sequence[NoisyClip] | None = None) -> Tensor:
    """[n], together 1: of a LoRA's states (those to merge by, unless others of it are given) by how much it
    changes there; of the base's all alike."""
    own = task.states if states is None else states
    told = torch.tensor([1.0 if task.teacher is None else max(s.told, 1e-12) for s in own])
    return told / told.sum()
