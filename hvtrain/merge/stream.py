"""Forward passes of a model of which only one block's weights are in memory, and the states between blocks on the host.

All inputs go through a block before the next one is read, so that a 13B model's passes need a block, one input's activations
and the host's memory, whatever the number of inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hvtrain.merge.changes import Changes
from hvtrain.models.dit import ModelInput, Tokens
from hvtrain.models.load import Identified, whole_model
from hvtrain.models.precision import autocast
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext

T = TypeVar("T")


class Streamed:
    """A model that is on the meta device but for the block at hand and what lies before and behind the blocks."""

    def __init__(self, found: Identified, ctx: ParallelContext, dtype: torch.dtype) -> None:
        self.found, self.ctx, self.dtype = found, ctx, dtype
        self.model = whole_model(found).eval().requires_grad_(False)
        self.changes = Changes(self.model)
        self.n_calls: dict[str, int] = {}  # of a layer in one pass, where it is not 1
        parallelize(self.model, ctx, kernel="auto", recompute="none", dtype=dtype, training=False)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._of_block = [{names[id(p)]: name for name, p in block.named_parameters()} for block in self.model.blocks]
        inside = {name for block in self._of_block for name in block}
        rest = {name: self._read(name) for name in self.model.state_dict() if name not in inside}
        self.model.load_state_dict(rest, strict=False, assign=True)
        modules = {id(m): name for name, m in self.model.named_modules()}
        self.layers = [
            [modules[id(m)] for m in block.modules() if isinstance(m, nn.Linear)] for block in self.model.blocks
        ]

    def _read(self, name: str) -> Tensor:
        return self.found.read(name, dtype=self.dtype, device=self.ctx.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with torch.no_grad(), autocast(self.ctx.device.type, enabled=self.dtype != torch.float32):
            yield

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """A block with its weights, for a while."""
        block = self.model.blocks[number]
        block.load_state_dict({own: self._read(name) for name, own in self._of_block[number].items()}, assign=True)
        try:
            yield block.requires_grad_(False)
        finally:
            block.to("meta")

    def enter(self, inp: ModelInput) -> Tokens:
        """What the first block takes, on the host."""
        with self.computing():
            tokens = self.model.sequence.scatter(self.model.embed(placed(inp, self.ctx.device)))
        return placed(tokens, "cpu")

    def step(self, block: nn.Module, tokens: Tokens, key: Hashable) -> Tokens:
        """Through a block with a set of changes, from host to host."""
        with self.computing(), self.changes.using(key):
            return placed(block(placed(tokens, self.ctx.device)), "cpu")

    def leave(self, tokens: Tokens) -> Tensor:
        """Velocity [B C T H W], float32, on the host."""
        with self.computing():
            tokens = placed(tokens, self.ctx.device)
            patches = self.model.sequence.gather(self.model.to_patches(tokens), tokens.n_img)  # type: ignore[operator]
            return self.model.unpatchify(patches, tokens.grid).float().cpu()

    def velocities(self, inputs: Sequence[tuple[ModelInput, Sequence[Hashable]]]) -> list[list[Tensor]]:
        """Of each input, its velocity [B C T H W] under each of these sets of changes (None: the base)."""
        states = []
        for inp, keys in inputs:
            entered = self.enter(inp)
            states.append([(key, entered) for key in keys])
        for number in range(len(self.model.blocks)):
            with self.block(number) as block:
                states = [[(key, self.step(block, tokens, key)) for key, tokens in own] for own in states]
        return [[self.leave(tokens) for _, tokens in own] for own in states]


def n_bytes(value: object) -> int:
    """Of all tensors in a record, each once."""
    found: dict[int, int] = {}

    def walk(part: object) -> None:
        if isinstance(part, Tensor):
            found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif is_dataclass(part) and not isinstance(part, type):
            for f in fields(part):
                walk(getattr(part, f.name))
        elif isinstance(part, Mapping | tuple):
            for inner in part.values() if isinstance(part, Mapping) else part:
                walk(inner)

    walk(value)
    return sum(found.values())


def placed(value: T, device: torch.device | str) -> T:
    """A record with all tensors in it on a device."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.to(device)
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{f.name: placed(getattr(value, f.name), device) for f in fields(value)})
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        found = type(value)(*(placed(part, device) for part in value))
    elif isinstance(value, Mapping):
        found = {name: placed(part, device) for name, part in value.items()}
    return found
