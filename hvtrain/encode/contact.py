"""`hvtrain data preview`: one HTML file with the clips as they will be cropped, and their captions."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from hvtrain.encode.media import read_frames
from hvtrain.encode.places import shown
from hvtrain.encode.samples import Picture, PlannedSample
from hvtrain.errors import DataError
from shards.atomic import write_text

HEIGHT = 160  # pixels of a thumbnail
FRAMES = 3  # first, middle, last
LETTERS = 1000  # of a caption; the encoder reads little more

_PAGE = """<!doctype html><meta charset="utf-8"><title>Dataset preview</title>
<style>body{{font:15px/1.4 system-ui,sans-serif;margin:2rem;max-width:72rem}}figure{{margin:0 0 2rem}}
img{{height:{height}px;margin-right:4px}}figcaption{{max-width:60rem}}small{{color:#666}}
.bad{{color:#b00}}</style>
<h1>{n} of {total} samples</h1>
<p>First, middle and last frame of each, as they go to the encoder.</p>
{rows}
"""


def write(samples: Sequence[PlannedSample], output: str | Path, *, n: int, workers: int) -> int:
    """Write the page; returns how many samples it shows. They are spread evenly over the dataset."""
    if not samples:
        raise DataError("no sample can be made of this dataset; `hvtrain data check` says why")
    chosen = [
        samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, min(n, len(samples)), dtype=int))
    ]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = list(pool.map(_row, chosen))
    try:
        write_text(
            Path(output), _PAGE.format(height=HEIGHT, n=len(rows), total=len(samples), rows="\n".join(rows))
        )
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror})") from None
    return len(rows)


def _row(s: PlannedSample) -> str:
    what = f"{shown(s.clip.path.name)}, frames {s.clip.frames[0]} to {s.clip.frames[-1]}, {s.bucket}"
    captions = "<br>".join(_caption(c) for c in s.captions)
    pictures = _pictures(s.clip) + "".join(f"<br>control: {_pictures(c)}" for c in s.controls)
    captions += f"<br><small>{html.escape(what)}</small>"
    return f"<figure>{pictures}<figcaption>{captions}</figcaption></figure>"


def _caption(text: str) -> str:
    if not text:
        return "<i>empty caption</i>"
    cut = f" <i>… {len(text)} letters</i>" if len(text) > LETTERS else ""
    return html.escape(text[:LETTERS]) + cut


def _pictures(picture: Picture) -> str:
    some = sorted({picture.frames[int(i)] for i in np.linspace(0, len(picture.frames) - 1, FRAMES)})
    try:
        frames = read_frames(picture.path, some, size=picture.size)
    except DataError as error:
        return f'<p class="bad">{html.escape(str(error))}</p>'
    return "".join(f'<img src="data:image/jpeg;base64,{_jpeg(f)}" alt="">' for f in frames)


def _jpeg(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((4 * HEIGHT, HEIGHT))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()
