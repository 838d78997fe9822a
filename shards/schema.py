"""The records of a shard set and their JSON.

A set is a directory: manifest.json, a folder of tars per column, and empty_text.safetensors (the fields of the empty
caption). Tar i of every column holds the same keys in the same order; a tar holds one bucket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.atomic import write_text
from shards.errors import ShardError

FORMAT = "hvtrain-shards"
VERSION = 1
MANIFEST = "manifest.json"
EMPTY_TEXT = "empty_text.safetensors"
SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")


@dataclass(frozen=True)
class TarFile:
    """One tar of one column. `path` is relative to the set."""

    path: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """The tars with the same index in every column: the same keys, all of one bucket."""

    bucket: str  # FxHxW of the pixels
    keys: tuple[str, ...]
    tars: Mapping[str, TarFile]  # by column
    repeats: int = 1  # how often an epoch shows each of its samples


@dataclass(frozen=True)
class Manifest:
    columns: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    encoders: Mapping[str, str] = field(default_factory=dict)  # column -> fingerprint of what made it
    dataset: str = ""  # hash of the dataset's settings

    @property
    def n_samples(self) -> int:
        return sum(len(chunk.keys) * chunk.repeats for chunk in self.chunks)


def save_manifest(root: Path, manifest: Manifest) -> None:
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_text(root / MANIFEST, json.dumps(body, indent=1) + "\n")


def load_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not path.is_file():
        raise ShardError(f"{root}: no shard set here ({MANIFEST} is missing); `hvtrain encode` writes one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise ShardError(
                f"{path}: format {raw['format']!r} version {raw['version']!r}, this program reads {FORMAT!r} {VERSION}"
            )
        chunks = tuple(_chunk(c) for c in raw["chunks"])
        return Manifest(tuple(raw["columns"]), chunks, dict(raw["encoders"]), raw["dataset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: damaged manifest ({type(error).__name__}: {error}); encode again to mend it") from None


def _chunk(raw: Mapping[str, Any]) -> Chunk:
    tars = {column: TarFile(**tar) for column, tar in raw["tars"].items()}
    for tar in tars.values():
        inside = Path(tar.path)
        if inside.is_absolute() or ".." in inside.parts:
            raise ShardError(f"manifest names a tar outside the set: {tar.path!r}")
    return Chunk(raw["bucket"], tuple(raw["keys"]), tars, raw.get("repeats", 1))


def check_key(key: str) -> str:
    """Keys become member names, so they are plain: letters, digits, - and _."""
    if not SAFE_KEY.fullmatch(key):
        raise ShardError(f"sample key {key!r}: expected letters, digits, '-' and '_' only, at most 200 of them")
    return key
