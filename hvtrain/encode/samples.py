"""From clips to samples to tars: what is to be encoded, under which key, and what would make it out of
date."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

from hvtrain.encode.clips import Clip, Rejected
from hvtrain.encode.dataset import Dataset
from hvtrain.encode.frames import kept_frames, shown_frames
from hvtrain.encode.media import Probe, probe
from hvtrain.errors import DataError

MIN_CHUNKS = 8  # a small set is cut finer, so that several ranks have work
PROBES = ".probes.json"


@dataclass(frozen=True)
class Picture:
    """Frames of a file, at a size."""

    path: Path
    state: str  # size and time of the file, and how it is turned: a changed one is encoded again
    frames: tuple[int, ...]  # indices into the file, ascending; some may repeat
    size: tuple[int, int]  # width, height

    @property
    def identity(self) -> str:
        return repr((str(self.path.resolve()), self.state, self.frames, self.size))

    @property
    def n_bytes(self) -> int:
        """Decoded."""
        return 3 * len(self.frames) * self.size[0] * self.size[1]


@dataclass(frozen=True)
class PlannedSample:
    """One window of one clip."""

    key: str
    clip: Picture
    captions: tuple[str, ...]
    repeats: int = 1
    caption_dropout: float | None = None
    controls: tuple[Picture, ...] = ()
    image: Picture | None = None  # that it comes with, instead of its own first frame
    mask: Picture | None = None  # what of it counts in training

    @property
    def bucket(self) -> str:
        """FxHxW, and the sizes of controls that have another."""
        w, h = self.clip.size
        others = "".join(f"+{c.size[1]}x{c.size[0]}" for c in self.controls if c.size != self.clip.size)
        return f"{len(self.clip.frames)}x{h}x{w}{others}"

    @property
    def cost(self) -> int:
        return self.clip.n_bytes

    @property
    def state(self) -> str:
        """Another one if its file, window, captions, controls, image or mask change."""
        beside = [*self.controls, *(p for p in (self.image, self.mask) if p)]
        parts = ([self.clip.identity], self.captions, [c.identity for c in beside])
        return "/".join([self.key, *(hashed(*part, "")[:16] for part in parts)])


@dataclass(frozen=True)
class PlannedChunk:
    """The samples of one tar."""

    samples: tuple[PlannedSample, ...]

    @property
    def bucket(self) -> str:
        return self.samples[0].bucket

    @property
    def cost(self) -> int:
        return sum(s.cost for s in self.samples)

    def without(self, keys: set[str]) -> PlannedChunk:
        return PlannedChunk(tuple(s for s in self.samples if s.key not in keys))


class Probes:
    """What was seen of each file, kept beside the set so that a re-run opens only new files."""

    def __init__(self, folder: Path | None) -> None:
        self.seen: dict[str, list] = {}
        with suppress(OSError, ValueError):  # a cache: without it the files are opened again
            self.seen = json.loads((folder / PROBES).read_text()) if folder else {}
        self.new: dict[str, list] = {}

    def look(self, path: Path) -> tuple[Probe, str]:
        """The probe of a file, and its state."""
        status = path.stat()
        parts = path.iterdir() if path.is_dir() else ()
        newest = max([status.st_mtime_ns, *(p.stat().st_mtime_ns for p in parts)])
        name, state = str(path.resolve()), f"{status.st_size}/{newest}"
        row = self.seen.get(name)
        if not row or row[0] != state or len(row) != 1 + len(fields(Probe)):
            row = self.new[name] = [state, *vars(probe(path)).values()]
        found = replace(Probe(*row[1:]), times=tuple(row[-1]))  # JSON made a list of it
        return found, f"{state}/{found.view}" if found.view else state


def plan_clips(
    clips: Sequence[Clip | Rejected], probes: Probes, *, target_fps: float, workers: int
) -> list[list[PlannedSample | Rejected]]:
    """For each clip its samples, or why it has none. Files are opened by threads."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(lambda clip: _samples_of(clip, probes, target_fps), clips))


