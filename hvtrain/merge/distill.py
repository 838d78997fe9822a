"""The merge trained towards what each LoRA does alone: some hundred steps with the LoRAs as
teachers, inside their own rows.

    loss = mean over noisy clips of || v_merged - v_teacher ||^2;  teacher: base + one LoRA on
    its own captions, base on keep's

Every step noises its clips anew and asks their teachers, for one more forward pass: the pairs learn a few
dozen noisy clips by heart long before they do on others what the teachers do. Only the pairs are trained:
their rows are those of the LoRAs (of a plan: its slots), and no other weight can move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from hvtrain.flow.loss import squared_error
from hvtrain.merge.changes import ByLayer, Changes, LowRank
from hvtrain.merge.journal import Journal
from hvtrain.merge.states import Clips, NoisyClip, Task, batches, told_shares
from hvtrain.merge.stream import placed
from hvtrain.models.dit import ModelInput
from hvtrain.models.load import Identified, load_found
from hvtrain.models.precision import autocast
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from hvtrain.train.muon import MOMENT, Muon

Pairs = Mapping[str, Sequence[LowRank]]
STUDENT = "student"
A_SLICE = 1  # clips of each step for each LoRA, those of old words among them
_WARMUP = 10
_SAVED, _SAVED_S = 25, 60.0  # steps, or seconds, between two notes of where it is
_SAVED_SHARE = 20  # and as many times as long as a note takes


@dataclass(frozen=True)
class Draw:
    """Which states a step takes: each LoRA's in turn, and keep's by its weight."""

    tasks: Sequence[Task]
    seed: int
    new_noise: bool

    def __call__(self, step: int) -> list[tuple[Task, NoisyClip, float]]:
        """Each with what its error counts."""
        own = [t for t in self.tasks if t.teacher is not None]
        kept = [t for t in self.tasks if t.teacher is None]
        whole, n = sum(t.weight for t in self.tasks), A_SLICE * len(own)
        n_kept = round(n * sum(t.weight for t in kept) / whole)
        draw = generator(self.seed, step=step, stream="distill")
        chosen = [(kept[i % len(kept)]) for i in range(n_kept)] if kept else []
        order = torch.randperm(len(own), generator=draw).tolist()
        chosen += [own[order[i % len(own)]] for i in range(n - n_kept)]
        return [(task, self._clip(task, draw), self.scales[task.name]) for task in chosen]

    def _clip(self, task: Task, draw: torch.Generator) -> NoisyClip:
        """Those on which a LoRA does more come up more often; levels of noise likewise."""
        chosen = torch.multinomial(told_shares(task), 1 + self.new_noise, True, generator=draw).tolist()
        clip, level = task.states[chosen[0]], task.states[chosen[-1]].sigma
        return clip.noised(level, draw) if self.new_noise and not clip.sampled else clip

    @cached_property
    def scales(self) -> dict[str, float]:
        """What each task's errors count. A LoRA that changes much is not learnt as well as it must be where
        they count by what it changes (a video shows the error itself), and the weak are lost where they do
        not: by its root. keep's count as their mean."""
        told = {
            t.name: sum(s.told for s in t.states) / len(t.states) for t in self.tasks if t.teacher is not None
        }
        mean = sum(told.values()) / len(told)
        kept = {t.name: 1.0 for t in self.tasks if t.teacher is None}
        return kept | {name: math.sqrt(mean / max(own, 1e-12)) for name, own in told.items()}


@dataclass(frozen=True)
class Polish:
    """How the pairs are trained."""

    steps: int
    lr: float
    batch_size: int


