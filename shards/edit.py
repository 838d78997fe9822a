"""Sets out of sets: merged, split, indexed, exported. Samples are copied as bytes after their checksum was compared."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save_file
from torch import Tensor

from shards.atomic import atomic_path, write_text
from shards.errors import ShardError
from shards.order import salt
from shards.reader import ShardSet, open_set
from shards.schema import EMPTY_TEXT, IMPORTED, Chunk, Manifest, TarFile, index_path, save_manifest
from shards.tar import Tar, describe, open_local
from shards.writer import TarWriter, full

SPLIT = "split.json"


# --- merge ------------------------------------------------------------------------------------------------------------


def merge(sources: Sequence[str], output: str | Path) -> ShardSet:
    """Several sets as one. Whole tars are hard links where the disk allows it; a sample that two sets hold counts once.

    Raises ShardError if columns or encoders differ, or one key stands for two contents.
    """
    sets, root = [open_set(s) for s in sources], _new_folder(output)
    first = sets[0].manifest
    for found in sets[1:]:
        for what in ("columns", "encoders"):
            here, there = getattr(first, what), getattr(found.manifest, what)
            if (sorted(here) if what == "columns" else here) != (sorted(there) if what == "columns" else there):
                raise ShardError(
                    f"{found.name} has {what} {_shown(there)}, {sets[0].name} has {_shown(here)}: encode both the same way"
                )
    seen: dict[str, tuple[ShardSet, Chunk]] = {}
    rows = []
    for found in sets:
        for chunk in found.manifest.chunks:
            keys = [key for key in chunk.keys if not _held(key, found, chunk, seen)]
            seen |= dict.fromkeys(keys, (found, chunk))
            if keys:
                rows.append(_take(found, chunk, keys, root))
    _copy_empty_text(sets[0], root)
    dataset = hashlib.sha256("".join(s.manifest.dataset for s in sets).encode()).hexdigest()
    save_manifest(root, Manifest(first.columns, tuple(rows), first.encoders, dataset))
    return open_set(root)


def _held(key: str, found: ShardSet, chunk: Chunk, seen: Mapping[str, tuple[ShardSet, Chunk]]) -> bool:
    if key not in seen:
        return False
    other, place = seen[key]
    for column in found.manifest.columns:
        if bytes(found.tar(chunk, column).checked(key)) != bytes(other.tar(place, column).checked(key)):
            raise ShardError(
                f"sample {key} differs in '{column}' between {other.name} and {found.name}; remove one of them first"
            )
    return True


# --- split ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    name: str  # folder below the output
    rule: str  # for people
    samples: int = 0


Assign = Callable[[ShardSet], tuple[list[Part], dict[str, int]]]  # parts, and key -> which


def split(source: str, output: str | Path, assign: Assign) -> list[Part]:
    """One set per part under output/NAME, and split.json that says which is which."""
    found, root = open_set(source), _new_folder(output)
    parts, where = assign(found)
    counts = []
    for number, part in enumerate(parts):
        rows = []
        folder = root / part.name
        folder.mkdir()
        for chunk in found.manifest.chunks:
            keys = [key for key in chunk.keys if where.get(key) == number]
            if keys:
                rows.append(_take(found, chunk, keys, folder))
        n = sum(len(row.keys) for row in rows)
        counts.append(replace(part, samples=n))
        if not n:
            raise ShardError(f"part {part.name} ({part.rule}) would be empty; nothing in {source} belongs to it")
        _copy_empty_text(found, folder)
        save_manifest(folder, replace(found.manifest, chunks=tuple(rows)))
    body = {"source": source, "parts": [vars(part) for part in counts]}
    write_text(root / SPLIT, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return counts


def by_number(n: int, *, seed: int = 0) -> Assign:
    """n parts of equal size; every bucket is dealt out evenly."""

    def assign(found: ShardSet) -> tuple[list[Part], dict[str, int]]:
        if not 1 <= n <= found.manifest.n_keys:
            raise ShardError(f"{found.name} holds {found.manifest.n_keys} samples; they cannot make {n} parts")
        order: dict[str, list[str]] = {}
        for chunk in found.manifest.chunks:
            order.setdefault(chunk.bucket, []).extend(chunk.keys)
        where, dealt = {}, 0
        for bucket in sorted(order):
            for key in sorted(order[bucket], key=lambda k: salt(seed, k)):
                where[key] = dealt % n
                dealt += 1
        width = max(2, len(str(n)))
        return [Part(f"{i + 1:0{width}d}", f"every {n}th sample") for i in range(n)], where

    return assign


def by_caption(patterns: Sequence[str]) -> Assign:
    """A part per pattern (regular expression, case ignored), the first that matches; what none matches is `rest`."""
    try:
        wanted = [re.compile(p, re.IGNORECASE) for p in patterns]
    except re.error as error:
        raise ShardError(f"caption pattern {error.pattern!r} is not a regular expression: {error}") from None

    def assign(found: ShardSet) -> tuple[list[Part], dict[str, int]]:
        parts = [Part(f"{i + 1:02d}", f"caption matches {p!r}") for i, p in enumerate(patterns)]
        rest, where = len(parts), {}
        for key, meta in _meta(found, "text"):
            captions = [str(c) for c in meta.get("captions") or [meta.get("caption", "")]]
            where[key] = next((i for i, p in enumerate(wanted) if any(map(p.search, captions))), rest)
        if rest in where.values():
            parts.append(Part("rest", "no pattern matches"))
        return parts, where

    return assign


def by_folder() -> Assign:
    """A part per folder that the clips came from."""

    def assign(found: ShardSet) -> tuple[list[Part], dict[str, int]]:
        folders = {key: str(Path(str(meta.get("source", ""))).parent) for key, meta in _meta(found, "latents")}
        names = sorted(set(folders.values()))
        width = max(2, len(str(len(names))))
        parts = [Part(f"{i + 1:0{width}d}", f"clips of {name}") for i, name in enumerate(names)]
        return parts, {key: names.index(folder) for key, folder in folders.items()}

    return assign


def _meta(found: ShardSet, column: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if column not in found.manifest.columns:
        raise ShardError(f"{found.name} has no column '{column}' to split by; it has {', '.join(found.manifest.columns)}")
    for chunk in found.manifest.chunks:
        tar = found.tar(chunk, column)
        for key in chunk.keys:
            yield key, tar.meta(key)


# --- index, export --------------------------------------------------------------------------------------------------


def index(root: str | Path) -> ShardSet:
    """Write the manifest and index files of a folder COLUMN/*.tar that another program (webdataset) made.

    Tars of the columns belong together by their sorted names and must hold the same keys in the same order.
    """
    folder = Path(root)
    columns = sorted(p.name for p in folder.iterdir() if p.is_dir() and list(p.glob("*.tar"))) if folder.is_dir() else []
    if "latents" not in columns:
        raise ShardError(f"{folder}: expected folders of tars, one per column, 'latents' among them; found {columns}")
    tars = {c: sorted((folder / c).glob("*.tar")) for c in columns}
    if len({len(found) for found in tars.values()}) > 1:
        counts = ", ".join(f"{c}: {len(found)}" for c, found in tars.items())
        raise ShardError(f"{folder}: the columns have different numbers of tars ({counts})")
    rows = []
    for together in zip(*tars.values()):
        opened = {c: open_local(path, None) for c, path in zip(columns, together)}
        keys = opened["latents"].keys()
        for tar in opened.values():
            if tar.keys() != keys:
                raise ShardError(f"{tar.where}: its keys are not those of {opened['latents'].where}")
        buckets = {_bucket(opened["latents"], key) for key in keys}
        if len(buckets) != 1:
            raise ShardError(f"{opened['latents'].where}: a tar holds one shape, this one {len(buckets)}: {sorted(buckets)}")
        for path, tar in zip(together, opened.values()):
            _write_index(path, tar)
        entries = {c: describe(path, f"{c}/{path.name}") for c, path in zip(columns, together)}
        rows.append(Chunk(buckets.pop(), tuple(keys), entries))
    save_manifest(folder, Manifest(tuple(columns), tuple(rows), dict.fromkeys(columns, f"{IMPORTED}unknown")))
    return open_set(folder)


def _bucket(tar: Tar, key: str) -> str:
    bucket = tar.meta(key).get("bucket")
    return str(bucket) if bucket else "latents-" + "x".join(map(str, tar.tensors(key)["latents"].shape[1:]))


def _write_index(path: Path, tar: Tar) -> None:
    rows = [[name, m.offset, m.size, xxhash.xxh3_64_hexdigest(tar.bytes(name))] for name, m in tar.members.items()]
    write_text(index_path(path), json.dumps({"members": rows}))


def export(source: str, output: str | Path) -> int:
    """KEY.safetensors with the tensors of all columns, their JSON in the header. Returns how many."""
    found, root = open_set(source), _new_folder(output)
    for chunk in found.manifest.chunks:
        opened = {column: found.tar(chunk, column) for column in found.manifest.columns}
        for key in chunk.keys:
            tensors: dict[str, Tensor] = {}
            meta: dict[str, str] = {"bucket": chunk.bucket}
            for tar in opened.values():
                tensors |= tar.tensors(key)
                meta |= {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in tar.meta(key).items()}
            with atomic_path(root / f"{key}.safetensors") as temporary:
                save_file({n: t.contiguous() for n, t in tensors.items()}, str(temporary), metadata=meta)
    return found.manifest.n_keys


# --- parts ------------------------------------------------------------------------------------------------------------


def _take(found: ShardSet, chunk: Chunk, keys: Sequence[str], root: Path) -> Chunk:
    """Some keys of a chunk as a chunk of the set at `root`."""
    tars = {}
    for column in found.manifest.columns:
        if len(keys) == len(chunk.keys) and not found.remote:
            tars[column] = _link(found.root, found.tar(chunk, column), chunk.tars[column], root, column)
        else:
            tars[column] = _rewrite(found.tar(chunk, column), chunk.bucket, keys, root, column)
    return replace(chunk, keys=tuple(keys), tars=tars)


def _rewrite(tar: Tar, bucket: str, keys: Sequence[str], root: Path, column: str) -> TarFile:
    digest = hashlib.sha256()
    with TarWriter(root, column) as out:
        for key in keys:
            data = tar.checked(key)
            out.add_bytes(key, data, tar.meta(key))
            digest.update(key.encode() + data)
        return out.finish(f"{column}/{bucket}-{digest.hexdigest()[:16]}.tar")


def _link(source: Path, tar: Tar, entry: TarFile, root: Path, column: str) -> TarFile:
    """The same bytes in another set: tars are never changed in place, so two sets may share them."""
    name = f"{column}/{entry.checksum[:8]}-{Path(entry.path).name}"
    target, origin = root / name, source / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        try:
            try:
                os.link(origin, target)
            except OSError:  # another file system
                with atomic_path(target) as temporary:
                    shutil.copyfile(origin, temporary)
        except OSError as error:
            raise full(error, target) from None
    _write_index(target, tar)
    return replace(entry, path=name)


def _copy_empty_text(found: ShardSet, root: Path) -> None:
    if "text" not in found.manifest.columns or found.manifest.encoders.get("text", "").startswith(IMPORTED):
        return
    with atomic_path(root / EMPTY_TEXT) as temporary:
        save_file({n: t.clone() for n, t in found.empty_text.items()}, str(temporary))


def _new_folder(path: str | Path) -> Path:
    root = Path(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ShardError(f"output: {root} holds something already; choose a new or empty directory")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _shown(value: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else ", ".join(value)
