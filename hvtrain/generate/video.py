"""Videos as files: H.264 in MP4, with the parameters that made them inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from hvtrain.errors import DataError
from shards.atomic import atomic_path

QUALITY = {"crf": "17", "preset": "medium"}  # visually lossless
BT709 = 1  # its number as color primaries and as transfer function (ITU-T H.273)


def write_mp4(path: str | Path, frames: np.ndarray, *, fps: float, metadata: Mapping[str, Any]) -> None:
    """frames uint8 [F H W 3], sides even. The metadata is JSON in the container's comment, where players show it."""
    path = Path(path)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames of shape {frames.shape} and type {frames.dtype}: expected uint8 [F H W 3]")
    height, width = frames.shape[1:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(dict(metadata), ensure_ascii=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=QUALITY)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Said in the file, because players guess by height: BT.601 below 720 lines, BT.709 from there.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The parameters that a video was made with."""
    try:
        with av.open(str(path)) as container:
            text = container.metadata.get("comment", "")
        values = json.loads(text)
    except (OSError, av.FFmpegError, ValueError) as error:
        raise DataError(f"{path}: holds no generation parameters: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds no generation parameters, its comment is {text!r}")
    return values
