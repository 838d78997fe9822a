"""Ways to split a set: which sample goes to which part."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import ShardError
from shards.order import salt
from shards.reader import ShardSet


@dataclass(frozen=True)
class Portion:
    name: str  # folder below the output
    rule: str  # for people
    samples: int = 0


Assign = Callable[[ShardSet], tuple[list[Portion], dict[str, int]]]  # parts, and key -> which


@dataclass(frozen=True)
class Division:
    text: str  # as it is typed: one rule, one text
    assign: Assign


def by_number(n: int, *, seed: int = 0) -> Division:
    """n parts of equal size; every bucket is dealt out evenly."""

    def assign(found: ShardSet) -> tuple[list[Portion], dict[str, int]]:
        if not 1 <= n <= found.manifest.n_keys:
            raise ShardError(
                f"{found.name} holds {found.manifest.n_keys} samples; they cannot make {n} parts"
            )
        order: dict[str, list[str]] = {}
        for chunk in found.manifest.chunks:
            order.setdefault(chunk.bucket, []).extend(chunk.keys)
        where, dealt = {}, 0
        for bucket in sorted(order):
            for key in sorted(order[bucket], key=lambda k: salt(seed, k)):
                where[key] = dealt % n
                dealt += 1
        width = max(2, len(str(n)))
        return [Portion(f"{i + 1:0{width}d}", f"every {n}th sample") for i in range(n)], where

    return Division(f"--n {n}" + (f" (seed {seed})" if seed else ""), assign)


def by_caption(patterns: Sequence[str]) -> Division:
    """A part per pattern (regular expression, case ignored), the first that matches;
    what none matches is `rest`."""
    try:
        wanted = [re.compile(p, re.IGNORECASE) for p in patterns]
    except re.error as error:
        raise ShardError(f"caption pattern {error.pattern!r} is not a regular expression: {error}") from None

    def assign(found: ShardSet) -> tuple[list[Portion], dict[str, int]]:
        parts = [Portion(f"{i + 1:02d}", f"caption matches {p!r}") for i, p in enumerate(patterns)]
        rest, where = len(parts), {}
        for key, meta in _meta(found, "text"):
            captions = [str(c) for c in meta.get("captions") or [meta.get("caption", "")]]
            where[key] = next((i for i, p in enumerate(wanted) if any(map(p.search, captions))), rest)
        if rest in where.values():
            parts.append(Portion("rest", "no pattern matches"))
        return parts, where

    return Division(" ".join(f"--caption {p!r}" for p in patterns), assign)


def by_folder() -> Division:
    """A part per folder that the clips came from."""

    def assign(found: ShardSet) -> tuple[list[Portion], dict[str, int]]:
        folders = {key: os.path.dirname(str(meta.get("source", ""))) for key, meta in _meta(found, "latents")}
        same = one_name(set(folders.values()))
        numbers = {name: i for i, name in enumerate(sorted(set(same.values())))}
        width = max(2, len(str(len(numbers))))
        parts = [Portion(f"{i + 1:0{width}d}", f"clips of {name}") for name, i in numbers.items()]
        return parts, {key: numbers[same[folder]] for key, folder in folders.items()}

    return Division("--folder", assign)


def one_name(folders: Iterable[str]) -> dict[str, str]:
    """folder -> the name it goes by. Lists of clips name one folder relatively and absolutely: a relative
    name is the absolute one that ends in it, if a single one does."""
    plain = {folder: os.path.normpath(folder) for folder in folders}
    ends: dict[str, set[str]] = defaultdict(set)
    for name in filter(os.path.isabs, plain.values()):
        for at in (i for i, letter in enumerate(name) if letter == "/"):
            ends[name[at + 1 :]].add(name)
    return {
        folder: next(iter(ends[name])) if len(ends.get(name, ())) == 1 else name for folder,
        name in plain.items()
    }


def _meta(found: ShardSet, column: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if column not in found.manifest.columns:
        raise ShardError(
            f"{found.name} has no column '{column}' to split by; it has {', '.join(found.manifest.columns)}"
        )
    for chunk in found.manifest.chunks:
        tar = found.tar(chunk, column)
        for key in chunk.keys:
            yield key, tar.meta(key)
