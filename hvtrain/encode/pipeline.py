"""Encoding a plan: each rank writes its own tars; what exists already, or can be copied from it, is not encoded again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvtrain.encode.media import read_frames
from hvtrain.encode.plan import PlannedChunk, PlannedSample
from hvtrain.errors import DataError
from hvtrain.rng import generator
from shards import ShardError, ShardSet, open_set
from shards.schema import TarFile
from shards.writer import sha256, write_tar

Encode = Callable[[Sequence[PlannedSample]], list[dict[str, Tensor]]]


@dataclass
class Tally:
    """What this rank did."""

    encoded: int = 0
    copied: int = 0
    kept: int = 0


@dataclass(frozen=True)
class ColumnWriter:
    """Writes one column's tars."""

    column: str
    root: Path
    encoder: str  # fingerprint
    encode: Encode
    old: OldSamples
    tally: Tally = field(default_factory=Tally)

    def write(self, chunk: PlannedChunk, advance: Callable[[int], None]) -> TarFile:
        name = chunk.tar_name(self.column, self.encoder)
        path = self.root / name
        if path.is_file():
            self.tally.kept += len(chunk.samples)
            advance(len(chunk.samples))
            return TarFile(name, path.stat().st_size, sha256(path))
        digests = [s.digest(self.column, self.encoder) for s in chunk.samples]
        found = [self.old.get(self.column, digest) for digest in digests]
        missing = [s for s, tensors in zip(chunk.samples, found) if tensors is None]
        fresh = iter(self.encode(missing) if missing else [])
        tensors = [next(fresh) if t is None else t for t in found]
        self.tally.encoded += len(missing)
        self.tally.copied += len(found) - len(missing)
        rows = [
            (s.key, t, _meta(s, self.column, digest)) for s, t, digest in zip(chunk.samples, tensors, digests)
        ]
        made = write_tar(self.root, name, rows)
        advance(len(chunk.samples))
        return made


class OldSamples:
    """Tensors of an earlier set in the same directory, by what they are a function of."""

    def __init__(self, root: Path) -> None:
        self.places: dict[tuple[str, str], int] = {}
        self.found: ShardSet | None = None
        try:
            self.found = open_set(root)
        except ShardError:
            return  # no earlier set, or a damaged one: then everything is encoded
        for column in self.found.manifest.columns:
            for index in range(len(self.found)):
                try:
                    digest = self.found.get(index, (column,)).meta.get(f"{column}_digest")
                except ShardError:
                    continue
                self.places[column, str(digest)] = index

    def get(self, column: str, digest: str) -> dict[str, Tensor] | None:
        index = self.places.get((column, digest))
        if index is None or self.found is None:
            return None
        return {name: t.clone() for name, t in self.found.get(index, (column,)).tensors.items()}


def _meta(s: PlannedSample, column: str, digest: str) -> dict[str, Any]:
    common = {"caption": s.caption} if column == "text" else {
        "source": str(s.path), "frames": [s.frames[0], s.frames[-1], len(s.frames)], "width": s.size[0],
        "height": s.size[1], "bucket": s.bucket,
    }
    return {**common, f"{column}_digest": digest}


@dataclass(frozen=True)
class LatentEncoder:
    """Clips through the VAE, decoded ahead by threads."""

    vae: Any
    dtype: torch.dtype
    batch_size: int
    workers: int
    seed: int

    @torch.no_grad()
    def __call__(self, samples: Sequence[PlannedSample]) -> list[dict[str, Tensor]]:
        result: list[dict[str, Tensor]] = []
        for group, pixels in self._decoded(samples):
            video = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).to(self.vae.device, torch.float32) / 127.5 - 1
            # A generator per key: the posterior's sample does not depend on batches or ranks.
            draws = [generator(self.seed, stream=f"posterior/{s.key}") for s in group]
            latents = self.vae.encode(video.to(self.vae.dtype), generator=draws).to("cpu", self.dtype)
            for s, x in zip(group, latents):
                if not x.isfinite().all():
                    raise DataError(f"{s.path}: the VAE makes NaN or infinite latents of it; try model.vae_dtype=float32")
                result.append({"latents": x.clone()})
        return result

    def _decoded(self, samples: Sequence[PlannedSample]) -> Iterator[tuple[Sequence[PlannedSample], np.ndarray]]:
        groups = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            # Two groups ahead: enough to keep the VAE busy, little enough to fit in memory.
            ahead = [[pool.submit(_read, s) for s in group] for group in groups[:2]]
            for i, group in enumerate(groups):
                if i + 2 < len(groups):
                    ahead.append([pool.submit(_read, s) for s in groups[i + 2]])
                yield group, np.stack([future.result() for future in ahead[i]])
                ahead[i] = []


def _read(s: PlannedSample) -> np.ndarray:
    return read_frames(s.path, s.frames, size=s.size)


@dataclass(frozen=True)
class TextEncoder:
    """Captions through the text encoders, each distinct one once."""

    text: Any
    dtype: torch.dtype
    cache: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, samples: Sequence[PlannedSample]) -> list[dict[str, Tensor]]:
        new = sorted({s.caption for s in samples} - set(self.cache))
        for caption, fields in zip(new, self.text.encode(new) if new else []):
            self.cache[caption] = self.stored(fields, caption)
        return [self.cache[s.caption] for s in samples]

    def stored(self, fields: Mapping[str, Tensor], caption: str) -> dict[str, Tensor]:
        if not all(t.isfinite().all() for t in fields.values()):
            raise DataError(f"caption {caption[:80]!r}: the text encoder makes NaN or infinite embeddings of it")
        return {name: t.to("cpu", self.dtype).contiguous() for name, t in fields.items()}


class Meter:
    """Progress over all columns, on one rank: a live bar on a terminal, else a line every five seconds."""

    def __init__(self, total: int, *, show: bool) -> None:
        self.total, self.done, self.show, self.bar = total, 0, show, None
        self.begun = self.last = time.monotonic()
        if show and sys.stdout.isatty():
            from rich.progress import Progress

            self.bar = Progress()
            self.task = self.bar.add_task("encoding", total=total)
            self.bar.start()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if self.bar is not None:
            self.bar.advance(self.task, n)
        elif self.show and (now - self.last > 5 or self.done == self.total):
            self.last = now
            left = (now - self.begun) / self.done * (self.total - self.done)
            print(f"encoded {self.done}/{self.total} of this rank's samples, {left:.0f} s left", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