def _samples_of(clip: Clip | Rejected, probes: Probes, target_fps: float) -> list[PlannedSample | Rejected]:
    if isinstance(clip, Rejected):
        return [clip]
    dataset: Dataset = clip.dataset
    try:
        seen, state = probes.look(clip.path)
        controls = [(path, *probes.look(path)) for path in clip.controls]
        look = probes.look(clip.image)[1] if clip.image else ""
        masks = probes.look(clip.mask) if clip.mask else None
        kept = _kept(seen, source_fps=dataset.source_fps, target_fps=target_fps)
    except (DataError, OSError) as error:
        return [Rejected(str(clip.path), _named(clip.path, error))]
    size = dataset.bucket.choose(seen.width, seen.height)
    windows = dataset.frames.windows(len(kept))
    if not windows:
        return [Rejected(str(clip.path), _too_short(clip.path, len(kept), dataset))]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", clip.path.stem).strip("-")[:60] or "clip"
    made: list[PlannedSample | Rejected] = []
    for start, length in windows:
        frames = tuple(kept[start : start + length])
        # The path is in the hash: equal stems in different folders are different samples.
        own = [str(clip.image.resolve())] if clip.image else []
        tail = hashed(str(clip.path.resolve()), repr(frames), repr(size), *own)[:12]
        pictures = tuple(
            Picture(
                path, its, tuple(min(i, found.frames - 1) for i in frames),
                dataset.control.size(found.width, found.height, bucket=size),
            )
            for path, found, its in controls
        )
        mask = None
        if clip.mask and masks:
            mask = Picture(clip.mask, masks[1], tuple(min(i, masks[0].frames - 1) for i in frames), size)
        made.append(PlannedSample(
            f"{stem}-{tail}", Picture(clip.path, state, frames, size), clip.captions, dataset.num_repeats,
            dataset.caption_dropout, pictures, Picture(clip.image, look, (0,), size) if clip.image else None,
            mask,
        ))
    return made


def _kept(seen: Probe, *, source_fps: float | None, target_fps: float) -> list[int]:
    """Indices of the frames that windows are cut from, in order."""
    if seen.times:
        return shown_frames(seen.times, source_fps=source_fps, target_fps=target_fps)
    return kept_frames(seen.frames, source_fps=source_fps, target_fps=target_fps)


def _named(path: Path, error: Exception) -> str:
    reason = (
        f"{error.strerror or error}; give a file that can be read"
        if isinstance(error, OSError) else str(error)
    )
    return reason if str(path) in reason else f"{path}: {reason}"


def _too_short(path: Path, n: int, dataset: Dataset) -> str:
    if dataset.frames.extraction == "full":
        return f"{path}: has no frames"
    least = min(dataset.frames.targets)
    return (
        f"{path}: {n} frames, target_frames asks for {least} or more; lower it, or use frame_extraction "
        "'full'"
    )


def without_doubles(samples: Sequence[PlannedSample]) -> list[PlannedSample]:
    """Two entries that make the same sample of the same file count once; with different
    captions they are an error."""
    unique: dict[str, PlannedSample] = {}
    for s in samples:
        if s.key in unique and unique[s.key].captions != s.captions:
            raise DataError(
                f"{s.clip.path}: listed twice with different captions; keep one, or give several as "
                "\"captions\": [...]"
            )
        unique.setdefault(s.key, s)
    return list(unique.values())


def cut_chunks(samples: Sequence[PlannedSample], *, samples_per_tar: int) -> list[PlannedChunk]:
    """Tars of one bucket, repeat count and dropout each. A function of the samples alone,
    not of the number of ranks."""
    groups: dict[tuple[str, int, float], list[PlannedSample]] = {}
    for s in samples:
        rate = -1.0 if s.caption_dropout is None else s.caption_dropout
        groups.setdefault((s.bucket, s.repeats, rate), []).append(s)
    chunks = []
    for _, members in sorted(groups.items()):
        n = min(samples_per_tar, max(1, -(-len(members) // MIN_CHUNKS)))
        chunks += [PlannedChunk(tuple(members[i : i + n])) for i in range(0, len(members), n)]
    return chunks


def share_out(chunks: Sequence[PlannedChunk], *, rank: int, world: int) -> list[int]:
    """Numbers of this rank's chunks: the dearest (frames x area) first to whom has least."""
    loads, mine = [0] * world, []
    for number in sorted(range(len(chunks)), key=lambda i: -chunks[i].cost):
        least = loads.index(min(loads))
        loads[least] += chunks[number].cost
        if least == rank:
            mine.append(number)
    return mine


def hashed(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
