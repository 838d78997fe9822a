"""Pixels out of files: PyAV for videos, PIL for images; resized to cover a bucket and cropped in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from hvtrain.errors import DataError

VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")


@dataclass(frozen=True)
class Probe:
    width: int
    height: int
    frames: int
    fps: float


def probe(path: Path) -> Probe:
    """Size, frames and rate, by counting packets: no frame is decoded. A folder of images is a video too."""
    if path.is_dir():
        files = _stills(path)
        width, height = _open_image(files[0]).size
        return Probe(width, height, len(files), 0.0)
    if path.suffix.lower() in IMAGES:
        width, height = _open_image(path).size
        return Probe(width, height, 1, 0.0)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream; remove it from the dataset or replace it")
            stream = container.streams.video[0]
            count = sum(1 for packet in container.demux(stream) if packet.size)
            return Probe(stream.width, stream.height, count, float(stream.average_rate or 0))
    except (av.FFmpegError, OSError) as error:
        raise _undecodable(path, error) from None


def read_windows(path: Path, windows: Sequence[Sequence[int]], *, size: tuple[int, int]) -> list[np.ndarray]:
    """uint8 [F H W 3] each: several windows of one file, which is decoded once."""
    wanted = sorted({i for window in windows for i in window})
    frames = read_frames(path, wanted, size=size)
    at = {index: row for row, index in enumerate(wanted)}
    return [frames[[at[i] for i in window]] for window in windows]


def read_frames(path: Path, indices: Sequence[int], *, size: tuple[int, int]) -> np.ndarray:
    """uint8 [F H W 3]: the frames at these ascending indices, as they will be seen. size is (width, height)."""
    if path.is_dir():
        files = _stills(path)
        return np.stack([fit(_open_image(files[i]), size) for i in indices])
    if path.suffix.lower() in IMAGES:
        return fit(_open_image(path), size)[None]
    wanted, found = set(indices), []
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    found.append(fit(frame.to_image(), size))
                if i >= indices[-1]:
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise _undecodable(path, error) from None
    if len(found) != len(indices):
        raise DataError(
            f"{path}: only {len(found)} of the {len(indices)} frames up to number {indices[-1]} can be decoded; "
            "the file is cut off or damaged: replace it or remove it from the dataset"
        )
    return np.stack(found)


def fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H W 3]: scaled to cover `size`, then centre-cropped. Lanczos enlarges, area averaging shrinks."""
    width, height = size
    image = image.convert("RGB")
    scale = max(width / image.width, height / image.height)
    if scale != 1:
        target = max(width, int(image.width * scale + 0.5)), max(height, int(image.height * scale + 0.5))
        how = Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BOX
        image = image.resize(target, how)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _stills(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    if not files:
        raise DataError(f"{folder}: a folder given as a video holds no images")
    return files


def _open_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
        return image
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise _undecodable(path, error) from None


def _undecodable(path: Path, error: Exception) -> DataError:
    if not path.exists():
        return DataError(f"{path}: no such file, but the dataset lists it")
    reason = str(error).splitlines()[0]
    return DataError(f"{path}: cannot be decoded ({reason}); replace it or remove it from the dataset")
