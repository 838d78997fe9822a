"""What of a training's data decides what a step costs, besides its size."""

from __future__ import annotations

from hvtrain.config import DataConfig, ShardsConfig
from shards import open_set
from shards.errors import ShardError


def silent_share(data: DataConfig) -> float:
    """Of the samples, at the steps where they are most: those on which the adapter shall change nothing."""
    entries = data.sets
    if not any(entry.silent for entry in entries):
        return 0.0
    found = 0.0
    for step in {e.from_step for e in entries} | {e.until_step for e in entries if e.until_step is not None}:
        now = [e for e in entries if e.from_step <= step and (e.until_step is None or step < e.until_step)]
        whole = sum(map(_weight, now))
        found = max(found, sum(_weight(e) for e in now if e.silent) / whole if whole else 0.0)
    return found


def _weight(entry: ShardsConfig) -> float:
    """Of a set without a weight that is not there yet nothing is known: as much as any other."""
    if entry.weight is not None:
        return entry.weight
    try:
        return len(open_set(entry.path))
    except (ShardError, OSError):
        return 1.0
