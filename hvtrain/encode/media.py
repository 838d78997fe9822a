"""Pixels out of files: PyAV for videos, PIL for images, as people see them
(view.py), fitted to a bucket's size."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from hvtrain.encode.frames import is_constant
from hvtrain.encode.view import View, view_of_frame, view_of_image
from hvtrain.errors import DataError

VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
KINDS = {
    stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
}


@dataclass(frozen=True)
class Probe:
    """What a file shows."""

    width: int  # as shown: turned, its pixels squeezed
    height: int
    frames: int
    fps: float
    view: str = ""  # how that differs from what is stored; nothing for nearly every file
    times: tuple[float, ...] = ()  # seconds at which each frame begins, if its rate varies


def check_kind(path: Path) -> None:
    """A DataError for what is neither a file nor a directory: to open a pipe would wait for ever."""
    mode = path.stat().st_mode
    for is_kind, name in KINDS.items():
        if is_kind(mode):
            raise DataError(f"{path}: is {name}, expected a file; remove it from the dataset")


def probe(path: Path) -> Probe:
    """Size, frames and rate, by counting packets: only the first frame is decoded. A
    folder of images is a video too."""
    check_kind(path)
    if path.is_dir() or path.suffix.lower() in IMAGES:
        files = _stills(path) if path.is_dir() else [path]
        image, view = _open_image(files[0])
        return Probe(*view.shape(*image.size), len(files), 0.0, str(view))
    with _decoding(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path}: has no video stream; remove it from the dataset or replace it")
        stream = container.streams.video[0]
        first, begins = None, []
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:  # what an edit list cuts away is never shown
                begins.append(None if packet.pts is None else float(packet.pts * packet.time_base))
        if first is None:
            raise ValueError("no frame in it")
        view = view_of_frame(first, stream.sample_aspect_ratio)
        times = tuple(sorted(t for t in begins if t is not None))
        varies = len(times) == len(begins) and not is_constant(times)
        fps = float(stream.average_rate or 0)
        return Probe(
            *view.shape(first.width, first.height), len(begins), fps, str(view), times if varies else ()
        )


def read_windows(path: Path, windows: Sequence[Sequence[int]], *, size: tuple[int, int]) -> list[np.ndarray]:
    """uint8 [F H W 3] each: several windows of one file, which is decoded once. An index may repeat."""
    wanted = sorted({i for window in windows for i in window})
    frames = read_frames(path, wanted, size=size)
    at = {index: row for row, index in enumerate(wanted)}
    return [frames[[at[i] for i in window]] for window in windows]


def read_frames(path: Path, indices: Sequence[int], *, size: tuple[int, int]) -> np.ndarray:
    """uint8 [F H W 3]: the frames at these ascending indices, as they will be
    seen. size is (width, height)."""
    if path.is_dir():
        files = _stills(path)
        return np.stack([_still(files[i], size) for i in indices])
    if path.suffix.lower() in IMAGES:
        return _still(path, size)[None]
    wanted, found = set(indices), []
    with _decoding(path), av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                found.append(view_of_frame(frame, stream.sample_aspect_ratio).fitted(frame.to_image(), size))
            if i >= indices[-1]:
                break
    if len(found) != len(indices):
        raise DataError(
            f"{path}: only {len(found)} of the {len(indices)} frames up to number {indices[-1]} can be "
            "decoded; the file is cut off or damaged: replace it or remove it from the dataset"
        )
    return np.stack(found)


def _still(path: Path, size: tuple[int, int]) -> np.ndarray:
    image, view = _open_image(path)
    with _decoding(path):
        return view.fitted(image, size)


def _stills(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    if not files:
        raise DataError(f"{folder}: a folder given as a video holds no images")
    return files


def _open_image(path: Path) -> tuple[Image.Image, View]:
    with _decoding(path):
        try:
            image = Image.open(path)
        except Image.DecompressionBombError:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
            raise DataError(
                f"{path}: has more than the {most:.0f} million pixels that are decoded; scale it down"
            ) from None
        image.load()
        return image, view_of_image(image)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Whatever a decoder makes of a file is that file's fault: one is listed, and the others are used."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except Exception as error:  # PIL and FFmpeg raise nearly every kind, MemoryError among them
        raise _undecodable(path, error) from None


def _undecodable(path: Path, error: Exception) -> DataError:
    if not path.exists():
        return DataError(f"{path}: no such file, but the dataset lists it")
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{path}: cannot be decoded ({reason}); replace it or remove it from the dataset")
