"""The records of a shard set and their JSON.

A set is a directory: manifest.json, a folder of tars per column, and empty_text.safetensors (the
fields of the empty caption). Tar i of every column holds the same keys in the same order; a tar
holds one bucket. Beside each tar lies its index (NAME.idx: members, offsets, sizes, checksums), for
readers that fetch byte ranges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.atomic import write_text
from shards.errors import ShardError
from shards.files import inside, parse_json, read_plain
from shards.names import check_bucket, check_column, check_field, check_keys, check_once, check_tar_path

FORMAT = "hvtrain-shards"
VERSION = 3
OLD = 2  # still read: it says of a column nothing but its fingerprint
MANIFEST = "manifest.json"
EMPTY_TEXT = "empty_text.safetensors"
IMPORTED = "imported: "  # begins the fingerprint of a column that another program encoded
MAX_BYTES = 1 << 62  # of a tar
MAX_REPEATS = 1_000_000
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_SKELETON = re.compile(r"([0-9a-f]{16})?")
_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,39}")
# fields of sets that do not say: those of version 2, and what earlier versions indexed
RAGGED = frozenset({"text"})


@dataclass(frozen=True)
class TarFile:
    """One tar of one column. `path` is relative to the set."""

    path: str
    n_bytes: int
    checksum: str  # xxh3-128 of the file
    skeleton: str = ""  # xxh3-64 of all its bytes but the tensors': headers, padding, JSON; "" is not checked

    def __post_init__(self) -> None:
        check_tar_path(self.path)
        check_int(f"size of {self.path}", self.n_bytes, 0, MAX_BYTES)
        for pattern, value in ((_CHECKSUM, self.checksum), (_SKELETON, self.skeleton)):
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise ShardError(
                    f"{self.path}: {ascii(value)[:80]} is no checksum: expected {pattern.pattern}"
                )


@dataclass(frozen=True)
class Chunk:
    """The tars with the same index in every column: the same keys, all of one bucket."""

    bucket: str  # FxHxW of the pixels
    keys: tuple[str, ...]
    tars: Mapping[str, TarFile]  # by column
    repeats: int = 1  # how often an epoch shows each of its samples
    caption_dropout: float | None = None  # None: what the training config says

    def __post_init__(self) -> None:
        check_bucket(self.bucket)
        if not self.keys:
            raise ShardError("a tar without samples: expected one or more")
        check_keys(self.keys)
        for column in self.tars:
            check_column(column)
        check_int("repeats", self.repeats, 1, MAX_REPEATS)
        rate = self.caption_dropout
        if (
            rate is not None
            and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1)
        ):
            raise ShardError(f"caption_dropout is {ascii(rate)[:80]}: expected 0 to 1")


@dataclass(frozen=True)
class Stored:
    """A field of a column: one sample's tensor, None for a size that varies. If the first does,
    a batch pads it with zeros."""

    dims: tuple[int | None, ...]
    dtype: str  # torch's name

    def __post_init__(self) -> None:
        for n in self.dims:
            if n is not None:
                check_int("a field's size", n, 0, MAX_BYTES)
        if not isinstance(self.dtype, str) or not _DTYPE.fullmatch(self.dtype):
            raise ShardError(f"a field's dtype is {ascii(self.dtype)[:80]}: expected one like bfloat16")

    @property
    def ragged(self) -> bool:
        return bool(self.dims) and self.dims[0] is None

    def fits(self, shape: Sequence[int], dtype: str) -> bool:
        return dtype == self.dtype and len(shape) == len(self.dims) and all(
            want in (None, n) for want, n in zip(self.dims, shape)
        )

    def __str__(self) -> str:
        return " x ".join("any" if n is None else str(n) for n in self.dims) + f" {self.dtype}"


@dataclass(frozen=True)
class Made:
    """What made a column and what is in it. "" and nothing: not known."""

    fingerprint: str = ""
    model: str = ""
    parts: tuple[str, ...] = ()  # of the model, by name
    fields: Mapping[str, Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for text in (self.fingerprint, self.model, *self.parts):
            if not isinstance(text, str) or not text.isprintable():
                raise ShardError(f"a fingerprint or name is {ascii(text)[:80]}: expected printable letters")
        for name in self.fields:
            check_field(name)

    @property
    def imported(self) -> bool:
        """By another program: there is no fingerprint to compare, and no empty caption."""
        return self.fingerprint.startswith(IMPORTED)

    @property
    def encoder(self) -> str:
        """The fingerprint of the weights alone; dtype and seed, which follow it, may
        differ. "" where there is none."""
        return "" if self.imported else self.fingerprint.split("/")[0]


@dataclass(frozen=True)
class Manifest:
    """Raises ShardError, as the records in it do, for a name or number that no set
    may hold, whoever wrote it."""

    columns: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    made: Mapping[str, Made] = field(default_factory=dict)  # by column
    dataset: str = ""  # hash of the dataset's settings

    def __post_init__(self) -> None:
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ShardError(f"columns are {ascii(self.columns)[:80]}: expected one or more, each once")
        for name in (*self.columns, *self.made):
            check_column(name)
        if not isinstance(self.dataset, str) or not self.dataset.isprintable():
            raise ShardError(f"a fingerprint is {ascii(self.dataset)[:80]}: expected printable letters")
        check_once(lambda: (key for chunk in self.chunks for key in chunk.keys), self.n_keys, "key")
        tars = [tar.path for chunk in self.chunks for tar in chunk.tars.values()]
        check_once(lambda: tars, len(tars), "tar")

    def made_by(self, column: str) -> Made:
        return self.made.get(column, Made())

    @property
    def ragged(self) -> frozenset[str]:
        """Fields that a batch pads, and says the lengths of."""
        found: set[str] = set()
        for fields in (self.made_by(column).fields for column in self.columns):
            found |= {name for name, f in fields.items() if f.ragged} if fields else RAGGED
        return frozenset(found)

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
        "format": FORMAT, "version": VERSION, "columns": list(manifest.columns),
        "made": {column: asdict(made) for column, made in manifest.made.items()}, "dataset": manifest.dataset,
    }
    lines = [json.dumps(_chunk_row(chunk), ensure_ascii=False) for chunk in manifest.chunks]
    body = json.dumps(
        head, indent=1, ensure_ascii=False
    )[:-2] + ',\n "chunks": [\n' + ",\n".join(lines) + "\n]}\n"
    write_text(root / MANIFEST, body)


def _chunk_row(chunk: Chunk) -> dict[str, Any]:
    row: dict[str, Any] = {"bucket": chunk.bucket, "repeats": chunk.repeats}
    if chunk.caption_dropout is not None:
        row["caption_dropout"] = chunk.caption_dropout
    row["tars"] = {column: vars(tar) for column, tar in chunk.tars.items()}
    return {**row, "keys": list(chunk.keys)}


def load_manifest(root: Path) -> Manifest:
    path = inside(root, MANIFEST)
    if not path.is_file():
        raise ShardError(f"{root}: no shard set here ({MANIFEST} is missing); `hvtrain encode` writes one")
    try:
        data = read_plain(path)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_manifest(data, where=str(path))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    try:
        raw = parse_json(data)
        if raw["format"] != FORMAT or raw["version"] not in (OLD, VERSION):
            raise ShardError(
                f"format {ascii(raw['format'])[:80]} version {ascii(raw['version'])[:80]}, this program "
                f"reads {FORMAT!r} {VERSION}; encode again"
            )
        chunks = tuple(map(_chunk, _list(raw["chunks"])))
        made = (
            {c: Made(name) for c, name in raw["encoders"].items()}
            if raw["version"] == OLD else _made(raw["made"])
        )
        return Manifest(tuple(_list(raw["columns"])), chunks, made, raw["dataset"])
    except ShardError as error:
        raise ShardError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{where}: damaged manifest ({type(error).__name__}: {error}); encode again to mend it"
        ) from None


def _chunk(raw: Mapping[str, Any]) -> Chunk:
    tars = {column: TarFile(**tar) for column, tar in raw["tars"].items()}
    return Chunk(
        raw["bucket"], tuple(_list(raw["keys"])), tars, raw.get("repeats", 1), raw.get("caption_dropout")
    )


def _made(raw: Mapping[str, Any]) -> dict[str, Made]:
    return {
        column: Made(row["fingerprint"], row["model"], tuple(_list(row["parts"])), {
            name: Stored(tuple(_list(f["dims"])), f["dtype"]) for name, f in row["fields"].items()
        })
        for column, row in raw.items()
    }


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {ascii(value)[:80]}")
    return value


def check_int(what: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ShardError(f"{what} is {ascii(value)[:80]}: expected a whole number from {least} to {most}")
    return value


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_suffix(".idx")
