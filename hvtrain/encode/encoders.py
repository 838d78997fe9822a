"""Samples into tensors: pixels through the VAE, captions through the text encoders. In order, a few samples at a time."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvtrain.encode.clips import Rejected
from hvtrain.encode.media import read_windows
from hvtrain.encode.samples import Picture, PlannedSample
from hvtrain.errors import DataError
from hvtrain.rng import generator

Fields = dict[str, Tensor]
Outcome = tuple[PlannedSample, "Fields | str"]  # the tensors, or why there are none

DECODE_BYTES = 256 << 20  # pixels of one decoding job: windows of a long clip are decoded together up to this
CAPTIONS = 32  # samples whose captions are encoded together

# column -> field -> the picture it is made of
PICTURES: dict[str, Callable[[PlannedSample], dict[str, Picture]]] = {
    "latents": lambda s: {"latents": s.clip},
    "image": lambda s: {"image_latents": Picture(s.clip.path, s.clip.state, s.clip.frames[:1], s.clip.size)},
    "control": lambda s: {f"control_latents{'_' + str(i) if i else ''}": c for i, c in enumerate(s.controls)},
}


@dataclass(frozen=True)
class _Job:
    sample: PlannedSample
    name: str
    picture: Picture


@dataclass(frozen=True)
class PixelEncoder:
    """Pictures through the VAE, decoded ahead by threads."""

    column: str
    vae: Any
    dtype: torch.dtype
    batch_size: int
    workers: int
    seed: int

    def __call__(self, samples: Sequence[PlannedSample]) -> Iterator[Outcome]:
        jobs = [_Job(s, name, p) for s in samples for name, p in PICTURES[self.column](s).items()]
        done: dict[str, Fields | str] = {}
        waiting = deque(samples)
        for job, result in self._encoded(jobs):
            before = done.setdefault(job.sample.key, {})
            if isinstance(result, str) or isinstance(before, str):
                done[job.sample.key] = before if isinstance(before, str) else str(result)
            else:
                before[job.name] = result
            while waiting and self._complete(waiting[0], done):
                yield waiting[0], done.pop(waiting.popleft().key)

    def _complete(self, sample: PlannedSample, done: Mapping[str, Fields | str]) -> bool:
        found = done.get(sample.key)
        return isinstance(found, str) or (found is not None and len(found) == len(PICTURES[self.column](sample)))

    @torch.no_grad()
    def _encoded(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Tensor | str]]:
        batch: list[tuple[_Job, np.ndarray]] = []
        for job, pixels in self._decoded(jobs):
            if isinstance(pixels, str):
                yield from self._flush(batch)
                batch = []
                yield job, pixels
                continue
            if batch and (len(batch) == self.batch_size or batch[0][1].shape != pixels.shape):
                yield from self._flush(batch)
                batch = []
            batch.append((job, pixels))
        yield from self._flush(batch)

    def _flush(self, batch: Sequence[tuple[_Job, np.ndarray]]) -> Iterator[tuple[_Job, Tensor | str]]:
        if not batch:
            return
        pixels = torch.from_numpy(np.stack([p for _, p in batch])).to(self.vae.device)  # as bytes: a quarter of the traffic
        video = pixels.permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1  # [B 3 F H W]
        # A generator per key: the posterior's sample does not depend on batches or ranks.
        draws = [generator(self.seed, stream=self._stream(job)) for job, _ in batch]
        latents = self.vae.encode(video.to(self.vae.dtype), generator=draws).to("cpu", self.dtype)
        for (job, _), x in zip(batch, latents):
            if x.isfinite().all():
                yield job, x.clone()
            else:
                yield job, f"{job.picture.path}: the VAE makes NaN or infinite latents of it; try model.vae_dtype=float32"

    def _stream(self, job: _Job) -> str:
        return f"posterior/{job.sample.key}" if job.name == "latents" else f"posterior/{job.name}/{job.sample.key}"

    def _decoded(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, np.ndarray | str]]:
        units = _units(jobs)
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            ahead: deque[tuple[list[_Job], Future]] = deque()
            try:
                for unit in units:
                    ahead.append((unit, pool.submit(_decode, unit)))
                    # One per thread and one in hand: enough to keep the VAE busy, little enough to fit in memory.
                    if len(ahead) > max(1, self.workers):
                        first, future = ahead.popleft()
                        yield from zip(first, future.result())
                while ahead:
                    first, future = ahead.popleft()
                    yield from zip(first, future.result())
            finally:
                for _, future in ahead:
                    future.cancel()


def _units(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Neighbours that come from one file at one size."""
    unit: list[_Job] = []
    for job in jobs:
        same = unit and (unit[0].picture.path, unit[0].picture.size) == (job.picture.path, job.picture.size)
        if unit and (not same or sum(j.picture.n_bytes for j in unit) + job.picture.n_bytes > DECODE_BYTES):
            yield unit
            unit = []
        unit.append(job)
    if unit:
        yield unit


def _decode(unit: Sequence[_Job]) -> list[np.ndarray | str]:
    first = unit[0].picture
    try:
        return list(read_windows(first.path, [job.picture.frames for job in unit], size=first.size))
    except DataError as error:
        if len(unit) == 1:
            return [str(error)]
    return [result for job in unit for result in _decode([job])]  # the early windows of a damaged file may be sound


@dataclass(frozen=True)
class TextEncoder:
    """Captions through the text encoders; windows of one clip share theirs."""

    text: Any
    dtype: torch.dtype
    cache: OrderedDict[str, Fields | str] = field(default_factory=OrderedDict)

    @torch.no_grad()
    def __call__(self, samples: Sequence[PlannedSample]) -> Iterator[Outcome]:
        for i in range(0, len(samples), CAPTIONS):
            part = samples[i : i + CAPTIONS]
            self._encode(list(dict.fromkeys(c for s in part for c in s.captions)))
            for s in part:
                found = [self.cache[c] for c in s.captions]
                faults = [f for f in found if isinstance(f, str)]
                yield s, f"{s.clip.path}: {faults[0]}" if faults else _numbered([f for f in found if not isinstance(f, str)])

    def _encode(self, captions: Sequence[str]) -> None:
        """Make sure that these are in the cache, which otherwise keeps the last ones only."""
        new = [c for c in captions if c not in self.cache]
        for caption, fields in zip(new, self.text.encode(new) if new else []):
            self.cache[caption] = self.stored(fields, caption)
        for caption in captions:
            self.cache.move_to_end(caption)
        while len(self.cache) > max(2 * CAPTIONS, len(captions)):
            self.cache.popitem(last=False)

    def stored(self, fields: Mapping[str, Tensor], caption: str) -> Fields | str:
        if not all(t.isfinite().all() for t in fields.values()):
            return f"the text encoder makes NaN or infinite embeddings of the caption {caption[:80]!r}"
        return {name: t.to("cpu", self.dtype).contiguous() for name, t in fields.items()}


def _numbered(captions: Sequence[Fields]) -> Fields:
    """The first caption's fields under their names, those of caption i as NAME.i."""
    return {f"{name}.{i}" if i else name: t for i, fields in enumerate(captions) for name, t in fields.items()}


def rejected(sample: PlannedSample, reason: str) -> Rejected:
    """Known again by a re-run, until the file, its window or its caption changes."""
    parts = [sample.digest(column, "") for column in ("latents", "text", "control")]
    return Rejected(str(sample.clip.path), reason, f"{sample.key}/{'/'.join(p[:16] for p in parts)}")
