"""Files of a set, opened warily: it may come from anyone."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from shards.errors import ShardError

MAX_DEPTH = 32  # of nested lists and objects in a sample's JSON
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def open_plain(path: Path) -> int:
    """A handle for reading. Never waits for the other end of a pipe; raises ShardError for what is no plain
    file, OSError if it cannot be opened."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ShardError(f"{path}: not a plain file but a pipe, a device or a directory; refused")
    return handle


def read_plain(path: Path) -> bytes:
    with open(open_plain(path), "rb") as file:
        return file.read()


def inside(root: Path, name: str) -> Path:
    """root/name, which may be a link, but not one that leads out of the set."""
    path = root / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise ShardError(
            f"{path}: a link that leads out of the set, to {os.path.realpath(path)}; refused: copy what it "
            "leads to into the set"
        )
    return path


def parse_json(data: bytes) -> Any:
    """Any JSON; raises ValueError if it is none, nests deeper than Python likes, or an
    object says one thing twice."""
    try:
        return json.loads(data, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_row(data: bytes) -> dict[str, Any]:
    """A sample's JSON: an object that can be written again. Raises ValueError."""
    row = parse_json(data)
    if not isinstance(row, dict):
        raise ValueError(f"expected keys and values, found {type(row).__name__}")
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(row, MAX_DEPTH)
    if _SURROGATE.search(data):
        json.dumps(row, ensure_ascii=False).encode()  # half a character is a ValueError
    return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{ascii(next(n for n in names if names.count(n) > 1))[:80]} is given twice")
    return found


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _check_depth(item, left - 1)
