"""`hvtrain data check`: what a dataset yields and what is wrong with it, before anything is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hvtrain.encode.clips import Clip, Rejected, find_clips
from hvtrain.encode.dataset import Dataset, read_dataset_file
from hvtrain.encode.plan import PlannedSample, Probes, plan_clips, without_doubles
from hvtrain.errors import ConfigError, suggest
from hvtrain.models import all_specs, find
from hvtrain.models.base import Flavor
from shards.info import size

SHOWN = 20  # unusable clips that are listed


@dataclass(frozen=True)
class EntryYield:
    """What one [[datasets]] entry gives."""

    dataset: Dataset
    clips: int
    samples: int
    frames: int  # of the clips, at the model's rate
    used: int  # of these, in at least one sample


@dataclass(frozen=True)
class Report:
    model: str
    flavor: Flavor
    entries: tuple[EntryYield, ...]
    samples: tuple[PlannedSample, ...]
    refused: tuple[Rejected, ...]


def look(path: str, *, model: str | None, flavor: str | None, workers: int) -> Report:
    """Open every file of the dataset, decode none."""
    names = [s.name for s in all_specs()]
    if model is not None and model not in names:
        raise ConfigError(f"--model: no model '{model}'; {suggest(model, names)}")
    spec = find(model or names[0])
    chosen = spec.flavor(flavor) if flavor else next(iter(spec.flavors.values()))
    probes = Probes(None)
    entries, samples, refused = [], [], []
    for dataset in read_dataset_file(path):
        clips = find_clips(dataset)
        found = plan_clips(clips, probes, target_fps=chosen.defaults.fps, workers=workers)
        good = [s for rows in found for s in rows if isinstance(s, PlannedSample)]
        refused += [s for rows in found for s in rows if isinstance(s, Rejected)]
        samples += good
        n_frames = sum(_frames(clip, probes) for clip in clips)
        used = sum(len({i for s in rows if isinstance(s, PlannedSample) for i in s.clip.frames}) for rows in found)
        entries.append(EntryYield(dataset, len(clips), len(good), n_frames, used))
    return Report(spec.name, chosen, tuple(entries), tuple(without_doubles(samples)), tuple(refused))


def _frames(clip: Clip | Rejected, probes: Probes) -> int:
    """Of a clip that could be opened, else 0."""
    row = probes.new.get(str(clip.path.resolve())) if isinstance(clip, Clip) else None
    return row[3] if row else 0


def lines(report: Report) -> Iterator[str]:
    d = report.flavor.defaults
    yield f"as {report.model} {report.flavor.name} sees it ({d.fps} frames a second)"
    for number, e in enumerate(report.entries, start=1):
        share = f", {100 * e.used / e.frames:.0f} % of {e.frames} frames are used" if e.frames else ""
        yield f"entry {number} ({e.dataset.path}): {e.clips} clips, {e.samples} samples{share}"
    buckets = Counter(s.bucket for s in report.samples)
    for bucket, n in sorted(buckets.items()):
        repeats = sum(s.repeats for s in report.samples if s.bucket == bucket)
        shown = f", {repeats} with repeats" if repeats != n else ""
        yield f"bucket {bucket} (frames x height x width): {n} samples{shown}"
    yield from _sizes(report)
    several = sum(len(s.captions) > 1 for s in report.samples)
    empty = [s for s in report.samples if not all(s.captions)]
    if several:
        yield f"{several} samples have several captions; each epoch draws one"
    if empty:
        yield f"warning: {len(empty)} samples have an empty caption, first {empty[0].clip.path}"
    if not report.refused:
        yield "every clip can be used"
        return
    yield f"{len(report.refused)} clips cannot be used:"
    yield from (f"  {r.reason}" for r in report.refused[:SHOWN])
    if len(report.refused) > SHOWN:
        yield f"  and {len(report.refused) - SHOWN} more"


def _sizes(report: Report) -> Iterator[str]:
    """Latents exactly, embeddings by a guess at the caption's tokens (four letters each); both bfloat16."""
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
                        n *= width if width is not None else min(256, 8 + len(caption) // 4)
                    text += n
    if report.samples:
        biggest = max(report.samples, key=lambda s: s.cost)
        sizes = "x".join(map(str, _latent_shape(report, biggest)))
        yield f"largest sample: latents {sizes}, {tokens} tokens"
    yield f"shards: about {size(latents)} of latents and {size(text)} of text, {len(report.samples)} samples"


def _latent_shape(report: Report, s: PlannedSample) -> tuple[int, int, int, int]:
    w, h = s.clip.size
    return report.flavor.latent.shape(frames=len(s.clip.frames), height=h, width=w)
