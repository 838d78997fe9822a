"""`hvtrain data check`: what a dataset yields and what is wrong with it, before anything is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvtrain.config import ModelConfig
from hvtrain.encode.clips import Clip, Rejected, find_clips
from hvtrain.encode.dataset import Dataset, read_dataset_file
from hvtrain.encode.places import shown
from hvtrain.encode.samples import PlannedSample, Probes, plan_clips, without_doubles
from hvtrain.models import find
from hvtrain.models.spec import Flavor
from shards.info import size

SHOWN = 20  # unusable clips that are listed
ENLARGED = 1.5  # times: from here on a warning
LETTERS = 4  # of a token of English, about


@dataclass(frozen=True)
class EntryYield:
    """What one [[datasets]] entry gives."""

    dataset: Dataset
    clips: int
    samples: int
    frames: int  # of the clips, at the model's rate
    used: int  # of these, in at least one sample
    short: Mapping[int, int]  # target_frames -> usable clips that are too short for it


@dataclass(frozen=True)
class DatasetReport:
    model: str
    flavor: Flavor
    entries: tuple[EntryYield, ...]
    samples: tuple[PlannedSample, ...]
    refused: tuple[Rejected, ...]
    enlarged: tuple[Enlarged, ...]
    listed_tokens: int  # of the largest video that the model's authors list


@dataclass(frozen=True)
class Enlarged:
    """A clip whose samples have more pixels than it shows."""

    path: Path
    times: float  # in length
    shown: tuple[int, int]  # width, height
    size: tuple[int, int]


def look(path: str, *, model: str | None, flavor: str | None, workers: int) -> DatasetReport:
    """Open every file of the dataset; of each only the first frame is decoded."""
    spec = find(model or ModelConfig.name, key="--model")
    chosen = spec.flavor(flavor)
    probes = Probes(None)
    entries, samples, refused, enlarged = [], [], [], []
    for dataset in read_dataset_file(path, chosen):
        clips = find_clips(dataset)
        found = plan_clips(clips, probes, target_fps=chosen.defaults.fps, workers=workers)
        good = [s for rows in found for s in rows if isinstance(s, PlannedSample)]
        refused += [s for rows in found for s in rows if isinstance(s, Rejected)]
        samples += good
        n_frames = sum(_frames(clip, probes) for clip in clips)
        used = sum(
            len({i for s in rows if isinstance(s, PlannedSample) for i in s.clip.frames}) for rows in found
        )
        entries.append(EntryYield(dataset, len(clips), len(good), n_frames, used, _short(dataset, found)))
        enlarged += [
            e for rows in found
            for s in rows[:1] if isinstance(s, PlannedSample) and (e := _enlarged(s, probes))
        ]
    d, geometry = chosen.defaults, chosen.latent
    listed = [
        geometry.shape(frames=d.frames, height=h, width=w) for w, h in (*spec.sizes, (d.width, d.height))
    ]
    return DatasetReport(
        spec.name, chosen, tuple(entries), tuple(without_doubles(samples)), tuple(refused), tuple(enlarged),
        max(map(geometry.n_tokens, listed)),
    )


def _short(dataset: Dataset, found: Sequence[Sequence[PlannedSample | Rejected]]) -> dict[int, int]:
    if dataset.frames.extraction == "full":
        return {}
    lengths = [{len(s.clip.frames) for s in rows if isinstance(s, PlannedSample)} for rows in found]
    counts = {t: sum(bool(made) and t not in made for made in lengths) for t in dataset.frames.targets}
    return {t: n for t, n in counts.items() if n}


def _enlarged(s: PlannedSample, probes: Probes) -> Enlarged | None:
    width, height = probes.new[str(s.clip.path.resolve())][1:3]
    times = max(s.clip.size[0] / width, s.clip.size[1] / height)
    return Enlarged(s.clip.path, times, (width, height), s.clip.size) if times > ENLARGED else None


def _frames(clip: Clip | Rejected, probes: Probes) -> int:
    """Of a clip that could be opened, else 0."""
    row = probes.new.get(str(clip.path.resolve())) if isinstance(clip, Clip) else None
    return row[3] if row else 0


def lines(report: DatasetReport) -> Iterator[str]:
    d = report.flavor.defaults
    yield f"as {report.model} {report.flavor.name} sees it ({d.fps} frames a second)"
    for number, e in enumerate(report.entries, start=1):
        share = f", {100 * e.used / e.frames:.0f} % of {e.frames} frames are used" if e.frames else ""
        yield (
            f"entry {number} ({shown(e.dataset.path)}): {n_of(e.clips, 'clip')}, "
            f"{n_of(e.samples, 'sample')}{share}"
        )
        for target, n in e.short.items():
            yield f"  {n_of(n, 'clip')} too short for target_frames {target}, used for the lower ones"
    buckets = Counter(s.bucket for s in report.samples)
    for bucket, n in sorted(buckets.items()):
        repeats = sum(s.repeats for s in report.samples if s.bucket == bucket)
        more = f", {repeats} with repeats" if repeats != n else ""
        yield f"bucket {bucket} (frames x height x width): {n_of(n, 'sample')}{more}"
    yield from _sizes(report)
    several = sum(len(s.captions) > 1 for s in report.samples)
    if several:
        yield f"{n_of(several, 'sample')} with several captions; each epoch draws one"
    warnings = list(_warnings(report))
    yield from (f"warning: {w}" for w in warnings)
    if not report.refused:
        yield "every clip can be used" + (", but see the warnings" if warnings else "")
        return
    yield f"{n_of(len(report.refused), 'clip')} cannot be used:"
    yield from (f"  {r.reason}" for r in report.refused[:SHOWN])
    if len(report.refused) > SHOWN:
        yield f"  and {len(report.refused) - SHOWN} more"


def _warnings(report: DatasetReport) -> Iterator[str]:
    empty = [s for s in report.samples if not all(s.captions)]
    if empty:
        yield f"{n_of(len(empty), 'sample')} with an empty caption, first {shown(empty[0].clip.path)}"
    tokens = _text_tokens(report.flavor)
    most = (tokens or 0) * LETTERS
    long = [s for s in report.samples if tokens and max(map(len, s.captions)) > most]
    if long:
        letters = max(len(c) for c in long[0].captions)
        yield (
            f"{n_of(len(long), 'sample')} with a caption above {most} letters, first "
            f"{shown(long[0].clip.path)} " f"({letters}): the encoder reads {tokens} tokens, about {most} "
            "letters, and cuts the rest off"
        )
    if report.enlarged:
        worst = max(report.enlarged, key=lambda e: e.times)
        (w, h), (width, height) = worst.shown, worst.size
        yield (
            f"{n_of(len(report.enlarged), 'clip')} enlarged to more than {ENLARGED} times, most "
            f"{shown(worst.path)} " f"({w} x {h} to {width} x {height}); lower resolution, or "
            "bucket_no_upscale = true"
        )
    tokens = max((report.flavor.latent.n_tokens(_latent_shape(report, s)) for s in report.samples), default=0)
    if tokens > 2 * report.listed_tokens:
        yield (
            f"{tokens} tokens in the largest sample; the largest video of the model's authors has "
            f"{report.listed_tokens}: " "lower resolution or target_frames"
        )


def n_of(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _sizes(report: DatasetReport) -> Iterator[str]:
    """Latents exactly, embeddings by a guess at the caption's tokens; both bfloat16."""
    latents = text = tokens = 0
    for s in report.samples:
        shape = _latent_shape(report, s)
        latents += 2 * shape[0] * shape[1] * shape[2] * shape[3]
        tokens = max(tokens, report.flavor.latent.n_tokens(shape))
        for caption in s.captions:
            for field in report.flavor.cond:
                if field.column == "text":
                    n = 2
                    for width in field.dims:
                        guess = 8 + len(caption) // LETTERS
                        n *= width if width is not None else min(field.longest or guess, guess)
                    text += n
    if report.samples:
        biggest = max(report.samples, key=lambda s: s.cost)
        sizes = "x".join(map(str, _latent_shape(report, biggest)))
        yield f"largest sample: latents {sizes}, {tokens} tokens"
    yield (
        f"shards: about {size(latents)} of latents and {size(text)} of text, "
        f"{n_of(len(report.samples), 'sample')}"
    )


def _text_tokens(flavor: Flavor) -> int | None:
    """Of a caption that the encoder which reads most of it takes; None: any number."""
    longest = [field.longest for field in flavor.cond if field.column == "text" and field.ragged]
    return None if None in longest else max((n for n in longest if n), default=None)


def _latent_shape(report: DatasetReport, s: PlannedSample) -> tuple[int, int, int, int]:
    w, h = s.clip.size
    return report.flavor.latent.shape(frames=len(s.clip.frames), height=h, width=w)
