"""The clips of a dataset with their captions and controls. What cannot be used is a Rejected, never dropped in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.encode.dataset import Dataset
from hvtrain.encode.media import IMAGES, VIDEOS
from hvtrain.errors import DataError


@dataclass(frozen=True)
class Clip:
    """A source file, its captions (one is drawn per epoch) and what controls it."""

    path: Path
    captions: tuple[str, ...]
    dataset: Dataset = field(repr=False)
    controls: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A clip that gives no samples, or a sample that cannot be made."""

    path: str
    reason: str
    digest: str = ""  # of the sample; "": found while planning, looked at anew by each run

    def row(self) -> str:
        return json.dumps({k: v for k, v in vars(self).items() if v}, ensure_ascii=False)


def find_clips(dataset: Dataset) -> list[Clip | Rejected]:
    """In a fixed order. A DataError if there is nothing at all, or the listing itself is broken."""
    found = list(_from_jsonl(dataset) if "jsonl" in dataset.source else _from_folder(dataset))
    if not found:
        kind = "videos" if dataset.is_video else "images"
        raise DataError(f"{dataset.path}: no {kind} here; check {dataset.source} (recursive = true looks into sub-folders)")
    return found


def _from_folder(dataset: Dataset) -> Iterator[Clip | Rejected]:
    legal = VIDEOS if dataset.is_video else IMAGES
    pattern = "**/*" if dataset.recursive else "*"
    if not dataset.path.is_dir():
        raise DataError(f"{dataset.path}: {dataset.source} names a file; give the directory, or use the JSONL key")
    for path in sorted(p for p in dataset.path.glob(pattern) if p.is_file() and p.suffix.lower() in legal):
        caption = path.with_suffix(dataset.caption_extension)
        try:
            if not caption.is_file():
                raise DataError(f"{path}: has no caption; write it to {caption.name} beside it")
            yield Clip(path, _captions(caption, dataset), dataset, _controls_of(path, dataset))
        except DataError as error:
            yield Rejected(str(path), str(error))


def _captions(path: Path, dataset: Dataset) -> tuple[str, ...]:
    text = _text(path)
    if path.suffix.lower() != ".json":
        return _dressed([text], dataset)
    try:
        return _dressed(_caption_list(json.loads(text)), dataset)
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected {{\"caption\": \"...\"}} or {{\"captions\": [\"...\", ...]}}") from None


def _caption_list(raw: Any) -> list[str]:
    """What a JSON caption file or a JSONL line says: one caption or several."""
    if isinstance(raw, dict):
        given = [raw[key] for key in ("caption", "captions") if key in raw]
        if len(given) != 1:
            raise ValueError("no \"caption\"" if not given else "both \"caption\" and \"captions\"")
        raw = given[0]
    values = [raw] if isinstance(raw, str) else raw
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise ValueError("a caption is a text, or a list of texts")
    return values


def _dressed(captions: list[str], dataset: Dataset) -> tuple[str, ...]:
    whole = [dataset.caption_prefix + c.strip() + dataset.caption_suffix for c in captions]
    return tuple(dict.fromkeys(whole))  # the same caption twice would only be drawn more often


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the caption cannot be read ({error}); save it as UTF-8 text") from None


def _from_jsonl(dataset: Dataset) -> Iterator[Clip | Rejected]:
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
        try:
            captions = _dressed(_caption_list(row), dataset)
        except ValueError as error:
            yield Rejected(row[name], f"{where}: {row[name]} has {error}; add \"caption\"")
            continue
        path = _place(row[name], dataset)
        if not path.exists():
            yield Rejected(row[name], f"{where}: {row[name]} does not exist")
            continue
        keys = sorted((k for k in row if re.fullmatch(r"control_path(_\d+)?", k)), key=lambda k: (len(k), k))
        controls = tuple(_place(str(row[k]), dataset) for k in keys)
        if missing := [p for p in controls if not p.exists()]:
            yield Rejected(row[name], f"{where}: its control {missing[0]} does not exist")
            continue
        yield Clip(path, captions, dataset, controls)


def _place(name: str, dataset: Dataset) -> Path:
    path = Path(name)
    return path if path.is_absolute() or path.exists() else dataset.path.parent / path


def _controls_of(path: Path, dataset: Dataset) -> tuple[Path, ...]:
    """Of a clip in a directory: the same name; for images also stem_0, stem_1, ...; for videos another extension or a
    folder of images called like the stem."""
    folder = dataset.control.directory
    if folder is None:
        return ()
    if dataset.recursive:
        folder = folder / path.parent.relative_to(dataset.path)
    legal = (*VIDEOS, *IMAGES) if dataset.is_video else IMAGES
    near = [p for p in folder.glob(f"{_literal(path.stem)}*") if p.suffix.lower() in legal or p.is_dir()]
    exact = [p for p in near if p.stem == path.stem or (p.is_dir() and p.name == path.stem and dataset.is_video)]
    same = [p for p in exact if p.name == path.name]
    if exact:
        return ((same or sorted(exact))[0],)
    numbered = [p for p in near if not dataset.is_video and re.fullmatch(re.escape(path.stem) + r"_\d+", p.stem)]
    if not numbered:
        raise DataError(f"{path}: has no control in {folder}; expected a file called {path.stem}.*")
    return tuple(sorted(numbered, key=lambda p: int(p.stem.rsplit("_", 1)[1])))


def _literal(stem: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", stem)
