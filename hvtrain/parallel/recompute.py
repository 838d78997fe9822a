"""Activation checkpointing: what of a block is kept for the backward pass, and what is computed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hvtrain.models import attend_op, sparse
from hvtrain.models.dit import Tokens, run_plain
from hvtrain.parallel.hostcopy import HostCopies
from hvtrain.registry import Registry

Block = Callable[[Tokens], Tokens]
RunBlock = Callable[[nn.Module, Tokens], Tokens]
# operators whose results `selective` keeps; usp.py adds the ring
KEPT = [attend_op.OP.default, sparse.OP.default]


def _full(block: Block, tokens: Tokens) -> Tokens:
    """One block's input per block stays in memory; costs one more forward. Collectives are replayed in the
    same order on all ranks, because every rank runs the same blocks."""
    return checkpoint(block, tokens, use_reentrant=False)


def _selective(block: Block, tokens: Tokens) -> Tokens:
    """As full, but attention's output and log-sum-exp are kept too: all but the part whose cost is quadratic
    is computed again. Around a ring the keys and values then travel once, not twice, before the backward."""
    return checkpoint(block, tokens, use_reentrant=False, context_fn=keeping_attention)


def keeping_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the two runs of what is checkpointed."""
    kept: list[tuple[Tensor, ...]] = []
    return _Keeping(kept, replay=False), _Keeping(kept, replay=True)


class _Keeping(TorchDispatchMode):
    """Appends what operators in KEPT give, or gives that instead of having it computed again.
    PyTorch's own contexts for this ask for the same other operators in both runs: swapped blocks and
    ZeRO-3 have others in each."""

    def __init__(self, kept: list[tuple[Tensor, ...]], *, replay: bool) -> None:
        super().__init__()
        self.kept, self.replay, self.next = kept, replay, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code calls these operators as they are

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEPT:
            return func(*args, **(kwargs or {}))
        if not self.replay:
            self.kept.append(func(*args, **(kwargs or {})))
        self.next += 1
        # the kept themselves must not become part of a graph
        return tuple(t.detach() for t in self.kept[self.next - 1])


class Offload:
    """As full, with each block's input in pinned host memory until the backward comes near it."""

    def __init__(self, copies: HostCopies | None = None) -> None:
        self.copies = copies or HostCopies()

    def __call__(self, block: Block, tokens: Tokens) -> Tokens:
        if not torch.is_grad_enabled():
            return block(tokens)
        # Only what is passed as a tensor goes through the hooks, and nothing else
        # may hold on to the activations.
        nothing = tokens.img.new_empty(0)
        rest = replace(tokens, img=nothing, txt=nothing)

        def run(img: Tensor, txt: Tensor) -> Tokens:
            return block(replace(rest, img=img, txt=txt))

        with saved_tensors_hooks(self.copies.pack, self.copies.unpack):
            return checkpoint(run, tokens.img, tokens.txt, use_reentrant=False)


RECOMPUTE: Registry[Callable[[], RunBlock]] = Registry("policy")
RECOMPUTE |= {
    "none": lambda: run_plain, "full": lambda: _full, "selective": lambda: _selective, "offload": Offload
}


def pick_policy(name: str) -> RunBlock:
    return RECOMPUTE.find(name, key="run.recompute")()
