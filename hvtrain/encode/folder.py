"""The directory that a set is made in: whose it is, what stays of earlier runs,
and its manifest at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvtrain.encode.clips import Rejected
from hvtrain.encode.columns import ColumnKind
from hvtrain.encode.progress import PROGRESS
from hvtrain.encode.samples import PlannedChunk, hashed
from hvtrain.encode.writer import JOURNAL, REJECTED, Known, Tally, Written, shrink
from hvtrain.errors import DataError
from hvtrain.models.spec import Field, ModelSpec
from hvtrain.parallel.context import ParallelContext
from shards import open_set
from shards.atomic import write_text
from shards.collate import VARIANT
from shards.schema import EMPTY_TEXT, MANIFEST, Chunk, Made, Manifest, Stored, save_manifest
from shards.tar import open_local
from shards.writer import remove_tar


@dataclass(frozen=True)
class Folder:
    """The directory, and this rank among those that fill it."""

    root: Path
    ctx: ParallelContext

    def file(self, name: str) -> Path:
        """This rank's own of a kind."""
        return self.root / f"{name}.{self.ctx.rank}"


@dataclass(frozen=True)
class Filled:
    """A column, as far as this rank made it."""

    kind: ColumnKind
    made: Made  # but for its fields
    rows: dict[int, Written]  # by the number of the chunk
    tally: Tally

    def lost(self, chunks: Sequence[PlannedChunk]) -> set[str]:
        """Samples that could not be made."""
        return {s.key for n, row in self.rows.items() for s in chunks[n].samples} - {
            s.key for row in self.rows.values() for s in row.samples
        }


def claim(folder: Folder, columns: Iterable[str]) -> None:
    """Refuse a directory that holds other things; remove what a killed run left half-written."""
    problem, root = None, folder.root
    if folder.ctx.is_main:
        old = Known(root).manifest
        known = {MANIFEST, EMPTY_TEXT, REJECTED, *columns, *(old.columns if old else ())}
        if root.exists() and not root.is_dir():
            problem = f"output: {root} is a file; give a directory"
        here = [p.name for p in root.iterdir()] if root.is_dir() else []
        strangers = [name for name in here if name not in known and not name.startswith(".")]
        if strangers:
            problem = (
                f"output: {root} holds other files ('{sorted(strangers)[0]}'); choose an empty or new "
                "directory"
            )
        if problem is None:
            try:
                root.mkdir(parents=True, exist_ok=True)
                for left in [*root.glob(".*.tmp"), *root.glob("*/.*.tmp"), *root.glob(f"{PROGRESS}.*")]:
                    left.unlink()
            except OSError as error:
                problem = f"output: {root} cannot be written ({error.strerror})"
    problem = folder.ctx.gather_objects(problem)[0]
    if problem:
        raise DataError(problem)


def carried(root: Path, manifest: Manifest | None, asked: Iterable[str], spec: ModelSpec) -> list[str]:
    """Columns of an earlier run that stay. Raises DataError for another model's:
    with them it would be no set."""
    others = [c for c in manifest.columns if c not in asked] if manifest else []
    for column in others:
        if manifest and (model := manifest.made_by(column).model) not in ("", spec.name):
            raise DataError(
                f"output: {root} holds column '{column}' of {model}, this is {spec.name}; choose another "
                f"directory, or encode it as well: columns=[..., {column}]"
            )
    return others


def finish(
    folder: Folder, filled: Sequence[Filled], chunks: Sequence[PlannedChunk], refused: Sequence[Rejected]
) -> int:
    """Collective: leave out what a column could not make, write the manifest and the list of the refused,
    then remove the tars that only the runs before made. Returns the samples of an epoch, on rank 0."""
    ctx, root = folder.ctx, folder.root
    own = [
        {
            n: shrink(f.kind, root, f.made.fingerprint, row, chunks[n], folder.file(JOURNAL)) for n,
            row in f.rows.items()
        }
        for f in filled
    ]
    shares = ctx.gather_objects(own)
    if ctx.is_main:
        written = [{n: row for share in shares for n, row in share[i].items()} for i in range(len(filled))]
        rows = []
        for number, chunk in enumerate(chunks):
            if chunk.samples:
                first, keys = chunk.samples[0], tuple(s.key for s in chunk.samples)
                tars = {f.kind.name: found[number].tar for f, found in zip(filled, written)}
                rows.append(Chunk(chunk.bucket, keys, tars, first.repeats, first.caption_dropout))
        if not rows:
            raise DataError(f"every sample was refused; the first reason: {refused[0].reason}")
        before = set(Known(root).tars)
        made = {
            f.kind.name: replace(
                f.made, fields=f.made.fields or stored(root, f.kind.name, f.kind.fields, rows)
            )
            for f in filled
        }
        save_manifest(root, Manifest(tuple(made), tuple(rows), made, _dataset_hash(filled, chunks)))
        write_text(root / REJECTED, "".join(row.row() + "\n" for row in refused))
        for name in before - {tar.path for row in rows for tar in row.tars.values()}:
            remove_tar(root / name)
        for left in [*root.glob(f"{JOURNAL}.*"), *root.glob(f".{REJECTED}.*")]:
            left.unlink()
        if not refused:
            (root / REJECTED).unlink()
    ctx.barrier()
    return len(open_set(root)) if ctx.is_main else 0  # the last check


def _dataset_hash(filled: Sequence[Filled], chunks: Sequence[PlannedChunk]) -> str:
    """Of all that the set's tensors are a function of."""
    columns = sorted((f.kind.name, f) for f in filled)
    return hashed(
        *[f.kind.digest(s, f.made.fingerprint) for c in chunks for s in c.samples for _, f in columns]
    )


def stored(root: Path, column: str, fields: Sequence[Field], rows: Sequence[Chunk]) -> dict[str, Stored]:
    """What a column's fields look like: the model says which sizes vary, a sample of each
    bucket which the others are."""
    found = {}
    for tar in {row.bucket: row.tars[column] for row in rows}.values():
        opened = open_local(root / tar.path, tar)
        for name, tensor in opened.tensors(opened.keys()[0]).items():
            if not VARIANT.fullmatch(name):
                told = next((f.dims for f in fields if re.fullmatch(rf"{f.name}(_\d+)?", name)), tensor.shape)
                dims = tuple(n if want is not None else None for n, want in zip(tensor.shape, told))
                found[name] = Stored(dims, str(tensor.dtype).removeprefix("torch."))
    return found
