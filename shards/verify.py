"""Is a shard set whole? Checksums, members, shapes, finite values, keys equal across columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shards.errors import ShardError
from shards.reader import ShardSet, open_set, open_tar
from shards.writer import sha256


def verify(root: str | Path, *, values: bool = True) -> Iterator[str]:
    """Yield one line per fault, naming the tar and the key; nothing if the set is sound."""
    try:
        found = open_set(root)
    except ShardError as error:
        yield str(error)
        return
    yield from _duplicates(found)
    for chunk in found.manifest.chunks:
        for column in found.manifest.columns:
            if column not in chunk.tars:
                yield f"{found.root}: samples from {chunk.keys[0]} on lack column '{column}'"
                continue
            entry = chunk.tars[column]
            path = found.root / entry.path
            if path.is_file() and sha256(path) != entry.sha256:
                yield f"{path}: its checksum is not the manifest's; the tar is damaged or was replaced"
                continue
            try:
                tar = open_tar(path, entry.n_bytes)
                wanted = {f"{key}.{kind}" for key in chunk.keys for kind in ("safetensors", "json")}
                for name in sorted(wanted ^ set(tar.members)):
                    yield f"{path}: member {name} is {'missing' if name in wanted else 'not in the manifest'}"
                for key in chunk.keys if values else ():
                    for name, tensor in tar.tensors(key).items():
                        if tensor.is_floating_point() and not tensor.float().isfinite().all():
                            yield f"{path}: {key}: '{name}' holds NaN or infinite values"
            except ShardError as error:
                yield str(error)


def _duplicates(found: ShardSet) -> Iterator[str]:
    seen: set[str] = set()
    for key in (key for chunk in found.manifest.chunks for key in chunk.keys):
        if key in seen:
            yield f"{found.root}: key {key} occurs twice"
        seen.add(key)
