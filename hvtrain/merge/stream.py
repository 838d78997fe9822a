"""Forward passes of a model of which only one block's weights are in memory, and the
states between blocks on the host.

All inputs go through a block before the next one is read, so that a 13B model's passes need a block, one
input's activations and the host's memory, whatever the number of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hvtrain.merge.changes import Changes
from hvtrain.models.dit import ModelInput, Tokens
from hvtrain.models.kernels import Kernel
from hvtrain.models.load import Identified, whole_model
from hvtrain.models.precision import autocast
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.weights.outputs import writing

T = TypeVar("T")


class Streamed:
    """A model that is on the meta device but for the block at hand and what lies
    before and behind the blocks."""

    def __init__(
        self, found: Identified, ctx: ParallelContext, dtype: torch.dtype, *, host_bytes: float = math.inf,
        kernel: str | Kernel = "auto",
    ) -> None:
        """`host_bytes`: of states between blocks that lie in memory at a time; `kernel`: of attention."""
        self.found, self.ctx, self.dtype, self.host_bytes = found, ctx, dtype, host_bytes
        self.model = whole_model(found).eval().requires_grad_(False)
        self.changes = Changes(self.model)
        self.n_calls: dict[str, int] = {}  # of a layer in one pass, where it is not 1
        parallelize(self.model, ctx.apart, kernel=kernel, recompute="none", dtype=dtype, training=False)
        names = {id(p): name for name, p in self.model.named_parameters()}
        self._of_block = [
            {names[id(p)]: name for name, p in block.named_parameters()} for block in self.model.blocks
        ]
        inside = {name for block in self._of_block for name in block}
        rest = {name: self._read(name) for name in self.model.state_dict() if name not in inside}
        self.model.load_state_dict(rest, strict=False, assign=True)
        modules = {id(m): name for name, m in self.model.named_modules()}
        self.layers = [
            [modules[id(m)] for m in block.modules() if isinstance(m, nn.Linear)]
            for block in self.model.blocks
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
        empty = dict(block.named_parameters())
        block.load_state_dict(
            {own: self._read(name) for name, own in self._of_block[number].items()}, assign=True
        )
        try:
            yield block.requires_grad_(False)
        finally:
            block.load_state_dict(empty, assign=True)

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
            patches = self.model.to_patches(tokens)  # type: ignore[operator]
            patches = self.model.sequence.gather(patches, tokens.n_img)
            return self.model.unpatchify(patches, tokens.grid).float().cpu()

    def velocities(self, inputs: Sequence[tuple[ModelInput, Sequence[Hashable]]]) -> list[list[Tensor]]:
        """Of each input, its velocity [B C T H W] under each of these sets of changes (None: the base).
        In rounds, each of as many as the host's share holds. Collective: each rank takes a part of the
        inputs, and all have all results."""
        found: list[list[Tensor]] = []
        states: list[list[tuple[Hashable, Tokens]]] = []
        size = 0
        for inp, keys in self.ctx.share(inputs):
            entered = self.enter(inp)
            states.append([(key, entered) for key in keys])
            size += n_bytes(entered) * len(keys)
            if size >= self.host_bytes:
                found += self._through(states)
                states, size = [], 0
        return self.ctx.unshare(found + self._through(states))

    def _through(self, states: list[list[tuple[Hashable, Tokens]]]) -> list[list[Tensor]]:
        if not states:
            return []
        for number in range(len(self.model.blocks)):
            with self.block(number) as block:
                for own in states:  # each gives way to what comes of it: never all of them twice
                    own[:] = [(key, self.step(block, tokens, key)) for key, tokens in own]
        return [[self.leave(tokens) for _, tokens in own] for own in states]


def n_bytes(value: object) -> int:
    """Of all tensors in a record, each once."""
    found: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        found[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    mapped(value, count)
    return sum(found.values())


def placed(value: T, device: torch.device | str) -> T:
    """A record with all tensors in it on a device."""
    return mapped(value, lambda t: t.to(device))


def mapped(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A record with all tensors in it changed, always in the same order."""
    found: Any = value
    if isinstance(value, Tensor):
        found = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        found = type(value)(*(mapped(part, change) for part in value))
    elif isinstance(value, Mapping):
        found = {name: mapped(part, change) for name, part in value.items()}
    return found


class OnDisk:
    """A record whose tensors lie in a file."""

    def __init__(self, path: Path, value: Tokens) -> None:
        tensors: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.to("meta")

        self.path, self.form = path, mapped(value, take)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            save_file(
                {f"{i:03d}": t.clone(memory_format=torch.contiguous_format) for i, t in enumerate(tensors)},
                str(path)
            )

    def read(self) -> Tokens:
        with safe_open(str(self.path), "pt") as file:
            tensors = iter([file.get_tensor(name) for name in sorted(file.keys())])
        return mapped(self.form, lambda t: next(tensors))
