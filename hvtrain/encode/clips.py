"""The clips of a dataset with their captions and controls. What cannot be used is a
Rejected, never dropped in silence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.encode.dataset import Dataset
from hvtrain.encode.media import IMAGES, VIDEOS
from hvtrain.encode.places import brief, place, shown, sound
from hvtrain.errors import DataError

MASK_KEY = "mask_path"
IMAGE_KEY = "image_path"  # of a line of videos: what it begins with; of a line of images the image itself


@dataclass(frozen=True)
class Clip:
    """A source file, its captions (one is drawn per epoch), what controls it, and
    the image that it is told by."""

    path: Path
    captions: tuple[str, ...]
    dataset: Dataset = field(repr=False)
    controls: tuple[Path, ...] = ()
    image: Path | None = None
    mask: Path | None = None  # a picture, or as many of them as frames: what of the clip counts


@dataclass(frozen=True)
class Rejected:
    """A clip that gives no samples, or a sample that cannot be made."""

    path: str
    reason: str
    digest: str = ""  # of the sample; "": found while planning, looked at anew by each run

    def __post_init__(self) -> None:
        for name in ("path", "reason"):  # both are printed, and written as UTF-8
            object.__setattr__(self, name, shown(getattr(self, name)))

    def row(self) -> str:
        return json.dumps({k: v for k, v in vars(self).items() if v}, ensure_ascii=False)


def find_clips(dataset: Dataset) -> list[Clip | Rejected]:
    """In a fixed order. A DataError if there is nothing at all, or the listing itself is broken."""
    if "jsonl" in dataset.source:
        found = list(_from_jsonl(dataset))
        if not found:
            raise DataError(
                f"{dataset.path}: is empty; expected lines {{\"{_path_key(dataset)}\": ..., \"caption\": "
                f"...}}"
            )
        return found
    if not dataset.path.is_dir():
        raise DataError(
            f"{dataset.path}: {dataset.source} names a file; give the directory, or use the JSONL key"
        )
    paths = sorted(_walk(dataset.path, deep=dataset.recursive))
    legal = VIDEOS if dataset.is_video else IMAGES
    chosen = [path for path in paths if path.suffix.lower() in legal]
    if not chosen:
        raise DataError(_nothing(dataset, paths, legal))
    return [_beside_its_caption(path, dataset) for path in chosen]


def _nothing(dataset: Dataset, paths: list[Path], legal: Sequence[str]) -> str:
    kind = "videos" if dataset.is_video else "images"
    others = sorted({p.suffix.lower() for p in paths if p.suffix})[:10]
    found = f"; found {', '.join(others)}" if others else ""
    below = any(p.is_dir() for p in dataset.path.iterdir()) and not dataset.recursive
    hint = "recursive = true looks into sub-folders" if below else f"check {dataset.source}"
    return f"{dataset.path}: no {kind} here ({' '.join(legal)} count{shown(found)}); {hint}"


def _walk(folder: Path, *, deep: bool) -> Iterator[Path]:
    """What is in the folder and, if `deep`, below it; linked folders too, each real folder once."""
    seen: set[tuple[int, int]] = set()

    def stop(error: OSError) -> None:
        raise DataError(f"{shown(error.filename or folder)}: cannot be listed ({error.strerror})")

    for here, below, names in os.walk(folder, onerror=stop, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(here, name) for name in names)
        if not deep:
            return
        below.sort()


def _beside_its_caption(path: Path, dataset: Dataset) -> Clip | Rejected:
    caption = path.with_suffix(dataset.caption_extension)
    try:
        sound(path)
        if not caption.is_file():
            raise DataError(f"{path}: has no caption; write it to {caption.name} beside it")
        return Clip(
            path, _captions(caption, dataset), dataset, _controls_of(path, dataset), _image_of(path, dataset),
            _mask_of(path, dataset)
        )  # fmt: skip
    except DataError as error:
        return Rejected(str(path), str(error))
    except OSError as error:
        return Rejected(
            str(path), f"{path}: its caption, control, image or mask cannot be read ({error.strerror})"
        )


def _captions(path: Path, dataset: Dataset) -> tuple[str, ...]:
    text = _text(path)
    if path.suffix.lower() != ".json":
        return _dressed([text], dataset)
    try:
        return _dressed(_caption_list(_json(text)), dataset)
    except ValueError as error:
        raise DataError(
            f"{path}: {error}; expected {{\"caption\": \"...\"}} or {{\"captions\": [\"...\", ...]}}"
        ) from None


def _caption_list(raw: Any) -> list[str]:
    """What a JSON caption file or a JSONL line says: one caption or several. A
    ValueError says what is wrong."""
    if isinstance(raw, dict):
        given = [raw[key] for key in ("caption", "captions") if key in raw]
        if len(given) != 1:
            raise ValueError(
                "it has no \"caption\"" if not given else "it has both \"caption\" and \"captions\""
            )
        raw = given[0]
    values = [raw] if isinstance(raw, str) else raw
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"its caption is {brief(raw)}, expected a text or a list of texts")
    return values


def _json(text: str) -> Any:
    """A ValueError, one line, for what JSON forbids, and for a key that is given twice,
    of which one would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {brief(key)} is given twice; keep one")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _dressed(captions: list[str], dataset: Dataset) -> tuple[str, ...]:
    whole = [dataset.prefixed(c.strip()) + dataset.caption_suffix for c in captions]
    for caption in whole:
        try:
            caption.encode()
        except UnicodeEncodeError:
            raise ValueError(f"its caption {brief(caption)} is not valid Unicode (half of a pair)") from None
    return tuple(dict.fromkeys(whole))  # the same caption twice would only be drawn more often


