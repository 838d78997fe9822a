"""Is a shard set whole? Checksums, members, shapes, finite values, keys equal across columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import xxhash
from torch import Tensor

from shards.collate import VARIANT
from shards.errors import ShardError
from shards.files import read_plain
from shards.reader import ShardSet
from shards.schema import Chunk, Manifest, TarFile, index_path
from shards.tar import Tar, open_local, parse_index, skeleton
from shards.tensors import not_finite


def verify(
    root: str | Path, *, values: bool = True, progress: Callable[[int], None] = lambda n: None
) -> Iterator[str]:
    """Yield one line per fault, naming the tar, the key and the bytes; nothing if the set is sound.

    `values`: also look for NaN and infinity. `progress` is called with the bytes
    of each tar that was looked at.
    """
    try:
        found = ShardSet(root)  # not open_set: every tar that is missing gets its line
        if found.remote:
            raise ShardError(f"{found.name}: verify reads directories; copy the set to a disk first")
    except ShardError as error:
        yield str(error)
        return
    try:
        if "text" in found.manifest.columns and not found.manifest.made_by("text").imported:
            found.empty_text  # noqa: B018 it is read
    except ShardError as error:
        yield str(error)
    shapes = _Shapes(found.manifest)
    for chunk in found.manifest.chunks:
        for column in found.manifest.columns:
            if column not in chunk.tars:
                yield f"{found.root}: samples from {chunk.keys[0]} on lack column '{column}'"
                continue
            entry = chunk.tars[column]
            try:
                yield from _tar(found.path(entry), entry, chunk, column, values=values, shapes=shapes)
            except ShardError as error:
                yield str(error)
            progress(entry.n_bytes)


class _Shapes:
    """The fields of a set: as its manifest says, and alike in a bucket where no batch pads them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.ragged = manifest, manifest.ragged
        # (bucket, field) -> shape, of which sample
        self.seen: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}

    def faults(self, tensors: Mapping[str, Tensor], key: str, column: str, bucket: str) -> Iterator[str]:
        told = self.manifest.made_by(column).fields
        for name, tensor in tensors.items():
            variant = VARIANT.fullmatch(name)
            field, shape, dtype = (
                variant[1] if variant else name, tuple(tensor.shape), str(tensor.dtype)[len("torch.") :]
            )
            if told and (field not in told or not told[field].fits(shape, dtype)):
                yield f"'{name}' is {shape} {dtype}, the manifest says {told.get(field, 'nothing of it')}"
            elif field not in self.ragged:
                usual, first = self.seen.setdefault((bucket, name), (shape, key))
                if shape != usual:
                    yield f"'{name}' is {shape}, in {first} of bucket {bucket} it is {usual}"


def _tar(
    path: Path, entry: TarFile, chunk: Chunk, column: str, *, values: bool, shapes: _Shapes
) -> Iterator[str]:
    # what is damaged shall be named in detail
    tar, size = open_local(path, replace(entry, skeleton="")), entry.n_bytes
    data = tar.fetch(0, size)
    wanted = {f"{key}.{kind}" for key in chunk.keys for kind in ("safetensors", "json")}
    for name in sorted(wanted ^ set(tar.members)):
        yield (
            f"{path}: member {name} is {'missing' if name in wanted else 'not in the manifest'}; is this "
            "another tar?"
        )
    n_faults = 0
    for key in chunk.keys:
        for fault in _sample(tar, key, chunk.bucket, column, values=values, shapes=shapes):
            n_faults += 1
            yield fault
    if xxhash.xxh3_128_hexdigest(data.numpy()) != entry.checksum and not n_faults:  # type: ignore[arg-type]
        part = "headers, padding or JSON" if skeleton(data, tar.members) != entry.skeleton else "contents"
        yield (
            f"{path}: bytes 0 to {size}: its {part} are not those that were written; restore it or encode "
            "again"
        )
        n_faults += 1
    if not n_faults and not wanted ^ set(tar.members):
        yield from _index(path, size, tar)


def _sample(tar: Tar, key: str, bucket: str, column: str, *, values: bool, shapes: _Shapes) -> Iterator[str]:
    if not {f"{key}.safetensors", f"{key}.json"} <= set(tar.members):
        return  # said above
    try:
        tar.meta(key)
        tensors = tar.tensors(key)
    except ShardError as error:
        yield str(error)
        return
    member = tar.members[f"{key}.safetensors"]
    for name in not_finite(tensors) if values else ():
        yield (
            f"{tar.where}: {key} (bytes {member.offset} to {member.offset + member.size}): '{name}' holds "
            "NaN or infinite values"
        )
    yield from (f"{tar.where}: {key}: {fault}" for fault in shapes.faults(tensors, key, column, bucket))


def _index(path: Path, size: int, tar: Tar) -> Iterator[str]:
    """The file that readers of URLs go by."""
    place = index_path(path)
    try:
        found = parse_index(read_plain(place), size)
    except FileNotFoundError:
        yield f"{place} is missing: reading over the network needs it; `hvtrain shards index` writes it"
        return
    except (ShardError, OSError) as error:
        yield f"{place}: {error}; `hvtrain shards index` writes it anew"
        return
    if {n: (m.offset, m.size) for n, m in found.items()} != {
        n: (m.offset, m.size) for n, m in tar.members.items()
    }:
        yield f"{place}: does not fit its tar; `hvtrain shards index` writes it anew"

