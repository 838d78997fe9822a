"""Writing columns: what exists already is kept or copied, the rest is encoded; what cannot be is rejected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hvtrain.encode.clips import Rejected
from hvtrain.encode.columns import ColumnKind
from hvtrain.encode.encoders import Encode, Outcome, rejected
from hvtrain.encode.samples import PlannedChunk, PlannedSample
from hvtrain.errors import DataError
from shards.errors import ShardError
from shards.schema import Manifest, TarFile, load_manifest
from shards.tar import Tar, describe, open_local
from shards.writer import TarWriter

REJECTED = "rejected.jsonl"
JOURNAL = ".journal"  # .journal.RANK: tars that a run wrote before it had a manifest


class Known:
    """What an earlier run left in this directory: tars by name, samples by what they are a function of."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest: Manifest | None = None
        with suppress(ShardError):  # no earlier set, or a damaged one: then only the journal counts
            self.manifest = load_manifest(root)
        rows = self.manifest.chunks if self.manifest else ()
        self.tars: dict[str, TarFile | None] = {
            tar.path: tar for chunk in rows for tar in chunk.tars.values()
        }
        for path in sorted(root.glob(f"{JOURNAL}.*")):
            for name in path.read_text().split():
                self.tars.setdefault(name, None)
        self._places: dict[tuple[str, str], tuple[Tar, str]] | None = None

    def entry(self, name: str) -> TarFile | None:
        """The manifest entry of a tar that is there whole."""
        path, known = self.root / name, self.tars.get(name)
        if not path.is_file():
            return None
        if known is not None and path.stat().st_size == known.n_bytes:
            return known
        try:
            return describe(path, name)
        except ShardError:
            return None

    def find(self, column: str, digest: str) -> tuple[Tar, str] | None:
        """The tar and key of a sample that was encoded before."""
        if self._places is None:
            self._places = dict(self._samples())
        return self._places.get((column, digest))

    def _samples(self) -> Iterator[tuple[tuple[str, str], tuple[Tar, str]]]:
        for name, entry in self.tars.items():
            column = name.split("/")[0]
            try:
                tar = open_local(self.root / name, entry)
                for key in tar.keys():
                    yield (column, str(tar.meta(key).get(f"{column}_digest"))), (tar, key)
            except ShardError:
                continue  # damaged or gone: encoded again


@dataclass
class Tally:
    """What this rank did."""

    encoded: int = 0
    copied: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Written:
    """A chunk's column: its tar and what is in it, or None if no sample could be made."""

    tar: TarFile | None
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True)
class ColumnWriter:
    """Writes one column's tars."""

    column: ColumnKind
    root: Path
    encoder: str  # fingerprint
    encode: Encode
    known: Known
    journal: Path
    refuse: Callable[[Rejected], None]
    tally: Tally = field(default_factory=Tally)

    def write(self, chunk: PlannedChunk, advance: Callable[[PlannedSample, bool], None]) -> Written:
        """The chunk's tar; `advance` is told of each sample, and whether it was encoded."""
        entry = self.known.entry(self.column.tar_name(chunk, self.encoder)) if chunk.samples else None
        if entry is not None or not chunk.samples:
            self.tally.kept += len(chunk.samples)
            for s in chunk.samples:
                advance(s, False)
            return Written(entry, chunk.samples)
        old = {
            s.key: self.known.find(self.column.name, self.column.digest(s, self.encoder))
            for s in chunk.samples
        }
        fresh = self.encode([s for s in chunk.samples if old[s.key] is None])
        written = []
        with TarWriter(self.root, self.column.name) as out:
            for s in chunk.samples:
                if self._one(s, old[s.key], fresh, out):
                    written.append(s)
                advance(s, old[s.key] is None)
            if not written:
                return Written(None, ())
            name = self.column.tar_name(PlannedChunk(tuple(written)), self.encoder)
            entry = out.finish(name)
        note(self.journal, name)
        return Written(entry, tuple(written))

    def _one(
        self, s: PlannedSample, old: tuple[Tar, str] | None, fresh: Iterator[Outcome], out: TarWriter
    ) -> bool:
        meta = {**self.column.says(s), f"{self.column.name}_digest": self.column.digest(s, self.encoder)}
        if old is not None:
            tar, key = old
            out.add_bytes(s.key, tar.checked(key), meta)
            self.tally.copied += 1
            return True
        sample, result = next(fresh)
        assert sample is s, (sample.key, s.key)
        if isinstance(result, str):
            self.refuse(rejected(s, result))
            return False
        out.add(s.key, result, meta)
        self.tally.encoded += 1
        return True


def shrink(
    kind: ColumnKind, root: Path, encoder: str, written: Written, keep: PlannedChunk, journal: Path
) -> Written:
    """A chunk's column without samples that another column could not make."""
    if written.tar is None or not keep.samples or len(keep.samples) == len(written.samples):
        return written if keep.samples else Written(None, ())
    name = kind.tar_name(keep, encoder)
    source = open_local(root / written.tar.path, written.tar)
    with TarWriter(root, kind.name) as out:
        for s in keep.samples:
            out.add_bytes(s.key, source.checked(s.key), source.meta(s.key))
        entry = out.finish(name)
    note(journal, name)
    return Written(entry, keep.samples)


def note(path: Path, line: str) -> None:
    """Append a line that survives a kill."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); run the same command again, it continues"
        ) from None


def read_rejected(root: Path) -> list[Rejected]:
    """What earlier runs found to be impossible, whole lines only."""
    found = []
    for path in [root / REJECTED, *sorted(root.glob(f".{REJECTED}.*"))]:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found.append(Rejected(**json.loads(line)))
            except (ValueError, TypeError):
                continue  # cut off by a kill: the sample is tried again
    return found


def copier(column: str, root: Path) -> Encode:
    """For a column that is not encoded now: nothing may be missing from it."""

    def encode(samples: Sequence[PlannedSample]) -> Iterator[Outcome]:
        if samples:
            raise DataError(
                f"{root}: its column '{column}' lacks {len(samples)} of the samples of this dataset, first "
                f"'{samples[0].key}'; encode it as well: columns=[..., {column}]"
            )
        return iter(())

    return encode

