"""Tables of what a user can name: samplers, solvers, optimizers, policies, kernels. An entry
stands beside its function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from hvtrain.errors import ConfigError, HvtrainError, suggest

T = TypeVar("T")
E = TypeVar("E")


class Registry(dict[str, T]):
    """name -> entry. `what` is an entry in the refusal; `also` are legal names that
    are looked after elsewhere."""

    def __init__(
        self, what: str, entries: Mapping[str, T] | Iterable[tuple[str, T]] = (), *, also: Iterable[str] = ()
    ) -> None:
        super().__init__(entries)
        self.what, self.also = what, tuple(also)

    def add(self, name: str) -> Callable[[E], E]:
        """A decorator."""

        def enter(entry: E) -> E:
            self[name] = entry  # type: ignore[assignment]
            return entry

        return enter

    def find(self, name: str, *, key: str, error: type[HvtrainError] = ConfigError) -> T:
        """The entry. `key` is the config key or option that named it; an unknown name raises `error`."""
        if name not in self:
            raise error(f"{key}: no {self.what} '{name}'; {suggest(name, (*self, *self.also))}")
        return self[name]
