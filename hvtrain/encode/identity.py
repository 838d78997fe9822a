"""Which encoder a column is made by, remembered by the sizes and times of its files: what
is all there needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shards.atomic import write_text

ENCODERS = ".encoders.json"  # beside the set; without it the encoders are only loaded once more


def signature(files: Iterable[str | None], settings: object) -> str:
    """Of weights and tokenizers, each a file or a directory, as they lie on the
    disk, and of how they are used."""
    parts = [repr(settings)]
    for name in files:
        place = Path(name) if name else None
        found = sorted(place.rglob("*")) if place and place.is_dir() else [place] if place else []
        for file in found:
            status = file.stat()
            parts.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
        parts.append("/")
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def remembered(root: Path, column: str, signed: str) -> str | None:
    """The fingerprint of the encoder that an earlier run opened with this signature."""
    return _read(root).get(f"{column} {signed}")


def remember(root: Path, column: str, signed: str, fingerprint: str) -> None:
    kept = {key: value for key, value in _read(root).items() if key.split()[0] != column}
    write_text(root / ENCODERS, json.dumps({**kept, f"{column} {signed}": fingerprint}))


def _read(root: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads((root / ENCODERS).read_text())
        if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
            return found
    return {}
