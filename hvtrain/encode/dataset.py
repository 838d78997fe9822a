"""The dataset file: musubi-tuner's schema in TOML or YAML, checked strictly. Its clips: encode/clips.py."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvtrain.config.load import parse_yaml
from hvtrain.encode.buckets import BucketRule, Size, whole
from hvtrain.encode.frames import LEGAL, FrameRule
from hvtrain.encode.places import brief, place, shown, sound
from hvtrain.errors import DataError, suggest
from hvtrain.models.spec import Flavor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERAL = {
    "caption_extension": str, "batch_size": int, "num_repeats": int, "resolution": (int, list),
    "enable_bucket": bool, "bucket_no_upscale": bool, "recursive": bool, "caption_prefix": str,
    "caption_suffix": str, "caption_dropout": (float, int),
}
SOURCES = ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")
VIDEO = {
    "target_frames": list, "frame_extraction": str, "frame_stride": int, "frame_sample": int,
    "max_frames": int, "source_fps": (float, int),
}
IMAGE = {"no_resize_control": bool, "control_resolution": (int, list)}
KEYS: dict[str, Any] = {
    **GENERAL, **dict.fromkeys(SOURCES, str), **VIDEO, **IMAGE, "control_directory": str,
    "mask_directory": str, "cache_directory": str,
}
OLD_NAMES = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
BOUNDS: dict[str, tuple[float, float]] = {  # both ends are legal; NaN and infinity are between no two numbers
    "batch_size": (1, 10**6), "num_repeats": (1, 10**4), "caption_dropout": (0, 1),
    "source_fps": (0.01, 10**4), "frame_stride": (1, 10**9), "frame_sample": (1, 10**6),
    "max_frames": (1, 10**9),
}
RESOLUTION = (960, 544)  # width and height where a dataset does not say
MAX_SIDE = 8192  # pixels of a resolution: far above what any model was trained with
FOREIGN = (
    "multiple_target", "fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"
)


@dataclass(frozen=True)
class ControlRule:
    """Which size a control picture or clip gets: that of the sample, its own, or a bucket of its own."""

    unit: Size  # of which width and height are multiples
    directory: Path | None = None
    keep_size: bool = False
    resolution: Size | None = None

    def size(self, width: int, height: int, *, bucket: Size) -> Size:
        if self.resolution is not None:
            return BucketRule(self.resolution, self.unit, enabled=True).choose(width, height)
        return whole((width, height), self.unit) if self.keep_size else bucket


@dataclass(frozen=True)
class Dataset:
    """One [[datasets]] entry, complete."""

    source: str  # one of SOURCES
    path: Path
    bucket: BucketRule
    frames: FrameRule
    control: ControlRule
    image_directory: Path | None = None  # of videos: what each begins with, instead of its own first frame
    mask_directory: Path | None = None  # what of each clip counts in training
    caption_extension: str = ".txt"
    caption_prefix: str | None = None
    prompt_prefix: str = ""  # the model's
    caption_suffix: str = ""
    caption_dropout: float | None = None  # None: what training says
    num_repeats: int = 1
    recursive: bool = False
    source_fps: float | None = None

    @property
    def is_video(self) -> bool:
        return self.source.startswith("video")

    def prefixed(self, caption: str) -> str:
        """With the dataset's own prefix; without one, as prompts of the model begin."""
        model = "" if caption.startswith(self.prompt_prefix) else self.prompt_prefix
        return (model if self.caption_prefix is None else self.caption_prefix) + caption


def read_dataset_file(path: str | Path, flavor: Flavor) -> list[Dataset]:
    """The entries of a dataset file, with absolute paths (places.py) and sizes that the flavor's latents
    can hold. Raises DataError."""
    path = Path(path)
    raw = _read(path)
    for key in raw:
        if key not in ("general", "datasets"):
            raise DataError(f"{path}: unknown key {brief(key)}; {suggest(str(key), ['general', 'datasets'])}")
    general, entries = raw.get("general") or {}, raw.get("datasets") or []
    if (
        not isinstance(general, dict) or not isinstance(entries, list)
        or not all(isinstance(e, dict) for e in entries)
    ):
        raise DataError(f"{path}: expected keys under 'general' and a list of entries under 'datasets'")
    _check(general, GENERAL, f"{path}: [general]")
    if not entries:
        raise DataError(f"{path}: no [[datasets]] entry; add one with video_directory or image_directory")
    folder = Path(os.path.abspath(path)).parent
    where = f"{path}: [[datasets]] number "
    return [_dataset({**general, **e}, f"{where}{i}", folder, flavor) for i, e in enumerate(entries, start=1)]


