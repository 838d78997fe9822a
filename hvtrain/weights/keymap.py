"""Key maps: how other programs name and cut the tensors that carry official names here.

A rule pairs one official module with one or several modules of the dialect. Several means that the official
module is their fusion along the output rows (qkv); a share, that the dialect's module is the fusion of
several official ones. A map works both ways; lorafiles/dialects.py uses the same rules for LoRA pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

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
    # (i, n): it is the i-th of n equal blocks of rows of the dialect's one module
    share: tuple[int, int] | None = None

    def bound(self, n: str) -> Rule:
        names = tuple(name.replace("{n}", n) for name in self.dialect)
        return replace(self, official=self.official.replace("{n}", n), dialect=names)

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

    def place(self, rows: Tensor) -> Tensor:
        """What has the official module's rows as what has the dialect's: zeros in the other shares."""
        if self.share is None:
            return rows
        i, n = self.share
        whole = rows.new_zeros(n, *rows.shape)
        whole[i] = rows
        return whole.flatten(0, 1)


@dataclass(frozen=True)
class Fused:
    """How one official tensor is made of the dialect's."""

    parts: tuple[str, ...]
    swap: bool = False
    share: tuple[int, int] | None = None

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        first = shapes[self.parts[0]]
        if self.share is not None:
            return (first[0] // self.share[1], *first[1:]) if first else first
        return first if len(self.parts) == 1 else (sum(shapes[p][0] for p in self.parts), *first[1:])

    def build(self, get: Callable[[str], Tensor]) -> Tensor:
        tensors = [get(part) for part in self.parts]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return swap_halves(whole) if self.swap else self.own_rows(whole)

    def own_rows(self, whole: Tensor) -> Tensor:
        """Of what has all rows of a part."""
        if self.share is None:
            return whole
        i, n = self.share
        return whole.unflatten(0, (n, -1))[i].clone()  # a view would keep the others in memory


@dataclass(frozen=True)
class Share:
    """Which piece of an official tensor one tensor of the dialect is."""

    source: str
    rule: Rule | None = None
    part: int = 0
    below: tuple[str, ...] = ()  # further official tensors that are fused with it, in this order

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """From all official tensors."""
        whole = self.take(state[self.source])
        return torch.cat([whole, *(state[name] for name in self.below)]) if self.below else whole

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
        self._dialect: dict[str, list[Rule]] = {}
        for rule in self.rules:
            for name in rule.dialect:
                self._dialect.setdefault(_shape_of(name), []).append(rule)

    def rule_of_official(self, module: str) -> Rule | None:
        """The rule of an official module, with its number filled in."""
        rule = self._official.get(_shape_of(module))
        return rule.bound(_number(module)) if rule else None

    def rules_of_dialect(self, module: str) -> list[Rule]:
        """The rules of a dialect's module: several where it is the fusion of several official ones."""
        return [rule.bound(_number(module)) for rule in self._dialect.get(_shape_of(module), ())]

    def read(self, names: Iterable[str]) -> dict[str, Fused]:
        """Official name -> how to make it of these names. What has no place keeps its
        name, for the strict report."""
        present = set(names)
        found: dict[str, Fused] = {}
        for name in sorted(present):
            module, _, leaf = name.rpartition(".")
            rules = self.rules_of_dialect(module)
            if not rules:
                found[name] = Fused((name,))
            for rule in rules:
                parts = tuple(_joined(part, leaf) for part in rule.dialect)
                if present.issuperset(parts):
                    found[
                        _joined(rule.official, rule.leaf_of_official(leaf))
                    ] = Fused(parts, rule.swap, rule.share)
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
            if rule.share is not None:
                below = self._fused(rule, leaf)
                found[_joined(rule.dialect[0], rule.leaf_of_dialect(leaf))] = Share(below[0], below=below[1:])
                continue
            for part, other in enumerate(rule.dialect):
                found[_joined(other, rule.leaf_of_dialect(leaf))] = Share(name, rule, part)
        return found

    def _fused(self, rule: Rule, leaf: str) -> tuple[str, ...]:
        """The official tensors that are fused in the dialect's module of one of them, in order."""
        rules = sorted(self.rules_of_dialect(rule.dialect[0]), key=lambda one: one.share or (0, 0))
        return tuple(_joined(one.official, leaf) for one in rules)


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf  # a parameter of the whole model has no module


OWN_NAMES = KeyMap((), passthrough=True)


def swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


_BLOCK_NUMBER = re.compile(
    r"(?:(?<=blocks\.)|(?<=block\.)|(?<=layers\.)|(?<=transformer\.))(\d+|\{n\})(?=\.|$)"
)


def _shape_of(module: str) -> str:
    return _BLOCK_NUMBER.sub("{n}", module, count=1)


def _number(module: str) -> str:
    found = _BLOCK_NUMBER.search(module)
    return found[1] if found else ""
