"""Which layers of a block feed which others, told from tensors without values: every result
remembers whose outputs are in it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvtrain.merge.fit import levels
from hvtrain.merge.stream import Streamed
from hvtrain.models.dit import Tokens


class Feeds(TorchDispatchMode):
    """Follows names from storage to storage."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = {}
        self._kept: list[Any] = []  # else a storage's number would be given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = set().union(
            *(self.of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        )
        for leaf in tree_leaves(out) if names else ():
            if isinstance(leaf, Tensor):
                self.mark(leaf, names)
        return out

    def of(self, x: Tensor) -> set[str]:
        return self._names.get(x.untyped_storage()._cdata, set())

    def mark(self, x: Tensor, names: set[str]) -> None:
        storage = x.untyped_storage()
        self._kept.append(storage)
        self._names.setdefault(storage._cdata, set()).update(names)


def stages_without_values(
    model: Streamed, block: nn.Module, layers: Sequence[str], tokens: Tokens, key: Hashable
) -> list[list[str]]:
    """What merge.fit.stages finds by changing values. Sets the model's n_calls too."""
    feeds, calls = Feeds(), dict.fromkeys(layers, 0)
    fed: dict[str, set[str]] = {name: set() for name in layers}

    def watch(name: str) -> Any:
        def see(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            calls[name] += 1
            for other in feeds.of(args[0]):
                fed[other].add(name)
            feeds.mark(out, {name})

        return see

    handles = [model.model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    try:
        with feeds:
            model.step(block, tokens, key)
    finally:
        for handle in handles:
            handle.remove()
    order = [name for name in layers if calls[name]]
    model.n_calls.update({name: calls[name] for name in order})
    return levels(order, fed)