def _text(path: Path) -> str:
    """Without the byte order mark that some editors write."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None


def _path_key(dataset: Dataset) -> str:
    return "video_path" if dataset.is_video else "image_path"


def _from_jsonl(dataset: Dataset) -> Iterator[Clip | Rejected]:
    name, folder = _path_key(dataset), dataset.path.parent
    if not dataset.path.is_file():
        raise DataError(
            f"{dataset.path}: {dataset.source} names no file; use the directory key for a directory"
        )
    # a caption may hold other kinds of line end
    for number, line in enumerate(_text(dataset.path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{dataset.path}:{number}"
        try:
            row = _json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise DataError(f"{where}: expected {{\"{name}\": ..., \"caption\": ...}}")
        try:
            yield _of_line(row, row[name], folder, dataset)
        except DataError as error:
            yield Rejected(row[name], f"{where}: {error}")
        except ValueError as error:
            yield Rejected(row[name], f"{where}: {row[name]}: {error}")


def _of_line(row: dict[str, Any], name: str, folder: Path, dataset: Dataset) -> Clip:
    captions = _dressed(_caption_list(row), dataset)
    keys = sorted((k for k in row if re.fullmatch(r"control_path(_\d+)?", k)), key=lambda k: (len(k), k))
    images = [IMAGE_KEY] if dataset.is_video and IMAGE_KEY in row else []
    masks = [MASK_KEY] if MASK_KEY in row else []
    for key in (*keys, *images, *masks):
        if not isinstance(row[key], str):
            raise ValueError(f"its {key} is {brief(row[key])}, expected a path")
    path = place(name, folder)
    try:
        controls = tuple(place(row[key], folder) for key in keys)
    except DataError as error:
        raise DataError(f"its control {error}") from None
    try:
        image = place(row[IMAGE_KEY], folder) if images else None
    except DataError as error:
        raise DataError(f"its image {error}") from None
    try:
        return Clip(path, captions, dataset, controls, image, place(row[MASK_KEY], folder) if masks else None)
    except DataError as error:
        raise DataError(f"its mask {error}") from None


def _controls_of(path: Path, dataset: Dataset) -> tuple[Path, ...]:
    """Of a clip in a directory: the same name; for images also stem_0, stem_1, ...; for videos another
    extension or a folder of images called like the stem."""
    if dataset.control.directory is None:
        return ()
    folder = _mirrored(dataset.control.directory, path, dataset)
    legal = (*VIDEOS, *IMAGES) if dataset.is_video else IMAGES
    near = [p for p in folder.glob(f"{_literal(path.stem)}*") if p.suffix.lower() in legal or p.is_dir()]
    exact = [
        p for p in near if p.stem == path.stem or (p.is_dir() and p.name == path.stem and dataset.is_video)
    ]
    same = [p for p in exact if p.name == path.name]
    if exact:
        return ((same or sorted(exact))[0],)
    numbered = [
        p for p in near if not dataset.is_video and re.fullmatch(re.escape(path.stem) + r"_\d+", p.stem)
    ]
    if not numbered:
        raise DataError(f"{path}: has no control in {folder}; expected a file called {path.stem}.*")
    return tuple(sorted(numbered, key=lambda p: int(p.stem.rsplit("_", 1)[1])))


def _image_of(path: Path, dataset: Dataset) -> Path | None:
    """Of a clip in a directory: the image of the same name."""
    if dataset.image_directory is None:
        return None
    folder = _mirrored(dataset.image_directory, path, dataset)
    found = sorted(
        p for p in folder.glob(f"{_literal(path.stem)}.*")
        if p.suffix.lower() in IMAGES and p.stem == path.stem
    )
    if not found:
        raise DataError(
            f"{path}: has no image in {folder}; expected {path.stem}.png or another picture of that name"
        )
    return found[0]


def _mask_of(path: Path, dataset: Dataset) -> Path | None:
    """Of a clip in a directory: the picture or video of the same name, or for videos a
    folder of pictures called so."""
    if dataset.mask_directory is None:
        return None
    folder = _mirrored(dataset.mask_directory, path, dataset)
    legal = (*VIDEOS, *IMAGES) if dataset.is_video else IMAGES
    found = sorted(
        p for p in folder.glob(f"{_literal(path.stem)}*")
        if (p.stem == path.stem and p.suffix.lower() in legal)
        or (dataset.is_video and p.is_dir() and p.name == path.stem)
    )  # fmt: skip
    if not found:
        raise DataError(f"{path}: has no mask in {folder}; expected a file called {path.stem}.*")
    return found[0]


def _mirrored(folder: Path, path: Path, dataset: Dataset) -> Path:
    """Where what belongs to a clip is: below, as the clip is below its own directory."""
    return folder / path.parent.relative_to(dataset.path) if dataset.recursive else folder


def _literal(stem: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", stem)
