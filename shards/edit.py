"""Sets out of sets: merged, split, indexed, exported. Samples are copied as bytes after
their checksum was compared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save
from torch import Tensor

from shards.atomic import atomic_path, write_text
from shards.collate import VARIANT
from shards.errors import ShardError
from shards.files import inside
from shards.making import making
from shards.names import check_bucket, check_column
from shards.reader import ShardSet, open_set
from shards.schema import (
    EMPTY_TEXT,
    IMPORTED,
    MANIFEST,
    RAGGED,
    Chunk,
    Made,
    Manifest,
    Stored,
    TarFile,
    index_path,
    save_manifest,
)
from shards.tar import Tar, describe, open_local
from shards.ways import Division, Portion
from shards.writer import TarWriter, full

SPLIT = "split.json"


# --- merge --------------------------------------------------------------------------------------------------


def merge(sources: Sequence[str], output: str | Path) -> ShardSet:
    """Several sets as one. Whole tars are hard links where the disk allows it; a sample
    that two sets hold counts once.

    Raises ShardError if columns or encoders differ, or one key stands for two
    contents. Killed, it is continued.
    """
    sets = [open_set(s) for s in sources]
    with making(output, f"shards merge {' '.join(s.name for s in sets)}", sets) as root:
        rows = tuple(_take(found, chunk, keys, root) for found, chunk, keys in _each_once(sets))
        _copy_empty_text(sets[0], root)
        dataset = hashlib.sha256("".join(s.manifest.dataset for s in sets).encode()).hexdigest()
        save_manifest(root, Manifest(sets[0].manifest.columns, rows, _known(sets), dataset))
    return open_set(root)


def _each_once(sets: Sequence[ShardSet]) -> list[tuple[ShardSet, Chunk, list[str]]]:
    """What to take of which set."""
    for found in sets[1:]:
        for what, here, there in zip(("columns", "encoders"), _alike(sets[0]), _alike(found)):
            if here != there:
                raise ShardError(
                    f"{found.name} has {what} {_shown(there)}, {sets[0].name} has {_shown(here)}: encode "
                    "both the same way"
                )
    seen: dict[str, tuple[ShardSet, Chunk]] = {}
    taken = []
    for found in sets:
        for chunk in found.manifest.chunks:
            keys = [key for key in chunk.keys if not _held(key, found, chunk, seen)]
            seen |= dict.fromkeys(keys, (found, chunk))
            if keys:
                taken.append((found, chunk, keys))
    return taken


def _alike(found: ShardSet) -> tuple[list[str], dict[str, str]]:
    """What sets have in common that can be one."""
    return sorted(found.manifest.columns), {c: made.fingerprint for c, made in found.manifest.made.items()}


def _known(sets: Sequence[ShardSet]) -> dict[str, Made]:
    """Of each column what the first set knows that knows most: older sets say nothing of fields."""
    every = [found.manifest.made for found in sets]
    for column in every[0]:
        told = [(s, made[column].fields) for s, made in zip(sets, every) if made[column].fields]
        for other, fields in told[1:]:
            if fields != told[0][1]:
                raise ShardError(
                    f"column '{column}' of {other.name} holds {_fields(fields)}, that of {told[0][0].name} "
                    f"{_fields(told[0][1])}: encode both the same way"
                )
    return {
        column: max((made[column] for made in every), key=lambda m: bool(m.fields)) for column in every[0]
    }


def _fields(fields: Mapping[str, Stored]) -> str:
    return ", ".join(f"{name} {stored}" for name, stored in fields.items())


def _held(key: str, found: ShardSet, chunk: Chunk, seen: Mapping[str, tuple[ShardSet, Chunk]]) -> bool:
    if key not in seen:
        return False
    other, place = seen[key]
    for column in found.manifest.columns:
        if bytes(found.tar(chunk, column).checked(key)) != bytes(other.tar(place, column).checked(key)):
            raise ShardError(
                f"sample {key} differs in '{column}' between {other.name} and {found.name}; remove one of "
                "them first"
            )
    return True


def pick(sources: Sequence[str], output: str | Path, n: int) -> int:
    """At most n samples of several sets, evenly spread over them, as one set; how many.
    What is there already stays."""
    if (Path(output) / MANIFEST).exists():
        return open_set(output).manifest.n_keys
    sets = [open_set(s) for s in sources]
    rows = _each_once(sets)
    whole = sum(len(keys) for _, _, keys in rows)
    wanted = {(2 * i + 1) * whole // (2 * min(n, whole)) for i in range(min(n, whole))}
    with making(output, f"shards pick {n} of {' '.join(s.name for s in sets)}", sets) as root:
        chunks, at = [], 0
        for found, chunk, keys in rows:
            chosen = [key for i, key in enumerate(keys, start=at) if i in wanted]
            at += len(keys)
            if chosen:
                chunks.append(replace(_take(found, chunk, chosen, root), repeats=1))
        _copy_empty_text(sets[0], root)
        save_manifest(root, replace(sets[0].manifest, chunks=tuple(chunks)))
    return len(wanted)


# --- split --------------------------------------------------------------------------------------------------


def split(source: str, output: str | Path, rule: Division, *, keep: int = 0) -> list[Portion]:
    """One set per part under output/NAME, and split.json that says which is which. Killed, it is continued.

    `keep`: so many samples of the part `rest` go to one of their own, spread over it: of
    what the base knows, for merging.
    """
    found = open_set(source)
    parts, where = rule.assign(found)
    if keep:
        parts, rule = _keep_aside(parts, where, keep), replace(rule, text=f"{rule.text} --keep {keep}")
    rows: list[list[tuple[Chunk, list[str]]]] = [[] for _ in parts]
    for chunk in found.manifest.chunks:
        dealt = defaultdict(list)
        for key in chunk.keys:
            dealt[where[key]].append(key)
        for number, keys in dealt.items():
            rows[number].append((chunk, keys))
    parts = [replace(part, samples=sum(len(keys) for _, keys in mine)) for part, mine in zip(parts, rows)]
    for part in parts:
        if not part.samples:
            raise ShardError(
                f"part {part.name} ({part.rule}) would be empty; nothing in {found.name} belongs to it"
            )
    with making(output, f"shards split {found.name} {rule.text}", [found]) as root:
        for part, mine in zip(parts, rows):
            _write_part(found, mine, root / part.name)
        body = {"source": found.name, "parts": [vars(part) for part in parts]}
        write_text(root / SPLIT, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return parts


def _keep_aside(parts: list[Portion], where: dict[str, int], n: int) -> list[Portion]:
    rest = next((i for i, part in enumerate(parts) if part.name == "rest"), None)
    keys = [key for key, number in where.items() if number == rest]
    if not 0 < n < len(keys):
        raise ShardError(
            f"--keep {n}: takes samples that no --caption pattern matches, and leaves some; there are "
            f"{len(keys)}"
        )
    where |= dict.fromkeys((keys[(2 * i + 1) * len(keys) // (2 * n)] for i in range(n)), len(parts))
    return [*parts, Portion("keep", "kept aside of rest, for --reconcile")]


def _write_part(found: ShardSet, rows: Sequence[tuple[Chunk, Sequence[str]]], folder: Path) -> None:
    if (folder / MANIFEST).exists():
        return  # written last: a run before this one was through with it
    folder.mkdir(exist_ok=True)
    chunks = tuple(_take(found, chunk, keys, folder) for chunk, keys in rows)
    _copy_empty_text(found, folder)
    save_manifest(folder, replace(found.manifest, chunks=chunks))


# --- index, export ------------------------------------------------------------------------------------------


def index(root: str | Path, *, ragged: Container[str] = RAGGED, model: str = "") -> ShardSet:
    """Write the manifest and index files of a folder COLUMN/*.tar that another program (webdataset) made.

    Tars of the columns belong together by their sorted names and must hold the same keys in the same order.
    What the fields are is read off all samples: a size that varies is none, and a first one makes the field
    ragged, as being named in `ragged` does, whatever the samples are. `model`: whose columns they are. Raises
    ShardError, for a field of two dtypes too.
    """
    folder = Path(root)
    columns = (
        sorted(p.name for p in folder.iterdir() if p.is_dir() and list(p.glob("*.tar")))
        if folder.is_dir() else []
    )
    if "latents" not in columns:
        raise ShardError(
            f"{folder}: expected folders of tars, one per column, 'latents' among them; found {columns}"
        )
    tars = {check_column(c): sorted(p.name for p in inside(folder, c).glob("*.tar")) for c in columns}
    if len({len(found) for found in tars.values()}) > 1:
        counts = ", ".join(f"{c}: {len(found)}" for c, found in tars.items())
        raise ShardError(f"{folder}: the columns have different numbers of tars ({counts})")
    fields: dict[str, dict[str, Stored]] = {column: {} for column in columns}
    try:
        rows = [_indexed(folder, dict(zip(columns, names)), fields) for names in zip(*tars.values())]
        made = {
            column: Made(f"{IMPORTED}unknown", model, (), {
                name: replace(field, dims=(None, *field.dims[1:])) if name in ragged else field for name,
                field in own.items()
            })
            for column, own in fields.items()
        }
        save_manifest(folder, Manifest(tuple(columns), tuple(rows), made))
    except OSError as error:
        raise full(error, folder) from None
    return open_set(folder)


def _indexed(folder: Path, names: Mapping[str, str], fields: Mapping[str, dict[str, Stored]]) -> Chunk:
    """The tars of one number, by column; writes their indices, and notes what their `fields` are."""
    paths = {c: inside(folder, f"{c}/{name}") for c, name in names.items()}
    opened = {c: open_local(path, None) for c, path in paths.items()}
    latents = opened["latents"]
    for tar in opened.values():
        if tar.keys() != latents.keys():
            raise ShardError(f"{tar.where}: its keys are not those of {latents.where}")
    try:
        buckets = {_bucket(latents, key) for key in latents.keys()}
        if len(buckets) != 1:
            raise ShardError(f"a tar holds one shape, this one {len(buckets)}: {', '.join(sorted(buckets))}")
        entries = {c: describe(path, f"{c}/{path.name}") for c, path in paths.items()}
        found = Chunk(buckets.pop(), tuple(latents.keys()), entries)
    except ShardError as error:
        raise error if latents.where in str(error) else ShardError(f"{latents.where}: {error}") from None
    for c, path in paths.items():
        for key in found.keys:
            for name, tensor in opened[c].tensors(key).items():
                _widen(fields[c], name, tensor, f"{opened[c].where}: {key}")
        _write_index(path, opened[c])
    return found


def _widen(fields: dict[str, Stored], name: str, tensor: Tensor, where: str) -> None:
    """Have the field hold this sample's tensor too."""
    variant = VARIANT.fullmatch(name)
    name, dtype = variant[1] if variant else name, str(tensor.dtype).removeprefix("torch.")
    known = fields.setdefault(name, Stored(tuple(tensor.shape), dtype))
    if (known.dtype, len(known.dims)) != (dtype, tensor.ndim):
        raise ShardError(
            f"{where}: '{name}' is {Stored(tuple(tensor.shape), dtype)}, in samples before it {known}"
        )
    fields[name] = Stored(tuple(a if a == b else None for a, b in zip(known.dims, tensor.shape)), dtype)


def _bucket(tar: Tar, key: str) -> str:
    bucket = tar.meta(key).get("bucket")
    if bucket:
        return check_bucket(bucket)
    tensors = tar.tensors(key)
    if "latents" not in tensors:
        raise ShardError(f"{tar.where}: {key} holds no tensor 'latents', but {', '.join(tensors) or 'none'}")
    return "latents-" + "x".join(map(str, tensors["latents"].shape[1:]))


def _write_index(path: Path, tar: Tar) -> None:
    rows = [
        [name, m.offset, m.size, xxhash.xxh3_64_hexdigest(tar.bytes(name))] for name, m in tar.members.items()
    ]
    write_text(index_path(path), json.dumps({"members": rows}))


def export(source: str, output: str | Path) -> int:
    """KEY.safetensors with the tensors of all columns, their JSON in the header. Returns how
    many. Killed, it is continued."""
    found = open_set(source)
    with making(output, f"shards export {found.name}", [found]) as root:
        for chunk in found.manifest.chunks:
            for key in chunk.keys:
                path = root / f"{key}.safetensors"
                if not path.exists():
                    with atomic_path(path) as temporary:
                        temporary.write_bytes(_plain(found, chunk, key))
    return found.manifest.n_keys


def _plain(found: ShardSet, chunk: Chunk, key: str) -> bytes:
    tensors: dict[str, Tensor] = {}
    meta: dict[str, str] = {"bucket": chunk.bucket}
    for column in found.manifest.columns:
        tar = found.tar(chunk, column)
        tensors |= tar.tensors(key)
        meta |= {
            n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n,
            v in tar.meta(key).items()
        }
    return save({n: t.contiguous() for n, t in tensors.items()}, metadata=meta)


# --- parts --------------------------------------------------------------------------------------------------


def _take(found: ShardSet, chunk: Chunk, keys: Sequence[str], root: Path) -> Chunk:
    """Some keys of a chunk as a chunk of the set at `root`; tars that are there already
    were made by the same command."""
    tars = {}
    for column in found.manifest.columns:
        if len(keys) == len(chunk.keys) and not found.remote:
            tars[column] = _link(found, chunk, root, column)
        else:
            tars[column] = _rewrite(found, chunk, keys, root, column)
    return replace(chunk, keys=tuple(keys), tars=tars)


def _rewrite(found: ShardSet, chunk: Chunk, keys: Sequence[str], root: Path, column: str) -> TarFile:
    digest = hashlib.sha256(json.dumps([chunk.tars[column].checksum, list(keys)]).encode()).hexdigest()
    name = f"{column}/{chunk.bucket}-{digest[:16]}.tar"
    if (root / name).exists():
        return describe(root / name, name)
    tar = found.tar(chunk, column)
    with TarWriter(root, column) as out:
        for key in keys:
            out.add_bytes(key, tar.checked(key), tar.meta(key))
        return out.finish(name)


def _link(found: ShardSet, chunk: Chunk, root: Path, column: str) -> TarFile:
    """The same bytes in another set: tars are never changed in place, so two sets may share them."""
    entry, tar = chunk.tars[column], found.tar(chunk, column)
    mark = f"{entry.checksum[:8]}-"
    name = f"{column}/{mark}{Path(entry.path).name.removeprefix(mark)}"
    target, origin = root / name, found.path(entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not index_path(target).exists():  # first: a tar that is there has its index
        _write_index(target, tar)
    if not target.exists():
        try:
            os.link(os.path.realpath(origin), target)
        except OSError:  # another file system
            with atomic_path(target) as temporary:
                shutil.copyfile(origin, temporary)
    return replace(entry, path=name)


def _copy_empty_text(found: ShardSet, root: Path) -> None:
    if "text" not in found.manifest.columns or found.manifest.made_by("text").imported:
        return
    with atomic_path(root / EMPTY_TEXT) as temporary:
        temporary.write_bytes(save({n: t.clone() for n, t in found.empty_text.items()}))


def _shown(value: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else ", ".join(value)
