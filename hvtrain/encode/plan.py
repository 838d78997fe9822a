"""From clips to samples to tars: what is to be encoded, under which key, and what would make it out of date."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hvtrain.encode.dataset import Clip, Dataset
from hvtrain.encode.frames import kept_frames
from hvtrain.encode.media import probe
from hvtrain.errors import DataError

MIN_CHUNKS = 8  # a small set is cut finer, so that several ranks have work


@dataclass(frozen=True)
class PlannedSample:
    """One window of one clip."""

    key: str
    path: Path
    caption: str
    frames: tuple[int, ...]  # indices into the file
    size: tuple[int, int]  # width, height
    repeats: int
    state: str  # size and time of the source file: a changed clip is encoded again

    @property
    def bucket(self) -> str:
        return f"{len(self.frames)}x{self.size[1]}x{self.size[0]}"

    @property
    def cost(self) -> int:
        return len(self.frames) * self.size[0] * self.size[1]

    def digest(self, column: str, encoder: str) -> str:
        """What the column's tensors are a function of."""
        if column == "text":
            return _hash(self.caption, encoder)
        return _hash(str(self.path.resolve()), self.state, repr(self.frames), repr(self.size), encoder)


@dataclass(frozen=True)
class PlannedChunk:
    """The samples of one tar."""

    samples: tuple[PlannedSample, ...]

    @property
    def bucket(self) -> str:
        return self.samples[0].bucket

    @property
    def repeats(self) -> int:
        return self.samples[0].repeats

    @property
    def cost(self) -> int:
        return sum(s.cost for s in self.samples)

    def tar_name(self, column: str, encoder: str) -> str:
        """A function of the contents: a tar that exists under its name is the right one."""
        parts = [part for s in self.samples for part in (s.key, s.digest(column, encoder))]
        return f"{column}/{self.bucket}-{_hash(*parts)[:16]}.tar"


def plan_samples(clips: Iterable[Clip], *, target_fps: float, workers: int) -> list[PlannedSample]:
    """Look at every file (in threads) and cut it into windows."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(pool.map(lambda clip: _samples_of(clip, target_fps), clips))
    samples = [s for group in found for s in group]
    if not samples:
        raise DataError("no clip is long enough for its dataset's target_frames; lower target_frames, or use 'full'")
    return samples


def _samples_of(clip: Clip, target_fps: float) -> list[PlannedSample]:
    dataset: Dataset = clip.dataset
    seen = probe(clip.path)
    kept = kept_frames(seen.frames, source_fps=dataset.source_fps, target_fps=target_fps)
    size = dataset.bucket.choose(seen.width, seen.height)
    status = clip.path.stat()
    stem = re.sub(r"[^A-Za-z0-9]+", "-", clip.path.stem).strip("-")[:60] or "clip"
    made = []
    for start, length in dataset.frames.windows(len(kept)):
        frames = tuple(kept[start : start + length])
        # The path is in the hash: equal stems in different folders are different samples.
        tail = _hash(str(clip.path.resolve()), repr(frames), repr(size))[:12]
        made.append(PlannedSample(
            f"{stem}-{tail}", clip.path, clip.caption, frames, size, dataset.num_repeats,
            f"{status.st_size}/{status.st_mtime_ns}",
        ))
    return made


def without_doubles(samples: Sequence[PlannedSample]) -> list[PlannedSample]:
    """Two entries that make the same sample of the same file count once; with different captions they are an error."""
    unique: dict[str, PlannedSample] = {}
    for s in samples:
        if s.key in unique and unique[s.key].caption != s.caption:
            raise DataError(f"{s.path}: listed twice with different captions; keep one")
        unique.setdefault(s.key, s)
    return list(unique.values())


def cut_chunks(samples: Sequence[PlannedSample], *, samples_per_tar: int) -> list[PlannedChunk]:
    """Tars of one bucket and repeat count each. A function of the samples alone, not of the number of ranks."""
    groups: dict[tuple[str, int], list[PlannedSample]] = {}
    for s in samples:
        groups.setdefault((s.bucket, s.repeats), []).append(s)
    chunks = []
    for _, members in sorted(groups.items()):
        n = min(samples_per_tar, max(1, -(-len(members) // MIN_CHUNKS)))
        chunks += [PlannedChunk(tuple(members[i : i + n])) for i in range(0, len(members), n)]
    return chunks


def share_out(chunks: Sequence[PlannedChunk], *, rank: int, world: int) -> list[PlannedChunk]:
    """This rank's chunks: the dearest first to whom has least."""
    loads, mine = [0] * world, []
    for chunk in sorted(chunks, key=lambda c: -c.cost):
        least = loads.index(min(loads))
        loads[least] += chunk.cost
        if least == rank:
            mine.append(chunk)
    return mine


def dataset_hash(samples: Sequence[PlannedSample], encoders: Mapping[str, str]) -> str:
    return _hash(*[s.digest(column, name) for s in samples for column, name in sorted(encoders.items())])


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
