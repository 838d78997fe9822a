"""What names in a shard set may be. A set may come from anyone, and its names become the names of files.

The records of shards.schema and the readers of tars and indices ask here, so no command meets another name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from shards.errors import ShardError

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
_KEYS = re.compile(rf"(?:{_KEY.pattern}\n)*")
_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,39}")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
_FIELD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_PART = 200  # letters of a tar's or folder's name; splitting puts a few before it


def check_key(key: str) -> str:
    """Keys become member names and file names, so they are plain: letters, digits, - and _."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ShardError(
            f"sample key {_short(key)}: expected letters, digits, '-' and '_' only, at most 200 of them"
        )
    return key


def check_keys(keys: Sequence[str]) -> None:
    """Many at once: a million takes 0.2 s."""
    try:
        text = "\n".join([*keys, ""])
    except TypeError:
        text = ""
    if text.count("\n") != len(keys) or not _KEYS.fullmatch(text):
        for key in keys:
            check_key(key)


def check_column(name: str) -> str:
    if not isinstance(name, str) or not _COLUMN.fullmatch(name):
        raise ShardError(
            f"column {_short(name)}: expected lower-case letters, digits and '_', at most 40 of them"
        )
    return name


def check_bucket(name: str) -> str:
    if not isinstance(name, str) or not _BUCKET.fullmatch(name):
        raise ShardError(
            f"bucket {_short(name)}: expected letters, digits, '-', '_', '+' and '.', at most 200 of them"
        )
    return name


def check_field(name: str) -> str:
    """Tensors of a sample."""
    if not _FIELD.fullmatch(name):
        raise ShardError(
            f"field {_short(name)}: expected letters, digits, '-', '_' and '.', at most 100 of them"
        )
    return name


def check_tar_path(path: str) -> str:
    """Relative to the set, and meaning the same on a disk and in a URL."""
    if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/") or "\\" in path:
        raise ShardError(f"a tar outside the set: {_short(path)}")
    for part in path.split("/"):
        if not part or part == "." or len(part) > _PART or not part.isprintable() or set(part) & set("%?#"):
            raise ShardError(
                f"a tar {_short(path)}: expected FOLDER/NAME.tar of printable letters other than '%', '?' "
                f"and '#', at most {_PART} a part"
            )
    if not path.endswith(".tar"):
        raise ShardError(f"a tar {_short(path)}: expected a name that ends in .tar")
    return path


def check_member(name: str) -> str:
    """A file in a tar."""
    if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise ShardError(f"member {_short(name)} points outside the set; refused")
    if not name or len(name) > 255 or not name.isprintable():
        raise ShardError(f"member {_short(name)}: expected 1 to 255 printable letters; refused")
    return name


def check_once(names: Callable[[], Iterable[str]], n: int, what: str) -> None:
    """No name of n occurs twice. By 8 bytes a name: there may be millions."""
    hashes = np.sort(np.fromiter(map(hash, names()), np.int64, n))
    again, seen = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist()), set()
    for name in names() if again else ():
        if name in seen:
            raise ShardError(f"{what} {name} occurs twice")
        if hash(name) in again:
            seen.add(name)


def _short(value: object) -> str:
    """As Python writes it, so that it cannot steer a terminal."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} letters)"
