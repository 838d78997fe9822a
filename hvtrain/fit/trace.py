"""One step of the real code on tensors without values: which bytes live when, and how many operations it
takes.

The model, its blocks, its recompute policy and its sequence-parallel attention are the ones that train;
only the values are missing (torch's FakeTensorMode) and the other ranks (torch's fake process group).
So nothing here knows a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hvtrain.adapters.attach import without_adapters
from hvtrain.config import SparseConfig
from hvtrain.models import precision
from hvtrain.models.attend_op import attention
from hvtrain.models.conditions import example
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.kernels import KERNELS, Kernel
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import EXACT, parallelize
from hvtrain.parallel.context import ParallelContext, shutdown, start_simulated
from hvtrain.parallel.hostcopy import HostCopies
from hvtrain.parallel.recompute import Offload, RunBlock
from hvtrain.parallel.usp import INSIDE


@dataclass(frozen=True)
class Trace:
    """One micro-step of one rank, beyond the weights."""

    peak_bytes: int  # live at the worst moment
    gradient_bytes: int  # of these, gradients of trained weights
    flops: int  # of one rank


@dataclass(frozen=True)
class Shape:
    """What one rank's micro-batch looks like."""

    batch: int
    frames: int
    height: int
    width: int


class Ledger(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end. (torch's MemTracker refuses a model
    with frozen weights, in 2.13 at least, and cannot leave out what lies in host memory.)"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.held: dict[int, tuple[Any, int]] = {}
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.grads_at_peak = 0
        for weight in [*model.parameters(), *model.buffers()]:  # there before: their views are no memory
            storage = weight.untyped_storage()
            self.held[storage._cdata] = (storage, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body: Any = INSIDE.get(func.overloadpacket)
        if body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        counter = flop_registry.get(func.overloadpacket)
        if counter is not None:
            self.flops += counter(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def leave_out(self, host: Tensor) -> None:
        """What lies in host memory is not the device's."""
        storage = host.untyped_storage()
        _, n = self.held[storage._cdata]
        self.live -= n
        self.held[storage._cdata] = (storage, 0)

    def _follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        n = storage.nbytes()
        self.held[key] = (weakref.ref(storage, partial(self._gone, key)), n)
        self.live += n
        if self.live > self.peak:
            self.peak = self.live
            self.grads_at_peak = sum(
                p.grad.untyped_storage().nbytes() for p in self.params if p.grad is not None
            )

    def _gone(self, key: int, _: object) -> None:
        entry = self.held.pop(key, None)
        if entry is not None:
            self.live -= entry[1]


FEW = 2


# Attention as a flash kernel allocates it, output and log-sum-exp forward and the three gradients backward:
# the operator, which computes nothing here.
def _traced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, TRACED.number)[0]


TRACED: Kernel = replace(KERNELS["sdpa"], name="traced", attend=_traced)


def trace_step(
    model: DiT, inp: ModelInput, *, ctx: ParallelContext, recompute: str = "none", autocast: bool = True,
    training: bool = True, keep_gradients: bool = True, sparse: SparseConfig = EXACT, silent: bool = False,
) -> Trace:
    """A micro-step of `model`, whose tensors are fake, as rank 0 of ctx. Call it inside the mode that made
    the model. `silent`: with samples that ask what the model gives without its adapter.

    Of equal blocks only a few are run: what one more costs is known from the difference.
    """

    def run(counts: list[int]) -> Trace:
        chosen = {id(b) for blocks, n in zip(kinds, counts, strict=True) for b in blocks[:n]}
        model.zero_grad()
        meter = Ledger(model)
        parallelize(
            model, replace(ctx, rank=1), kernel=TRACED, recompute=recompute, training=training, sparse=on_cpu
        )
        model.run_block = _only(
            chosen, Offload(HostCopies(made=meter.leave_out)) if recompute == "offload" else model.run_block
        )
        hooks = [] if keep_gradients else [p.register_post_accumulate_grad_hook(_drop) for p in meter.params]
        with meter, torch.set_grad_enabled(training):
            with precision.autocast("cpu", enabled=autocast):
                velocity = model(inp)
            wanted = _unchanged(model, inp, autocast) if silent else 0.0
            if training:
                (velocity.float() - wanted).square().mean().backward()
        for hook in hooks:
            hook.remove()
        return Trace(meter.peak, meter.grads_at_peak, meter.flops)

    on_cpu = replace(sparse, kernel="gather")  # nothing computes
    kinds = kinds_of(model, n_exact=sparse.exact_layers if sparse.pattern != "none" else 0)
    few = [min(len(blocks), FEW) for blocks in kinds]
    base = total = run(few)
    for i, blocks in enumerate(kinds):
        if times := len(blocks) - few[i]:
            more = run([n + (i == j) for j, n in enumerate(few)])
            total = Trace(
                *(
                    t + times * (m - b) for t, m,
                    b in zip(astuple(total), astuple(more), astuple(base), strict=True)
                )
            )
    return total


def _unchanged(model: DiT, inp: ModelInput, autocast: bool) -> Tensor:
    """As train/objective.py asks for it: while what the backward pass needs is kept."""
    with torch.no_grad(), without_adapters(model), precision.autocast("cpu", enabled=autocast):
        return model(inp).float()


def kinds_of(model: DiT, *, n_exact: int = 0) -> list[list[nn.Module]]:
    """The blocks, those of one kind together; the first `n_exact` are apart."""
    kinds: dict[object, list[nn.Module]] = {}
    for i, block in enumerate(model.blocks):
        shapes = tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
        kinds.setdefault((type(block), shapes, i < n_exact), []).append(block)
    return list(kinds.values())


def _only(chosen: set[int], run_block: RunBlock) -> RunBlock:
    return lambda block, tokens: run_block(block, tokens) if id(block) in chosen else tokens


def _drop(p: Tensor) -> None:
    p.grad = None


def fake_input(spec: ModelSpec, flavor: Flavor, shape: Shape) -> ModelInput:
    size = flavor.latent.shape(frames=shape.frames, height=shape.height, width=shape.width)
    x = torch.empty(shape.batch, *size)
    cond = example(flavor, x.shape)
    sigma = torch.full((shape.batch,), 0.5)
    return spec.make_input(x, sigma, cond, task=flavor.tasks[0], guidance=flavor.defaults.guidance, x0=x)


@contextmanager
def simulated(*, world: int, ulysses: int, ring: int) -> Iterator[ParallelContext]:
    """Rank 0 of a job whose other ranks do not exist, and a place for tensors without values."""
    ctx = start_simulated(world, ulysses=ulysses, ring=ring)
    try:
        with FakeTensorMode():
            yield ctx
    finally:
        shutdown()


def byte_counts(model: nn.Module) -> Mapping[str, int]:
    """Bytes of trained and of frozen weights (buffers among them), and the number of trained values."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return {
        "trained": sum(p.nbytes for p in trained), "frozen": sum(p.nbytes for p in frozen),
        "n_trained": sum(p.numel() for p in trained),
    }
