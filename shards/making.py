"""A directory that a command makes: killed or out of disk it is continued by the
same command, and by no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from shards.atomic import clear_leftovers, write_text
from shards.errors import ShardError
from shards.reader import ShardSet
from shards.writer import full

MARKER = ".making.json"  # whose directory it is; gone when it is done


@contextmanager
def making(output: str | Path, command: str, sources: Sequence[ShardSet]) -> Iterator[Path]:
    """`output` for `command`, as a person would read it, with the contents of `sources`.

    It must be new, empty, or begun by the same command with the same contents. What is written in it
    must have a name that says what is in it: what is there is kept. Raises ShardError for another
    command's directory, a full disk.
    """
    root, own = Path(output), {"command": command, "contents": [_contents(s) for s in sources]}
    try:
        if not _begun(root, own):
            root.mkdir(parents=True, exist_ok=True)
            write_text(root / MARKER, json.dumps(own, indent=1, ensure_ascii=False) + "\n")
        for folder in [root, *(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink())]:
            clear_leftovers(folder)
        yield root
        (root / MARKER).unlink()
    except OSError as error:
        raise full(error, root) from None


def _begun(root: Path, own: Mapping[str, object]) -> bool:
    if not root.exists() or (root.is_dir() and all(p.name.startswith(f".{MARKER}.") for p in root.iterdir())):
        return False  # at most a kill's half-written marker
    try:
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))
        command = found["command"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ShardError(f"output: {root} holds something already; choose a new or empty directory") from None
    if command != own["command"]:
        raise ShardError(
            f"output: {root} is half made by another command, {ascii(command)[:200]}; run that again to "
            "finish it, remove the directory, or choose another"
        )
    if found != own:
        raise ShardError(
            f"output: {root} is half made, from sets that have changed since; remove the directory, or "
            "choose another"
        )
    return True


def _contents(found: ShardSet) -> str:
    """What a set holds, wherever it lies."""
    m = found.manifest
    rows = [
        [c.bucket, c.repeats, c.caption_dropout, {n: t.checksum for n, t in c.tars.items()}] for c in m.chunks
    ]
    text = json.dumps(
        [m.columns, {c: made.fingerprint for c, made in m.made.items()}, m.dataset, rows], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()
