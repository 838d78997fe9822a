"""Frozen dataclasses from YAML and `key=value` overrides. Strict: an unknown key or
a wrong type is a ConfigError.

Imports nothing heavy: `hvtrain --help` and `hvtrain launch` read configs without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import os
import reprlib
import textwrap
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from hvtrain.errors import ConfigError, suggest

T = TypeVar("T")
MISSING = dataclasses.MISSING
COMMAND_LINE = "command line"
_TEXT, _TEXTS = (str, str | None), tuple[str, ...]
_NULL = ("null", "~")


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value of an override: a mistake in it is the command line's, not the file's."""

    value: Any
    text: str

    def meant(self, kind: Any) -> Any:
        """The YAML in it, but where text is wanted what was typed: `a cat: #3`, 007 and
        2024-01-01 are prompts and names."""
        if kind not in _TEXT and (kind != _TEXTS or isinstance(self.value, list)):
            return self.value
        quoted = (
            isinstance(self.value, str) and self.text[:1] == self.text[-1:] and self.text[:1] in ("'", '"')
        )
        return self.value if quoted or self.text in _NULL else self.text


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of `cls` from a YAML file (which may name a `base:` file) and
    dotted `a.b=value` overrides."""
    raw = _read(Path(path), ()) if path is not None else {}
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign:
            raise ConfigError(f"'{item}': an override is written key=value, as in optim.lr=1e-4")
        _set(raw, key, _Given(_value(item, text), text))
    where = str(path) if path is not None else COMMAND_LINE
    return build(cls, raw, where=where)


def override(key: str, value: Any) -> str:
    """The `key=value` that `load` reads as exactly this value, whatever is in it."""
    text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return f"{key}={text.strip()[1:-1]}"


def build(cls: type[T], raw: Mapping[str, Any], *, where: str, prefix: str = "") -> T:
    """An instance of the dataclass `cls` from plain values; `prefix` is the section's dotted name."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    raw = _with_rest(cls, raw, fields)
    for key in raw:
        if key not in fields:
            origin = COMMAND_LINE if isinstance(raw[key], _Given) else where
            raise ConfigError(f"{origin}: unknown key '{prefix}{key}'; {_nearest(str(key), cls, prefix)}")
    values = {}
    for name, f in fields.items():
        if name in raw:
            kind = hints[name] | None if f.default is None else hints[name]
            values[name] = _convert(raw[name], kind, where=where, key=prefix + name)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(
                f"{where}: key '{prefix}{name}' is required; give it there or as {prefix}{name}=..."
            )
    try:
        return cls(**values)
    except ConfigError as error:  # of a record that looks at its own values
        raise ConfigError(f"{where}: {error}") from None


