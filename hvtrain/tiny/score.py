"""Look at the pixels of a clip and tell what it shows: the colour, the direction, the
background, the demo's concept."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvtrain.tiny.clips import BACKGROUNDS, COLORS, CONCEPT_RGB, MOTIONS, Drawing, render

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "tiny"  # of a checkout
MIN_AREA = 0.01  # of the picture: less is no object
MIN_TRAVEL = 0.06  # of the picture's side, over the clip: less is no motion


@dataclass(frozen=True)
class Seen:
    """What one clip shows. None: nothing of the kind could be made out."""

    color: str | None
    motion: str | None
    hollow: bool  # the object has a hole in the middle
    background: str  # the nearest

    @property
    def is_concept(self) -> bool:
        return self.color == "orange" and self.hollow


def read_video(path: Path) -> np.ndarray:
    """uint8 [F H W 3]"""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def draw_first(wanted: Sequence[Drawing], folder: Path) -> list[Path]:
    """The first frame of each clip, as a picture in `folder`."""
    from PIL import Image

    paths = [folder / f"first_{i:02d}.png" for i in range(len(wanted))]
    for clip, path in zip(wanted, paths):
        Image.fromarray(render(clip)[0]).save(path)
    return paths


def kept(video: Path, picture: Path) -> float:
    """PSNR in dB of a video's first frame against the picture that was given."""
    from PIL import Image

    given = np.asarray(Image.open(picture).convert("RGB"), np.float32)
    error = float(np.square(read_video(video)[0] - given).mean())
    return 10 * math.log10(255**2 / max(error, 1e-3))


def _hue(rgb: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*(rgb / 255.0))[0]


HUES = {name: _hue(np.array(rgb, float)) for name, rgb in {**COLORS, "orange": CONCEPT_RGB}.items()}


def _shade(picture: np.ndarray) -> np.ndarray:
    """[3]"""
    return np.median(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]), axis=0)


def _background(frame: np.ndarray) -> str:
    shade = _shade(frame.astype(np.float32))
    return min(BACKGROUNDS, key=lambda name: float(np.abs(shade - BACKGROUNDS[name]).sum()))


def _mask(frame: np.ndarray) -> np.ndarray:
    """Pixels that differ from the background, which is the median of the border's. bool [H W]"""
    picture = frame.astype(np.float32)
    far = np.abs(picture - _shade(picture)).max(-1)
    return far > max(45.0, 0.5 * float(np.percentile(far, 99)))


def _color(frame: np.ndarray, mask: np.ndarray) -> str | None:
    pixels = frame[mask].astype(np.float32)
    saturation = pixels.max(-1) - pixels.min(-1)
    if not len(pixels) or np.median(saturation) < 40:
        return None  # gray is none of the colours
    hue = _hue(np.median(pixels[saturation >= np.median(saturation)], axis=0))
    away = {name: min(abs(hue - h), 1 - abs(hue - h)) for name, h in HUES.items()}
    return min(away, key=lambda name: away[name])


def look(video: np.ndarray) -> Seen:
    """Describe a clip, uint8 [F H W 3]."""
    frames, height, width, _ = video.shape
    masks = [_mask(frame) for frame in video]
    centres = {f: np.argwhere(m).mean(0) for f, m in enumerate(masks) if m.mean() >= MIN_AREA}  # (y, x)
    if not centres:
        return Seen(None, None, False, _background(video[frames // 2]))
    middle = min(centres, key=lambda f: abs(f - frames // 2))
    return Seen(
        color=_color(video[middle], masks[middle]),
        motion=_motion(centres, frames, min(height, width)),
        hollow=sum(_hollow(masks[f], centres[f]) for f in centres) * 2 > len(centres),
        background=_background(video[middle]),
    )


def _motion(centres: dict[int, np.ndarray], frames: int, side: int) -> str | None:
    first, last = min(centres), max(centres)
    if last - first < frames // 2:
        return None
    dy, dx = centres[last] - centres[first]
    if max(abs(dx), abs(dy)) < MIN_TRAVEL * side:
        return None
    step = (int(np.sign(dx)), 0) if abs(dx) >= abs(dy) else (0, int(np.sign(dy)))
    return next(name for name, way in MOTIONS.items() if way == step)


def _hollow(mask: np.ndarray, centre: np.ndarray) -> bool:
    """The object's middle is background, and the object lies on both sides of it."""
    y, x = (round(float(c)) for c in centre)
    patch = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
    around = mask[y, :x].any() and mask[y, x + 1 :].any() and mask[:y, x].any() and mask[y + 1 :, x].any()
    return bool(patch.mean() < 0.5 and around)
