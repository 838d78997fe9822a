"""Dataset entries of other tools as a dataset file of ours (encode/dataset.py reads it)."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvtrain.elsewhere.table import Draft
from hvtrain.errors import ConfigError


def entries(made: Draft, *, unit: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """One directory of theirs is one entry for each size, and for its videos and its pictures: here an entry
    holds one kind. `unit`: of which height and width are multiples."""
    own = dict(made.values)
    where = str(own.pop("path", "") or "")
    if not where:
        raise ConfigError("dataset: an entry names no folder")
    lengths = _numbers(own.pop("target_frames", None))
    if "caption_extension" in own:
        own["caption_extension"] = f".{str(own['caption_extension']).lstrip('.')}"
    if "caption_prefix" in own and made.notes["caption_prefix"].startswith("trigger_word"):
        own["caption_prefix"] = f"{own['caption_prefix']}, "
    buckets = own.pop("size_buckets", None) or []
    if not all(isinstance(b, list) and len(b) == 3 and all(isinstance(n, int) for n in b) for b in buckets):
        raise ConfigError(f"dataset: size_buckets {buckets}: expected [width, height, frames] of each")
    sized = [((w, h), [f]) for w, h, f in buckets]
    for size, frames in sized or [(size, lengths) for size in _sizes(own.pop("resolutions", None))]:
        for kind in _kinds(where, frames):
            sides = [max(u, round(n / u) * u) for n, u in zip(size, unit[::-1])]
            entry = {f"{kind}_directory": where, "resolution": sides, **own}
            if kind == "video":
                entry |= {"target_frames": [n for n in frames if n > 1] or [1], "frame_extraction": "head"}
            yield entry


def _kinds(where: str, frames: list[int]) -> list[str]:
    """What is in the folder; where it is not on this machine, what the lengths speak of."""
    folder = Path(where)
    wanted = ["video"] if any(n > 1 for n in frames) else ["image"]
    if not folder.is_dir():
        return wanted
    found = {str(mimetypes.guess_type(path.name)[0]).partition("/")[0] for path in folder.iterdir()}
    return (
        [
            kind for kind in ("video", "image")
            if kind in found and (kind == "image" or any(n > 1 for n in frames))
        ] or wanted
    )


def _numbers(given: Any) -> list[int]:
    return [n for n in (given if isinstance(given, list) else [given]) if isinstance(n, int)] or [1]


def _sizes(given: Any) -> list[tuple[int, int]]:
    """A side of a square, [width, height], or several of either."""
    if given is None:
        return [(512, 512)]
    several = [n if isinstance(n, list) else [n, n] for n in (given if isinstance(given, list) else [given])]
    if not all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in several):
        raise ConfigError(f"dataset: resolution {given}: expected the side of a square or [width, height]")
    return [(width, height) for width, height in several]