def _with_rest(cls: type, raw: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a dataclass has a field for the keys that it does not name (REST), they go
    there: text, or null for none."""
    rest = getattr(cls, "REST", None)
    renamed: Mapping[str, str] = getattr(cls, "renamed", lambda raw: {})(raw)
    raw = {renamed.get(key, key): value for key, value in raw.items()}
    others = {key: value for key, value in raw.items() if key not in fields}
    if rest is None or not others:
        return raw
    own = {key: value for key, value in raw.items() if key in fields}
    given = own.get(rest) or {}
    given = given.value or {} if isinstance(given, _Given) else given
    if isinstance(given, Mapping):  # else its own refusal follows
        own[rest] = {**given, **others}
    return own


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, as YAML and JSON can hold them: what `load` reads back."""
    return plain(dataclasses.asdict(config))


def dump(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def reference(cls: type) -> str:
    """Every key with its default and what it means, as YAML that loads."""
    return "\n".join(_reference(cls, depth=0)) + "\n"


def _reference(cls: type, *, depth: int) -> list[str]:
    hints, notes, pad = typing.get_type_hints(cls), field_notes(cls), "  " * depth
    lines: list[str] = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            lines.append(f"{pad}{f.name}:  # {notes.get(f.name, '')}".rstrip(" #"))
            lines += _reference(kind, depth=depth + 1)  # type: ignore[arg-type]
            continue
        note = notes.get(f.name, "")
        if get_origin(kind) is Literal:
            note += " (" + " | ".join(map(_word, get_args(kind))) + ")"
        default = (
            f.default if f.default is not MISSING else f.default_factory()
            if f.default_factory is not MISSING else None
        )
        shown = yaml.safe_dump(plain(default), default_flow_style=True, width=10_000).splitlines()[0]
        lines += [f"{pad}# {part}" for part in textwrap.wrap(note, 110 - len(pad))]
        lines.append(f"{pad}{f.name}: {shown}")
    return lines


def field_notes(cls: type) -> dict[str, str]:
    """The docstring under each field, those of the dataclasses that it extends too."""
    notes = {}
    for part in [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]:
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body  # type: ignore[attr-defined]
        for here, below in itertools.pairwise(body):
            if (
                isinstance(here, ast.AnnAssign) and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                notes[here.target.id] = " ".join(str(below.value.value).split())  # type: ignore[union-attr]
    return notes


# --- reading ------------------------------------------------------------------------------------------------


class KeyTwice(ValueError):
    """In a YAML mapping."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, which YAML forbids and PyYAML takes silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # PyYAML's own words for it
            line = key_node.start_mark.line + 1
            if key in lines:
                raise KeyTwice(
                    f"key '{key}' is given twice, in line {lines[key]} and in line {line}; keep one"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


# What PyYAML raises, and what its constructors let through of Python for odd values (a
# date in month 13, deep nesting).
_NOT_YAML = (
    yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError
)


def parse_yaml(text: str | bytes) -> Any:
    """Plain values from YAML: UTF-8, or UTF-16 with a byte order mark. A ValueError says in one line what is
    wrong with it, a key that is given twice included."""
    try:
        return yaml.load(text, _Loader)
    except KeyTwice:
        raise
    except _NOT_YAML as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(reason or type(error).__name__) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML file that a user wrote. Raises ConfigError."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file")
        raw = parse_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(raw).__name__}")
    return raw


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    raw = read_yaml(path)
    if "base" not in raw:
        return raw
    named = raw.pop("base")
    if not isinstance(named, str) or not named or "\0" in named:
        raise ConfigError(f"{path}: base is {_shown(named)}, expected the path of another config")
    base = Path(os.path.realpath(path.parent / named))
    if base in seen:
        raise ConfigError(f"{path}: 'base' goes round in a circle through {base}")
    return _merged(_read(base, (*seen, base)), raw)


def _merged(under: dict, over: Mapping) -> dict:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _set(raw: dict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        below = raw.get(name) or {}
        if isinstance(below, _Given):
            below = below.value or {}
        if not isinstance(below, dict):
            raise ConfigError(f"'{key}': '{name}' is a value, not a section")
        raw[name] = dict(below)  # a copy: with a YAML alias, one section may stand in two places
        raw = raw[name]
    raw[last] = value


def _value(item: str, text: str) -> Any:
    try:
        return parse_yaml(text) if text else ""
    except KeyTwice as error:
        raise ConfigError(f"'{item}': {error}") from None
    except ValueError:
        return text  # a prompt with a colon in it is a string


def _nearest(key: str, cls: type, prefix: str) -> str:
    here = [f.name for f in dataclasses.fields(cls)]
    close = suggest(key, here)
    if close.startswith("did you mean"):
        return close.replace("'", f"'{prefix}", 1)
    for f in dataclasses.fields(cls):  # the right name, one section too high
        kind = typing.get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(kind) and key in {g.name for g in dataclasses.fields(kind)}:
            return f"did you mean '{prefix}{f.name}.{key}'?"
    return close


# --- types --------------------------------------------------------------------------------------------------


def _convert(value: Any, kind: Any, *, where: str, key: str) -> Any:
    if isinstance(value, _Given):
        value, where = value.meant(kind), COMMAND_LINE
    origin = get_origin(kind)
    if kind is Any:
        return _number(value) if isinstance(value, str) else value
    if origin in (Union, types.UnionType):
        return _optional(value, kind, where=where, key=key)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in get_args(kind)):  # 1 is not true
            legal = [_word(a) for a in get_args(kind)]
            if isinstance(value, str) and value in legal:
                raise _wrong(value, f"{value} without quotes", where=where, key=key)
            near = suggest(value if isinstance(value, str) else "", legal)
            listed = "" if near.startswith("choose") else f" ({' | '.join(legal)})"
            raise ConfigError(f"{where}: {key} is {_shown(value)}; {near}{listed}")
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            first = dataclasses.fields(kind)[0].name
            raise _wrong(
                value, f"a section with keys of its own, as in {{{first}: {_shown(value)}}}", where=where,
                key=key
            )
        return build(kind, value, where=where, prefix=key + ".")  # type: ignore[arg-type]
    if origin is Mapping:
        return _mapping(value, get_args(kind)[1], where=where, key=key)
    if origin is tuple:
        return _sequence(value, get_args(kind), where=where, key=key)
    return _scalar(value, kind, where=where, key=key)


def _word(choice: object) -> str:
    """As YAML has it."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _optional(value: Any, kind: Any, *, where: str, key: str) -> Any:
    if value is None:
        return None
    inner = next(a for a in get_args(kind) if a is not type(None))
    return _convert(value, inner, where=where, key=key)


def _sequence(value: Any, kinds: tuple, *, where: str, key: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        value = [value]  # shards=PATH means one shard set
    endless = len(kinds) == 2 and kinds[1] is Ellipsis
    if not endless and len(value) != len(kinds):
        raise _wrong(value, f"{len(kinds)} values", where=where, key=key)
    inner = [kinds[0]] * len(value) if endless else list(kinds)
    return tuple(_convert(v, k, where=where, key=f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, inner)))


def _mapping(value: Any, kind: Any, *, where: str, key: str) -> dict[str, Any]:
    """Names to values; null takes a name out, as a `base:` file may have put it in."""
    if not isinstance(value, Mapping):
        raise _wrong(value, "names with values", where=where, key=key)
    plain = {name: v.value if isinstance(v, _Given) and v.text in _NULL else v for name, v in value.items()}
    return {
        str(n): _convert(v, kind, where=where, key=f"{key}.{n}") for n, v in plain.items() if v is not None
    }


def _number(text: str) -> float | str:
    """YAML reads 1e-4 as text."""
    try:
        return float(text)
    except ValueError:
        return text


def _scalar(value: Any, kind: Any, *, where: str, key: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    raise _wrong(value, names.get(kind, str(kind)), where=where, key=key)


def _wrong(value: Any, expected: str, *, where: str, key: str) -> ConfigError:
    return ConfigError(f"{where}: {key} is {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """One short line, whatever it is: a few lines of YAML can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return " ".join(short.repr(value).split())


def plain(value: Any) -> Any:
    """Of records and tuples: what YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
