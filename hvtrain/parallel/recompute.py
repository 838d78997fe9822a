"""Activation checkpointing: keep a block's input, compute its inside again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.checkpoint import checkpoint

from hvtrain.errors import ConfigError, suggest
from hvtrain.models.base import Tokens, run_plain

RunBlock = Callable[[nn.Module, Tokens], Tokens]


def _full(block: nn.Module, tokens: Tokens) -> Tokens:
    """One block's input per block stays in memory; costs one more forward. Collectives are replayed in the same order
    on all ranks, because every rank runs the same blocks."""
    return checkpoint(block, tokens, use_reentrant=False)


POLICIES: dict[str, RunBlock] = {"none": run_plain, "full": _full}


def pick_policy(name: str) -> RunBlock:
    if name not in POLICIES:
        raise ConfigError(f"run.recompute: no policy '{name}'; {suggest(name, POLICIES)}")
    return POLICIES[name]
