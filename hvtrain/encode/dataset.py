"""The dataset file: TOML in musubi-tuner's schema, checked strictly, and the clips that it names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.encode.buckets import STEP, BucketRule
from hvtrain.encode.frames import LEGAL, FrameRule
from hvtrain.encode.media import IMAGES, VIDEOS
from hvtrain.errors import DataError, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERAL = {
    "caption_extension": str, "batch_size": int, "num_repeats": int, "resolution": (int, list), "enable_bucket": bool,
    "bucket_no_upscale": bool, "recursive": bool,
}
SOURCES = ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")
VIDEO = {
    "target_frames": list, "frame_extraction": str, "frame_stride": int, "frame_sample": int, "max_frames": int,
    "source_fps": (float, int),
}
KEYS: dict[str, Any] = {**GENERAL, **dict.fromkeys(SOURCES, str), **VIDEO, "cache_directory": str}


@dataclass(frozen=True)
class Dataset:
    """One [[datasets]] entry, complete."""

    source: str  # one of SOURCES
    path: Path
    bucket: BucketRule
    frames: FrameRule
    caption_extension: str = ".txt"
    num_repeats: int = 1
    recursive: bool = False
    source_fps: float | None = None

    @property
    def is_video(self) -> bool:
        return self.source.startswith("video")


@dataclass(frozen=True)
class Clip:
    """A source file and its caption."""

    path: Path
    caption: str
    dataset: Dataset = field(repr=False)


def read_dataset_file(path: str | Path) -> list[Dataset]:
    """The entries of a dataset file. Relative paths count from the current directory, as in musubi-tuner."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    for key in raw:
        if key not in ("general", "datasets"):
            raise DataError(f"{path}: unknown key '{key}'; {suggest(key, ['general', 'datasets'])}")
    general, entries = raw.get("general", {}), raw.get("datasets", [])
    _check(general, GENERAL, f"{path}: [general]")
    if not entries:
        raise DataError(f"{path}: no [[datasets]] entry; add one with video_directory or image_directory")
    return [_dataset({**general, **e}, f"{path}: [[datasets]] number {i}") for i, e in enumerate(entries, start=1)]


def _check(table: Mapping[str, Any], legal: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if key not in legal:
            raise DataError(f"{where}: unknown key '{key}'; {suggest(key, legal)}")
        kinds = legal[key] if isinstance(legal[key], tuple) else (legal[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise DataError(f"{where}: {key} is {value!r}, expected {expected}")


def _dataset(table: dict[str, Any], where: str) -> Dataset:
    _check(table, KEYS, where)
    given = [s for s in SOURCES if s in table]
    if len(given) != 1:
        raise DataError(f"{where}: {len(given)} sources given; give exactly one of {', '.join(SOURCES)}")
    source = given[0]
    if source.startswith("image") and (odd := [k for k in VIDEO if k in table]):
        raise DataError(f"{where}: '{odd[0]}' is for videos, this entry has {source}")
    path = Path(table[source])
    if not path.exists():
        raise DataError(f"{where}: {source} = '{path}' does not exist")
    rule = FrameRule(
        target_frames=tuple(table.get("target_frames", [1])), extraction=table.get("frame_extraction", "head"),
        stride=table.get("frame_stride", 1), sample=table.get("frame_sample", 1), max_frames=table.get("max_frames", 129),
    )
    _check_frames(rule, where)
    for key in ("num_repeats", "batch_size"):
        if table.get(key, 1) < 1:
            raise DataError(f"{where}: {key} is {table[key]}, expected 1 or more")
    return Dataset(
        source=source, path=path, frames=rule if source.startswith("video") else FrameRule(),
        bucket=BucketRule(
            _resolution(table.get("resolution", [960, 544]), where), table.get("enable_bucket", False),
            table.get("bucket_no_upscale", False),
        ),
        caption_extension=table.get("caption_extension", ".txt"), num_repeats=table.get("num_repeats", 1),
        recursive=table.get("recursive", False),
        source_fps=float(table["source_fps"]) if "source_fps" in table else None,
    )


def _check_frames(rule: FrameRule, where: str) -> None:
    if rule.extraction not in LEGAL:
        raise DataError(f"{where}: frame_extraction '{rule.extraction}'; {suggest(rule.extraction, LEGAL)}")
    if not rule.target_frames or any(not isinstance(t, int) or t < 1 for t in rule.target_frames):
        raise DataError(f"{where}: target_frames is {list(rule.target_frames)}, expected numbers like [1, 25, 49]")
    for name in ("stride", "sample", "max_frames"):
        if getattr(rule, name) < 1:
            raise DataError(f"{where}: frame_{name} is {getattr(rule, name)}, expected 1 or more")


def _resolution(value: int | list, where: str) -> tuple[int, int]:
    pair = [value, value] if isinstance(value, int) else value
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise DataError(f"{where}: resolution is {value!r}, expected a number or [width, height]")
    for n in pair:
        if n % STEP:
            near = max(STEP, round(n / STEP) * STEP)
            raise DataError(f"{where}: resolution {pair[0]} x {pair[1]}: expected multiples of {STEP}, for example {near}")
    return pair[0], pair[1]


# --- clips --------------------------------------------------------------------------------------------------------


def find_clips(dataset: Dataset) -> list[Clip]:
    """The dataset's clips, sorted. Each has a caption, or it is a DataError that names the file."""
    found = list(_from_jsonl(dataset) if "jsonl" in dataset.source else _from_folder(dataset))
    if not found:
        kind = "videos" if dataset.is_video else "images"
        raise DataError(f"{dataset.path}: no {kind} here; check {dataset.source} (recursive = true looks into sub-folders)")
    return found


def _from_folder(dataset: Dataset) -> Iterator[Clip]:
    legal = VIDEOS if dataset.is_video else IMAGES
    pattern = "**/*" if dataset.recursive else "*"
    for path in sorted(p for p in dataset.path.glob(pattern) if p.is_file() and p.suffix.lower() in legal):
        caption = path.with_suffix(dataset.caption_extension)
        if not caption.is_file():
            raise DataError(f"{path}: has no caption; write it to {caption.name} beside it")
        yield Clip(path, _text(caption), dataset)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the caption cannot be read ({error}); save it as UTF-8 text") from None


def _from_jsonl(dataset: Dataset) -> Iterator[Clip]:
    name = "video_path" if dataset.is_video else "image_path"
    for number, line in enumerate(_text(dataset.path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{dataset.path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise DataError(f"{where}: expected {{\"{name}\": ..., \"caption\": ...}}")
        if not isinstance(row.get("caption"), str):
            raise DataError(f"{where}: {row[name]} has no caption; add \"caption\"")
        path = Path(row[name])
        path = path if path.is_absolute() or path.exists() else dataset.path.parent / path
        if not path.exists():
            raise DataError(f"{where}: {row[name]} does not exist")
        yield Clip(path, row["caption"], dataset)
