"""What a merge that reconciles will need of host, disk and device, and what it costs:
hvtrain/merge/reconcile.py, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hvtrain.config import (
    AdapterConfig,
    ModelConfig,
    ParallelConfig,
    ReconcileConfig,
    RunSettings,
    ZeroConfig,
)
from hvtrain.fit.estimate import Candidate, Training, empty_model, of_training
from hvtrain.fit.memory import Budget
from hvtrain.fit.merges.streaming import PairSize, Streaming, trace_streaming
from hvtrain.fit.trace import Shape, byte_counts, fake_input, simulated, trace_step
from hvtrain.merge.changes import Changes
from hvtrain.merge.distill import A_SLICE
from hvtrain.merge.fit import STUDENT, targets_of
from hvtrain.merge.states import LEAK_CLIPS, OWN_STEPS

_FP32 = 4


@dataclass(frozen=True)
class Merge:
    """What decides what a merge takes."""

    about: Candidate
    parts: Mapping[str, Sequence[PairSize]]  # of the LoRAs, by layer
    n_loras: int
    n_sets: int  # of noisy clips: a LoRA that is a merge itself has several
    reconcile: ReconcileConfig
    keep: bool
    whole: bool = False  # `fit` alone leaves matrices, not pairs
    rank: int | None = None  # that pairs are cut to
    dtype: torch.dtype = torch.bfloat16
    file_bytes: int = 0  # of the LoRAs' tensors, as read

    @property
    def fits(self) -> bool:
        return self.reconcile.how in ("fit", "fit+distill")

    @property
    def distills(self) -> bool:
        return self.reconcile.how in ("distill", "fit+distill")

    @property
    def n_states(self) -> int:
        """Noisy clips that it is made from."""
        states = self.reconcile.states * self.n_sets
        return states + (max(1, states // 4) if self.keep else 0)

    @property
    def n_held(self) -> int:
        return self.reconcile.held_out * (self.n_sets + self.keep)

    def rank_of(self, added: int) -> int | None:
        """What `fit` leaves of added-up ranks; None: the matrix."""
        return None if self.reconcile.how == "fit" and self.whole else min(added, self.rank or added)

    @property
    def trained(self) -> dict[str, list[PairSize]]:
        """What `distill` trains: what `fit` has left, or the LoRAs themselves."""
        if not self.fits:
            return {name: list(own) for name, own in self.parts.items()}
        with torch.device("meta"):
            solved = {
                name: (own[0].width, targets_of([p.pair() for p in own], self.rank_of)) for name,
                own in self.parts.items()
            }
        return {
            name: [PairSize(t.rank or 0, t.begin, t.end, width) for t in found] for name,
            (width, found) in solved.items()
        }


@dataclass(frozen=True)
class Needs:
    """Bytes of one process; operations of all."""

    host: int
    disk: int  # states that the host's share does not hold, and matrices that are solved
    fit: int  # the worst moment of `fit`, or of plain passes, on the device
    distill: Budget | None
    passes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # what for -> noisy clips, operations
    sums: int = 0  # of these, in float32
    sample: int = 0  # operations of training a LoRA on one clip of this size

    @property
    def device(self) -> int:
        return max(self.fit, self.distill.total if self.distill else 0)

    @property
    def flops(self) -> int:
        return sum(flops for _, flops in self.passes.values())


def of_merge(job: Merge, shape: Shape, gpus: int = 1, parallel: ParallelConfig | None = None) -> Needs:
    shape = replace(shape, batch=job.reconcile.batch_size)
    with simulated(world=1, ulysses=1, ring=1) as ctx:
        seen = trace_streaming(
            job.about.spec, job.about.flavor, job.parts, shape, ctx, dtype=job.dtype, fit=job.fits,
            rank=job.rank_of
        )
    distill, step = (
        _distill(job, shape, gpus, parallel or ParallelConfig(), seen.rest) if job.distills else (None, 0)
    )
    host, disk = _host(job, seen, gpus)
    sums = seen.cost.sums * job.n_states if job.fits else 0
    return Needs(
        host, disk, max(seen.passing, seen.fitting), distill, _passes(job, seen, step), sums,
        _sample(job, shape)
    )


def _passes(job: Merge, seen: Streaming, step: int) -> dict[str, tuple[int, int]]:
    """As reconcile() makes them."""
    c, forward = job.reconcile, seen.cost.forward
    sampled = OWN_STEPS // 2 * (c.states + c.held_out) * job.n_sets if c.own_states else 0
    # by the base; each LoRA's by it too
    told = sampled + job.n_states + job.n_held + (c.states + c.held_out) * job.n_sets
    checks = job.n_held * (1 + job.fits + job.distills)
    leak = min(LEAK_CLIPS, c.held_out) * job.n_sets * (1 + job.n_loras)
    found = {
        "what each LoRA does": (told, told * forward), "who fires on whose clips": (leak, leak * forward)
    }
    found["distances"] = (checks, checks * forward)
    if job.fits:
        found["fit"] = (job.n_states, job.n_states * (seen.cost.fit + seen.cost.sums) + seen.cost.solve)
    if job.distills:
        n = c.steps * A_SLICE * job.n_sets
        found["distill"] = (n, n * (step + forward * (c.new_noise and not c.own_states)))
    return found


def _host(job: Merge, seen: Streaming, gpus: int) -> tuple[int, int]:
    """(memory, disk) of one of the processes: every one has the LoRAs and all clips, and its
    share of the states between blocks.

    The LoRAs as they are and in float32, what fit leaves of them, and once more what distill does; of each
    noisy clip what goes into the model, twice while it does, and the teacher's and the base's velocities.
    """
    share = job.reconcile.host_gb * 1e9
    numbers, left = (sum(p.numbers for own in of.values() for p in own) for of in (job.parts, job.trained))
    matrices = job.fits and job.rank_of(1) is None
    loras = job.file_bytes + _FP32 * (numbers + left * ((job.fits and not matrices) + job.distills))
    clips = (job.n_states + job.n_held) * (2 * seen.inputs + 2 * seen.latents)
    told = 2 * (job.n_states + job.n_held) * seen.state  # of all, as the base and as a LoRA, together
    leak = min(LEAK_CLIPS, job.reconcile.held_out) * job.n_sets * (1 + job.n_loras) * seen.state
    running = 2 * job.n_states * seen.state if job.fits else 0
    most = -(-max(told, leak, running) // gpus)
    # a clip more, as all LoRAs see it, before a round is full
    there = min(most, int(share) + seen.state * (1 + job.n_loras))
    solved = sum(
        _FP32 * own[0].width * (max(p.end for p in own) - min(p.begin for p in own))
        for own in job.parts.values()
    )
    return loras + clips + there, max(0, -(-running // gpus) - int(share)) + (solved if matrices else 0)


def _distill(job: Merge, shape: Shape, gpus: int, parallel: ParallelConfig, rest: int) -> tuple[Budget, int]:
    """Memory of one of the processes, and a clip's operations forward and backward. `rest`: of the streamed
    model's weights, which stay."""
    with simulated(world=gpus, ulysses=parallel.ulysses, ring=parallel.ring) as ctx:
        model = empty_model(job.about, job.dtype).requires_grad_(False)
        changes, pairs = Changes(model), {name: [p.pair() for p in own] for name, own in job.trained.items()}
        for name, own in pairs.items():
            for p in own:
                p.down, p.up = nn.Parameter(p.down), nn.Parameter(p.up)
            known = nn.ParameterList(t for p in own for t in (p.down, p.up))
            model.get_submodule(name).register_module("pairs", known)
        changes.put(STUDENT, pairs)
        changes.active = STUDENT
        inp = fake_input(job.about.spec, job.about.flavor, shape)
        on_gpu = job.dtype != torch.float32
        trace = trace_step(model, inp, ctx=ctx, recompute="full" if on_gpu else "none", autocast=on_gpu)
        counts = byte_counts(model)
    gradients, weights = counts["trained"], counts["frozen"] + counts["trained"] + rest
    # the moments; a step itself adds one matrix at a time to the gradients
    total = weights + gradients + max(trace.peak_bytes, gradients)
    activations = trace.peak_bytes - trace.gradient_bytes
    each = trace.flops * parallel.ulysses * parallel.ring // shape.batch
    return Budget(weights, gradients, gradients, activations, 0, total), each


def _sample(job: Merge, shape: Shape) -> int:
    """Training one of the LoRAs on one clip, as `hvtrain train` does by default."""
    rank = max(p.rank for own in job.parts.values() for p in own)
    alone = Training(
        ModelConfig(), AdapterConfig(rank=rank), ParallelConfig(), ZeroConfig("torch", 0), RunSettings()
    )
    return of_training(alone, job.about, replace(shape, batch=1), 1).flops
