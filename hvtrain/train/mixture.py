"""What a run reads when: weighted sets, some of their buckets, from a step on, in batches that cost alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from hvtrain.config import DataConfig, ShardsConfig
from hvtrain.errors import ConfigError
from hvtrain.models.spec import LatentGeometry
from shards import ShardSet
from shards.loader import Phase
from shards.order import BatchSize, mixture


@dataclass(frozen=True)
class Curriculum:
    """The phases of a run, the first from step 0."""

    phases: tuple[Phase, ...]
    n_samples: int  # of an epoch of the first phase
    per_batch: float  # samples of a micro-batch of it, on average


def plan_data(data: DataConfig, sets: Sequence[ShardSet], latent: LatentGeometry, *, seed: int) -> Curriculum:
    """Raises ConfigError for a pattern that no bucket matches, and a step at which
    there is nothing to train on."""
    entries = data.sets
    if all(entry.silent for entry in entries):
        raise ConfigError(
            "data.mixture: all sets are silent, so there is nothing to learn; give one to train on"
        )
    begins = np.cumsum([0, *map(len, sets)]).tolist()
    groups = [
        _taken(e, s.groups(b), f"data.mixture[{i}]") for i, (e, s, b) in enumerate(zip(entries, sets, begins))
    ]
    sizes = _batch_sizes(data, sets, begins, groups, latent)
    phases = []
    for step in sorted(
        {0, *(e.from_step for e in entries), *(e.until_step for e in entries if e.until_step)}
    ):
        now = [
            i for i,
            e in enumerate(entries) if e.from_step <= step and (e.until_step is None or step < e.until_step)
        ]
        if not now:
            raise ConfigError(
                f"data.mixture: from step {step} on there is no set; let one begin there, or end later"
            )
        weights = [w for i in now if (w := entries[i].weight) is not None]
        phases.append(
            Phase(step, mixture([groups[i] for i in now], batch_size=sizes, weights=weights or None))
        )
    first = phases[0].mixture
    per_batch = (
        data.batch_size if isinstance(sizes, int) else first.n / len(first.order(seed=seed, epoch=0).starts)
    )
    return Curriculum(tuple(phases), first.n, per_batch)


def _taken(entry: ShardsConfig, groups: Mapping[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    taken = {
        b: members for b, members in groups.items() if any(fnmatchcase(b, p) for p in entry.buckets or ("*",))
    }
    if not taken:
        like = ", ".join(entry.buckets)
        raise ConfigError(
            f"{key}.buckets: {entry.path} has no bucket like {like}; it has {', '.join(groups)}"
        )
    return taken


def _batch_sizes(
    data: DataConfig, sets: Sequence[ShardSet], begins: Sequence[int],
    groups: Sequence[Mapping[str, np.ndarray]], latent: LatentGeometry,
) -> BatchSize:
    """With data.batch_tokens, as many samples of each bucket as have so many
    tokens: one of each is looked at."""
    if data.batch_tokens is None:
        return data.batch_size
    sizes: dict[str, int] = {}
    for found, begin, own in zip(sets, begins, groups):
        for bucket, members in own.items():
            if bucket not in sizes:
                shape = found.get(int(members[0]) - begin, ("latents",)).tensors["latents"].shape
                sizes[bucket] = max(1, data.batch_tokens // latent.n_tokens(shape))
    return sizes