def distill(
    found: Identified, ctx: ParallelContext, dtype: torch.dtype, pairs: Pairs, draw: Draw, clips: Clips,
    teachers: Mapping[Hashable, ByLayer], cfg: Polish, journal: Journal,
) -> dict[str, list[LowRank]]:
    """The trained pairs, on the CPU. Needs the whole model on the device, as training does.
    `teachers`: by Task.teacher, each one's changes. Collective: data-parallel ranks take parts of a step's
    clips, sequence-parallel ones share each. Goes on at the last noted step."""
    loaded = load_found(found, dtype=dtype, device=ctx.device)
    model = loaded.model.eval().requires_grad_(False)
    recompute = "full" if ctx.device.type == "cuda" else "none"
    parallelize(model, ctx, kernel="auto", recompute=recompute, dtype=dtype)
    changes = Changes(model)
    student = _trainable(pairs, ctx)
    for key, own in {**teachers, STUDENT: student}.items():
        changes.put(key, own)
    computing = partial(autocast, ctx.device.type, enabled=dtype != torch.float32)

    def velocities(key: Hashable, states: Sequence[NoisyClip]) -> tuple[ModelInput, Tensor]:
        inp = placed(clips.input(states), ctx.device)
        with computing(), changes.using(key):
            return inp, model(inp)

    weights = [t for own in student.values() for p in own for t in (p.down, p.up)]
    optimizer = Muon(weights, cfg.lr, like_adam=True)
    done = _restore(optimizer, weights, journal)
    began = time.monotonic()
    due = began + _SAVED_S
    for step in range(done, cfg.steps):
        states = draw(step)
        loss, drawn = 0.0, {id(s): (task.teacher, scale) for task, s, scale in states}
        for job in batches([(None, s) for _, s, _ in states], cfg.batch_size)[ctx.dp_rank :: ctx.dp]:
            batch = [s for _, s in job]
            new = [(drawn[id(s)][0], s) for s in batch if not s.taught.numel()]
            _ask(batches(new, cfg.batch_size), velocities)
            wanted = torch.stack([s.taught for s in batch]).to(ctx.device)
            inp, velocity = velocities(STUDENT, batch)
            counts = torch.tensor([drawn[id(s)][1] for s in batch], device=ctx.device)
            error = (squared_error(velocity, wanted, inp.loss_mask) * counts).sum() / len(states)
            error.backward()
            loss += error.item()
        _sum_gradients(weights, ctx)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * _rate(step, cfg.steps)
        optimizer.step()
        optimizer.zero_grad()
        if ctx.is_main and ((step + 1) % _SAVED == 0 or time.monotonic() > due):
            begun = time.monotonic()
            moments = [optimizer.state[w][MOMENT] for w in weights]
            journal.save_steps(step + 1, [*(w.detach() for w in weights), *moments])
            due = time.monotonic() + max(_SAVED_S, _SAVED_SHARE * (time.monotonic() - begun))
        if (step + 1) % 10 == 0 or step + 1 == cfg.steps:
            loss = ctx.all_reduce_sum(loss) / ctx.sp
            left = (time.monotonic() - began) / (step + 1 - done) * (cfg.steps - step - 1)
            if ctx.is_main:
                print(f"distill: step {step + 1}/{cfg.steps}  loss {loss:.5f}  {left:.0f} s left", flush=True)
    return {
        name: [replace(p, down=p.down.detach().cpu(), up=p.up.detach().cpu()) for p in own] for name,
        own in student.items()
    }


def _trainable(pairs: Pairs, ctx: ParallelContext) -> dict[str, list[LowRank]]:
    def copy(value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.detach().to(ctx.device, torch.float32, copy=True))

    return {name: [replace(p, down=copy(p.down), up=copy(p.up)) for p in own] for name, own in pairs.items()}


@torch.no_grad()
def _ask(
    jobs: Sequence[Sequence[tuple[Hashable, NoisyClip]]],
    velocities: Callable[[Hashable, Sequence[NoisyClip]], tuple[ModelInput, Tensor]],
) -> None:
    """Fill in what its teacher says of each clip. `jobs`: (teacher, clip), of one teacher each."""
    for job in jobs:
        _, taught = velocities(job[0][0], [s for _, s in job])
        for (_, state), velocity in zip(job, taught.float().cpu(), strict=True):
            state.taught = velocity


def _restore(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], journal: Journal) -> int:
    """Steps that are done."""
    done, tensors = journal.load_steps()
    n = len(weights)
    for weight, value, moment in zip(weights, tensors[:n], tensors[n:], strict=True) if done else ():
        weight.data.copy_(value)
        optimizer.state[weight][MOMENT] = moment.to(weight.device)
    return done


def _sum_gradients(weights: Sequence[Tensor], ctx: ParallelContext) -> None:
    """Over all ranks. Sequence-parallel peers each hand in their sample's whole loss, so theirs
    are too many by their number."""
    if ctx.world == 1:
        return
    for weight in weights:  # one by one: together they would be there twice
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
        weight.grad = ctx.sum_(grad).div_(ctx.sp)


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 0."""
    warmup = min(_WARMUP, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup))).item())
