"""What is in a set: the figures behind `hvtrain shards info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from shards.reader import ShardSet


def lines(found: ShardSet) -> Iterator[str]:
    manifest = found.manifest
    yield f"{found.name}: {manifest.n_keys} samples, {len(manifest.chunks)} tars a column"
    if manifest.n_samples != manifest.n_keys:
        yield f"an epoch shows {manifest.n_samples} samples, with repeats"
    sample = found.get(0) if len(found) else None
    for column in manifest.columns:
        n_bytes = sum(chunk.tars[column].n_bytes for chunk in manifest.chunks if column in chunk.tars)
        made = manifest.made_by(column)
        by = " ".join(filter(None, [f"{made.model}'s" if made.model else "", " and ".join(made.parts)]))
        yield (
            f"column {column}: {size(n_bytes)}, made by "
            f"{by + ', ' if by else ''}{made.fingerprint or 'unknown'}"
        )
    for bucket, n in sorted(Counter(c.bucket for c in manifest.chunks for _ in c.keys).items()):
        yield f"bucket {bucket} (frames x height x width): {n} samples"
    if sample is None:
        return
    for name, tensor in sample.tensors.items():
        padded = ", padded in a batch" if name in manifest.ragged else ""
        yield (
            f"field {name}: {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} in "
            f"{sample.key}{padded}"
        )
    if "caption" in sample.meta:
        # nothing that steers a terminal
        words = "".join(c if c.isprintable() else " " for c in str(sample.meta["caption"]))
        yield f"caption of {sample.key}: {words}"


def size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} TiB"
