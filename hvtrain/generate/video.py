"""Videos and pictures as files: H.264 in MP4, PNG, with the parameters that made them inside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hvtrain.errors import DataError
from shards.atomic import atomic_path

# Visually lossless. Of the same frames the same video, on every machine: x264's macroblock tree reads memory
# that nobody wrote, and what it makes of frames depends on the number of threads, by default the machine's.
QUALITY = {"crf": "17", "preset": "medium", "threads": "8", "x264-params": "mbtree=0"}
_COMMENT = "comment"
BT709 = 1  # its number as color primaries and as transfer function (ITU-T H.273)


def write_mp4(path: str | Path, frames: np.ndarray, *, fps: float, metadata: Mapping[str, Any]) -> None:
    """frames uint8 [F H W 3], sides even. The metadata is JSON in the container's
    comment, where players show it.

    Raises DataError where the file cannot be written; one of that name stays as it was.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames of shape {frames.shape} and type {frames.dtype}: expected uint8 [F H W 3]")
    height, width = frames.shape[1:3]
    with _placed(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.metadata[_COMMENT] = json.dumps(dict(metadata), ensure_ascii=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=QUALITY)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Said in the file, because players guess by height: BT.601 below 720 lines, BT.709 from there.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_png(path: str | Path, image: np.ndarray, *, metadata: Mapping[str, Any]) -> None:
    """image uint8 [H W 3]. The metadata is JSON in the text chunk "comment". Raises
    DataError as write_mp4 does."""
    text = PngInfo()
    text.add_itxt(_COMMENT, json.dumps(dict(metadata), ensure_ascii=False))
    with _placed(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="png", pnginfo=text)


def write_video(path: Path, frames: np.ndarray, *, fps: float, metadata: Mapping[str, Any]) -> None:
    """A picture where the name ends so, else a video."""
    if path.suffix == ".png":
        write_png(path, frames[0], metadata=metadata)
    else:
        write_mp4(path, frames, fps=fps, metadata=metadata)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The parameters that a video or picture was made with."""
    text = ""
    try:
        if Path(path).suffix == ".png":
            with Image.open(path) as image:
                text = getattr(image, "text", {}).get(_COMMENT, "")
        else:
            with av.open(str(path)) as container:
                text = container.metadata.get(_COMMENT, "")
        values = json.loads(text)
    except (OSError, SyntaxError, av.FFmpegError, ValueError) as error:
        raise DataError(f"{path}: holds no generation parameters: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds no generation parameters, its comment is {text!r}")
    return values


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """atomic_path in a folder that is made; what the disk refuses is one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            yield temporary
    except (OSError, av.FFmpegError) as error:
        raise DataError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})") from None
