"""Key maps: how other programs name and cut the tensors that carry official names here.

A rule pairs one official module with one or several modules of the dialect. Several means that the official module is
their fusion along the output rows (qkv). A map works both ways; lorafiles/dialects.py uses the same rules for LoRA pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`{n}` in the names stands for a block's number."""

    official: str
    dialect: tuple[str, ...]
    rows: tuple[int, ...] = ()  # relative numbers of output rows of the parts; equal if empty
    swap: bool = False  # the dialect stores the two halves of the rows in the other order
    leaf: tuple[str, str] | None = None  # the parameter's name, official and dialect, where they differ

    def bound(self, n: str) -> Rule:
        names = tuple(name.replace("{n}", n) for name in self.dialect)
        return Rule(self.official.replace("{n}", n), names, self.rows, self.swap, self.leaf)

    def leaf_of_dialect(self, leaf: str) -> str:
        return self.leaf[1] if self.leaf and leaf == self.leaf[0] else leaf

    def leaf_of_official(self, leaf: str) -> str:
        return self.leaf[0] if self.leaf and leaf == self.leaf[1] else leaf

    def split(self, rows: int) -> list[int]:
        shares = self.rows or (1,) * len(self.dialect)
        unit, rest = divmod(rows, sum(shares))
        if rest:
            raise ValueError(f"{self.official}: {rows} rows cannot be cut in the proportions {shares}")
        return [share * unit for share in shares]


@dataclass(frozen=True)
class Fused:
    """How one official tensor is made of the dialect's."""

    parts: tuple[str, ...]
    swap: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        first = shapes[self.parts[0]]
        return first if len(self.parts) == 1 else (sum(shapes[p][0] for p in self.parts), *first[1:])

    def build(self, get: Callable[[str], Tensor]) -> Tensor:
        tensors = [get(part) for part in self.parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return swap_halves(whole) if self.swap else whole


@dataclass(frozen=True)
class Share:
    """Which piece of an official tensor one tensor of the dialect is."""

    source: str
    rule: Rule | None = None
    part: int = 0

    def take(self, whole: Tensor) -> Tensor:
        if self.rule is None:
            return whole
        if len(self.rule.dialect) > 1:
            whole = whole.split(self.rule.split(whole.shape[0]))[self.part]
        return swap_halves(whole) if self.rule.swap else whole


class KeyMap:
    """Rules of one dialect. Modules without a rule keep their name, if `passthrough`; else they have none."""

    def __init__(self, rules: Iterable[Rule], *, passthrough: bool = False) -> None:
        self.rules = tuple(rules)
        self.passthrough = passthrough
        self._official = {_shape_of(rule.official): rule for rule in self.rules}
        self._dialect = {
            _shape_of(name): (rule, part) for rule in self.rules for part, name in enumerate(rule.dialect)
        }

    def rule_of_official(self, module: str) -> Rule | None:
        """The rule of an official module, with its number filled in."""
        rule = self._official.get(_shape_of(module))
        return rule.bound(_number(module)) if rule else None

    def rule_of_dialect(self, module: str) -> tuple[Rule, int] | None:
        """The rule of a dialect's module and which of its parts the module is."""
        found = self._dialect.get(_shape_of(module))
        return (found[0].bound(_number(module)), found[1]) if found else None

    def read(self, names: Iterable[str]) -> dict[str, Fused]:
        """Official name -> how to make it of these names. What has no place keeps its name, for the strict report."""
        present = set(names)
        found: dict[str, Fused] = {}
        for name in sorted(present):
            module, _, leaf = name.rpartition(".")
            hit = self.rule_of_dialect(module)
            if hit is None:
                found[name] = Fused((name,))
                continue
            rule = hit[0]
            parts = tuple(_joined(part, leaf) for part in rule.dialect)
            if present.issuperset(parts):
                found[_joined(rule.official, rule.leaf_of_official(leaf))] = Fused(parts, rule.swap)
            else:
                found[name] = Fused((name,))
        return found

    def write(self, names: Iterable[str]) -> dict[str, Share]:
        """Dialect name -> the piece of an official tensor that it is."""
        found: dict[str, Share] = {}
        for name in names:
            module, _, leaf = name.rpartition(".")
            rule = self.rule_of_official(module)
            if rule is None:
                if not self.passthrough:
                    raise KeyError(f"the dialect has no name for '{name}'")
                found[name] = Share(name)
                continue
            for part, other in enumerate(rule.dialect):
                found[_joined(other, rule.leaf_of_dialect(leaf))] = Share(name, rule, part)
        return found


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf  # a parameter of the whole model has no module


OWN_NAMES = KeyMap((), passthrough=True)


def swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


_BLOCK_NUMBER = re.compile(r"(?:(?<=blocks\.)|(?<=block\.)|(?<=layers\.)|(?<=transformer\.))(\d+|\{n\})(?=\.|$)")


def _shape_of(module: str) -> str:
    return _BLOCK_NUMBER.sub("{n}", module, count=1)


def _number(module: str) -> str:
    found = _BLOCK_NUMBER.search(module)
    return found[1] if found else ""
