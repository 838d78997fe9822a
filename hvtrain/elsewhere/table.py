"""What another tool's options become, as a table says: a value under one of our keys, nothing
with a reason, or left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvtrain.elsewhere.source import PRIVATE
from hvtrain.errors import ConfigError, suggest

KINDS = ("mapped", "changed", "meaningless", "left out", "unknown")
NOT_CARRIED = ("left out", "unknown")



@dataclass(frozen=True)
class Becomes:
    """What one option becomes. In the table a text alone is `to`."""

    to: str | None = None  # our dotted key; "encode.KEY" is one of `hvtrain encode`
    # theirs, in small letters -> ours, or [ours, why]; null: there is nothing to set
    values: Mapping[str, Any] | None = None
    otherwise: Any = None  # [ours, why] for a value that is not among them; null: it is left out
    times: float | None = None
    inside: str = ""  # ours is {inside: value}
    why: str = ""  # it is not quite the same here
    absent: Any = None  # what the tool takes where the option is not given, if we would take something else
    also: Mapping[str, Any] = field(default_factory=dict)  # set with it, where nothing else says
    # another option -> the rule where that one is given too
    instead: Mapping[str, Any] = field(default_factory=dict)
    # a folder: our key -> a path in it, or [path, what its name holds]
    below: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Any) -> Becomes:
        if isinstance(raw, str):
            return cls(to=raw)
        return cls(**raw)


@dataclass(frozen=True)
class Table:
    """Of one tool, or of a part of it."""

    rules: Mapping[str, Becomes]
    meaningless: Mapping[str, str]  # option -> why
    # option, or `SECTION.*` -> why, or [why, the value with which nothing is lost]
    left_out: Mapping[str, Any]

    @classmethod
    def of(cls, *raw: Mapping[str, Any]) -> Table:
        """From several: an option that a later one has is told by it."""
        parts: list[dict[str, Any]] = [{}, {}, {}]
        for one in raw:
            new = [one.get(name) or {} for name in ("options", "meaningless", "left_out")]
            again = {name for part in new for name in part}
            parts = [
                {k: v for k, v in old.items() if k not in again} | part for old,
                part in zip(parts, new, strict=True)
            ]
        return cls({name: Becomes.of(rule) for name, rule in parts[0].items()}, parts[1], parts[2])

    @property
    def names(self) -> list[str]:
        return [*self.rules, *self.meaningless, *self.left_out]


@dataclass(frozen=True)
class Fate:
    """What became of one option."""

    kind: str  # one of KINDS
    option: str  # with its value, as it was given
    result: str = ""
    why: str = ""

    def __str__(self) -> str:
        result, why = f"  ->  {self.result}" * bool(self.result), f"  ({self.why})" * bool(self.why)
        return f"{self.kind:<12}{self.option}{result}{why}"


@dataclass
class Draft:
    """Our values under dotted keys, which option each is from, and a line for every option."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    lines: list[Fate] = field(default_factory=list)

    def put(self, key: str, value: Any, note: str, *, weak: bool = False) -> None:
        if not (weak and key in self.values):
            self.values[key], self.notes[key] = value, note

    def take(self, key: str) -> Any:
        """The value, which is then there no more."""
        self.notes.pop(key, None)
        return self.values.pop(key, None)

    def say(self, kind: str, option: str, result: str = "", why: str = "") -> None:
        self.lines.append(Fate(kind, option, result, why))


def apply(options: Mapping[str, Any], table: Table, *, spelled: Callable[[str], str], tool: str) -> Draft:
    """`spelled`: an option's name as the user wrote it. The order of the lines is that of the options."""
    made = Draft()
    folders = []
    for name, value in options.items():
        shown = f"{spelled(name)} {_given(name, value)}".rstrip()
        if name in table.rules:
            rule = _resolved(table.rules[name], options)
            folders += [(rule, value, shown)] if rule.below else []
            _apply(rule, value, shown, made)
        elif name in table.meaningless:
            made.say("meaningless", shown, why=table.meaningless[name])
        elif entry := table.left_out.get(name) or table.left_out.get(f"{name.partition('.')[0]}.*"):
            why, idle = entry if isinstance(entry, list) else (entry, None)
            made.say("meaningless" if value in (idle, False, None, "") else "left out", shown, why=why)
        else:
            near = suggest(name, table.names)
            hint = f"; {near}" if near.startswith("did you mean") else ""
            made.say("unknown", shown, why=f"no option of {tool} that is known here{hint}")
    for name, rule in table.rules.items():
        rule = _resolved(rule, options)
        if name not in options and rule.absent is not None:
            _apply(
                rule, rule.absent, f"{spelled(name)} {_given(name, rule.absent)}, its default", made,
                weak=True
            )
    for rule, value, shown in folders:
        for key, path in rule.below.items():
            path, pattern = path if isinstance(path, list) else (path, "")
            if re.search(pattern, str(value), re.IGNORECASE):
                made.put(key, f"{str(value).rstrip('/')}/{path}" if path else value, shown, weak=True)
    return made


def _resolved(rule: Becomes, options: Mapping[str, Any]) -> Becomes:
    return next(
        (Becomes.of(other) for name, other in rule.instead.items() if options.get(name) not in (None, False)),
        rule
    )


def _apply(rule: Becomes, value: Any, shown: str, made: Draft, *, weak: bool = False) -> None:
    if weak and rule.to in made.values:
        return
    why, ours = rule.why, value
    if rule.values is not None:
        known = {str(key).lower(): entry for key, entry in rule.values.items()}
        if str(value).lower() not in known and value is False:
            return made.say("mapped", shown, "off, as it is here")
        entry = known.get(str(value).lower(), rule.otherwise)
        if entry is None:
            if str(value).lower() in known:
                return made.say("mapped", shown, "as it is here")
            legal = ", ".join(map(str, rule.values))
            return made.say("left out", shown, why=f"no such {rule.to or 'value'} here; known: {legal}")
        ours, reason = (
            entry if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
            else (entry, "")
        )
        why = reason or why
    if rule.to is None and not rule.below:
        made.say("meaningless", shown, why=why)
    else:
        ours = ours if rule.times is None else _times(ours, rule)
        ours = {rule.inside: ours} if rule.inside else ours
        if rule.to is not None:
            made.put(rule.to, ours, shown)
        result = f"{rule.to}: {brief(ours)}" if rule.to else ", ".join(rule.below)
        made.say("changed" if why else "mapped", shown, result, why)
    for key, extra in rule.also.items():
        made.put(key, extra, shown, weak=True)


def _times(value: Any, rule: Becomes) -> float:
    try:
        return round(float(value) * (rule.times or 1), 10)
    except (TypeError, ValueError):
        raise ConfigError(f"{value!r} for {rule.to}: expected a number") from None


def _given(name: str, value: Any) -> str:
    """As it was typed; what is secret is not repeated."""
    return "..." if PRIVATE.search(name) else "" if value is True else brief(value)


def brief(value: Any) -> str:
    text = (
        json.dumps(value) if isinstance(value, bool) else " ".join(map(str, value))
        if isinstance(value, list) else str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


def flat(
    raw: Mapping[str, Any], prefix: str = "", *, whole: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Sections as dotted names; `whole` are left as they are."""
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in whole:
            yield from flat(value, f"{name}.", whole=whole)
        else:
            yield name, value


