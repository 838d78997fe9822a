"""The records of a shard set and their JSON.

A set is a directory: manifest.json, a folder of tars per column, and empty_text.safetensors (the fields of the empty
caption). Tar i of every column holds the same keys in the same order; a tar holds one bucket. Beside each tar lies its
index (NAME.idx: members, offsets, sizes, checksums), for readers that fetch byte ranges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from shards.atomic import write_text
from shards.errors import ShardError

FORMAT = "hvtrain-shards"
VERSION = 2
MANIFEST = "manifest.json"
EMPTY_TEXT = "empty_text.safetensors"
IMPORTED = "imported: "  # begins the fingerprint of a column that another program encoded
SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
SAFE_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class TarFile:
    """One tar of one column. `path` is relative to the set."""

    path: str
    n_bytes: int
    checksum: str  # xxh3-128 of the file
    skeleton: str = ""  # xxh3-64 of all its bytes but the tensors': headers, padding, JSON; "" is not checked


@dataclass(frozen=True)
class Chunk:
    """The tars with the same index in every column: the same keys, all of one bucket."""

    bucket: str  # FxHxW of the pixels
    keys: tuple[str, ...]
    tars: Mapping[str, TarFile]  # by column
    repeats: int = 1  # how often an epoch shows each of its samples
    caption_dropout: float | None = None  # None: what the training config says


@dataclass(frozen=True)
class Manifest:
    columns: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    encoders: Mapping[str, str] = field(default_factory=dict)  # column -> fingerprint of what made it
    dataset: str = ""  # hash of the dataset's settings

    @property
    def n_samples(self) -> int:
        """Samples of an epoch."""
        return sum(len(chunk.keys) * chunk.repeats for chunk in self.chunks)

    @property
    def n_keys(self) -> int:
        return sum(len(chunk.keys) for chunk in self.chunks)


def save_manifest(root: Path, manifest: Manifest) -> None:
    """One line per chunk: a set of a million samples stays a file that tools can page through."""
    head = {
        "format": FORMAT, "version": VERSION, "columns": list(manifest.columns), "encoders": dict(manifest.encoders),
        "dataset": manifest.dataset,
    }
    lines = [json.dumps(_chunk_row(chunk), ensure_ascii=False) for chunk in manifest.chunks]
    body = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "chunks": [\n' + ",\n".join(lines) + "\n]}\n"
    write_text(root / MANIFEST, body)


def _chunk_row(chunk: Chunk) -> dict[str, Any]:
    row: dict[str, Any] = {"bucket": chunk.bucket, "repeats": chunk.repeats}
    if chunk.caption_dropout is not None:
        row["caption_dropout"] = chunk.caption_dropout
    row["tars"] = {column: vars(tar) for column, tar in chunk.tars.items()}
    return {**row, "keys": list(chunk.keys)}


def load_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not path.is_file():
        raise ShardError(f"{root}: no shard set here ({MANIFEST} is missing); `hvtrain encode` writes one")
    try:
        return parse_manifest(path.read_text(encoding="utf-8"), where=str(path))
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: damaged manifest ({error}); encode again to mend it") from None


def parse_manifest(text: str, *, where: str) -> Manifest:
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise ShardError(
                f"{where}: format {raw['format']!r} version {raw['version']!r}, this program reads {FORMAT!r} {VERSION}; "
                "encode again"
            )
        columns = tuple(raw["columns"])
        chunks = tuple(_chunk(c, columns) for c in raw["chunks"])
        return Manifest(columns, chunks, dict(raw["encoders"]), raw["dataset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{where}: damaged manifest ({type(error).__name__}: {error}); encode again to mend it") from None


def _chunk(raw: Mapping[str, Any], columns: Sequence[str]) -> Chunk:
    tars = {column: TarFile(**tar) for column, tar in raw["tars"].items()}
    for tar in tars.values():
        inside = PurePosixPath(tar.path)
        if inside.is_absolute() or ".." in inside.parts or "\\" in tar.path:
            raise ShardError(f"manifest names a tar outside the set: {tar.path!r}")
    for column in columns:
        if not SAFE_COLUMN.fullmatch(column):
            raise ShardError(f"manifest names a column {column!r}: expected lower-case letters, digits and '_'")
    repeats = raw.get("repeats", 1)
    if not isinstance(repeats, int) or repeats < 1:
        raise ShardError(f"manifest: repeats is {repeats!r}, expected 1 or more")
    return Chunk(raw["bucket"], tuple(raw["keys"]), tars, repeats, raw.get("caption_dropout"))


def check_key(key: str) -> str:
    """Keys become member names, so they are plain: letters, digits, - and _."""
    if not SAFE_KEY.fullmatch(key):
        raise ShardError(f"sample key {key!r}: expected letters, digits, '-' and '_' only, at most 200 of them")
    return key


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_suffix(".idx")