def _read(path: Path) -> dict[str, Any]:
    """TOML, or YAML if the name ends so."""
    kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "TOML"
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file; give a dataset file (TOML or YAML)")
        raw = (
            parse_yaml(path.read_bytes())
            if kind == "YAML" else tomllib.loads(path.read_text(encoding="utf-8-sig"))
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise DataError(f"{path}: not {kind}: nested too deeply") from None
    # of TOML's odd dates and numbers, too
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise DataError(
            f"{path}: not {kind}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected 'general' and 'datasets', found {type(raw).__name__}")
    return raw


def _check(table: Mapping[str, Any], legal: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if key in FOREIGN:
            raise DataError(
                f"{where}: {key} belongs to another architecture (FramePack, image editing); remove it"
            )
        if key not in legal:
            raise DataError(f"{where}: unknown key {brief(key)}; {suggest(str(key), legal)}")
        kinds = legal[key] if isinstance(legal[key], tuple) else (legal[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            raise DataError(f"{where}: {key} is {brief(value)}, expected {expected}")
        if key in BOUNDS and not BOUNDS[key][0] <= value <= BOUNDS[key][1]:  # of NaN neither is true
            low, high = BOUNDS[key]
            raise DataError(f"{where}: {key} is {brief(value)}, expected a number from {low} to {high}")
        if isinstance(value, str):
            try:
                sound(value)
            except DataError as error:
                raise DataError(f"{where}: {key}: {error}") from None


def _dataset(table: dict[str, Any], where: str, folder: Path, flavor: Flavor) -> Dataset:
    """`folder`: of the dataset file."""
    latent = flavor.latent
    unit = latent.unit[::-1]
    table = {OLD_NAMES.get(key, key): value for key, value in table.items()}
    _check(table, KEYS, where)
    given = [s for s in SOURCES if s in table]
    images = "image_directory" in table and "video_directory" in table  # beside the clips, not a source
    given = [s for s in given if not (images and s == "image_directory")]
    if len(given) != 1:
        raise DataError(f"{where}: {len(given)} sources given; give exactly one of {', '.join(SOURCES)}")
    source = given[0]
    if source.startswith("image") and (odd := [k for k in VIDEO if k in table]):
        raise DataError(f"{where}: '{odd[0]}' is for videos, this entry has {source}")
    if source.startswith("video") and (odd := [k for k in IMAGE if k in table]):
        raise DataError(
            f"{where}: '{odd[0]}' is for images, this entry has {source}; a control video takes the clip's "
            "size"
        )
    if images and len(flavor.given) > 1:
        raise DataError(
            f"{where}: image_directory: '{flavor.name}' takes first and last frame, those of the clip; "
            "remove it"
        )
    rule = FrameRule(
        latent.stride_t, target_frames=tuple(table.get("target_frames", [1])),
        extraction=table.get("frame_extraction", "head"), stride=table.get("frame_stride", 1),
        sample=table.get("frame_sample", 1), max_frames=table.get("max_frames", flavor.defaults.frames),
    )
    _check_frames(rule, where)
    extension = table.get("caption_extension", ".txt")
    if not re.fullmatch(r"\.[^/\0]*[^/\0.]", extension):
        raise DataError(
            f"{where}: caption_extension is {brief(extension)}, expected one with its dot, for example "
            "\".txt\""
        )
    return Dataset(
        source=source, path=_placed(table, source, where, folder),
        frames=rule if source.startswith("video") else FrameRule(latent.stride_t),
        bucket=BucketRule(
            _resolution(table.get("resolution", list(whole(RESOLUTION, unit))), "resolution", where, unit),
            unit, table.get("enable_bucket", False), table.get("bucket_no_upscale", False),
        ),
        control=_control(table, where, folder, unit),
        image_directory=_directory(table, "image_directory", where, folder) if images else None,
        mask_directory=_masks(table, where, folder),
        caption_extension=extension, caption_prefix=table.get("caption_prefix"),
        prompt_prefix=flavor.defaults.prompt_prefix, caption_suffix=table.get("caption_suffix", ""),
        num_repeats=table.get("num_repeats", 1),
        caption_dropout=float(table["caption_dropout"]) if "caption_dropout" in table else None,
        recursive=table.get("recursive", False),
        source_fps=float(table["source_fps"]) if "source_fps" in table else None,
    )


def _placed(table: Mapping[str, Any], key: str, where: str, folder: Path) -> Path:
    try:
        return place(table[key], folder)
    except DataError as error:
        raise DataError(f"{where}: {key} = {error}") from None


def _directory(table: Mapping[str, Any], key: str, where: str, folder: Path) -> Path:
    found = _placed(table, key, where, folder)
    if not found.is_dir():
        raise DataError(f"{where}: {key} = '{shown(found)}' is not a directory")
    return found


def _masks(table: Mapping[str, Any], where: str, folder: Path) -> Path | None:
    if "mask_directory" in table and "jsonl" in next(s for s in SOURCES if s in table):
        raise DataError(
            f"{where}: mask_directory goes with a directory of clips; in JSONL give \"mask_path\" per line"
        )
    return _directory(table, "mask_directory", where, folder) if "mask_directory" in table else None


def _control(table: Mapping[str, Any], where: str, folder: Path, unit: Size) -> ControlRule:
    directory = (
        _directory(table, "control_directory", where, folder) if "control_directory" in table else None
    )
    if directory is not None and "jsonl" in next(s for s in SOURCES if s in table):
        raise DataError(
            f"{where}: control_directory goes with a directory of clips; in JSONL give \"control_path\" per "
            "line"
        )
    if table.get("no_resize_control") and "control_resolution" in table:
        raise DataError(f"{where}: no_resize_control and control_resolution exclude each other; keep one")
    key = "control_resolution"
    resolution = _resolution(table[key], key, where, unit) if key in table else None
    return ControlRule(unit, directory, table.get("no_resize_control", False), resolution)


def _check_frames(rule: FrameRule, where: str) -> None:
    if rule.extraction not in LEGAL:
        raise DataError(
            f"{where}: frame_extraction {brief(rule.extraction)}; {suggest(rule.extraction, LEGAL)}"
        )
    if not rule.target_frames or not all(_is_number(t) for t in rule.target_frames):
        raise DataError(
            f"{where}: target_frames is {brief(list(rule.target_frames))}, expected numbers like [1, 25, 49]"
        )


def _resolution(value: int | list, key: str, where: str, unit: Size) -> Size:
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(_is_number(n) and n <= MAX_SIDE for n in pair):
        raise DataError(
            f"{where}: {key} is {brief(value)}, expected a number up to {MAX_SIDE}, or [width, height]"
        )
    for n, step in zip(pair, unit):
        if n % step:
            near = max(step, round(n / step) * step)
            raise DataError(
                f"{where}: {key} {pair[0]} x {pair[1]}: expected multiples of {step}, for example {near}"
            )
    return pair[0], pair[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
