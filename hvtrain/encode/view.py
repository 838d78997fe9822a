"""A stored picture as people see it: turned or mirrored, its pixels squeezed, as its file
says; then fitted to a size."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from hvtrain.errors import DataError

Turn = Image.Transpose
SQUEEZE = 10  # pixels that are longer than this in one direction: a damaged file, not a picture

# The signs of (a, b, c, d) in x' = a x + c y, y' = b x + d y, y pointing down. The
# turns count against the clock.
TURNS: dict[tuple[int, int, int, int], Turn | None] = {
    (1, 0, 0, 1): None, (0, -1, 1, 0): Turn.ROTATE_90, (-1, 0, 0, -1): Turn.ROTATE_180,
    (0, 1, -1, 0): Turn.ROTATE_270, (-1, 0, 0, 1): Turn.FLIP_LEFT_RIGHT, (1, 0, 0, -1): Turn.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Turn.TRANSPOSE, (0, -1, -1, 0): Turn.TRANSVERSE,
}
EXIF_ORIENTATION = 0x0112
EXIF: dict[int, Turn] = {
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}
SIDEWAYS = (Turn.ROTATE_90, Turn.ROTATE_270, Turn.TRANSPOSE, Turn.TRANSVERSE)


@dataclass(frozen=True)
class View:
    """What to do with stored pixels before anyone looks at them."""

    turn: Turn | None = None
    aspect: Fraction = Fraction(1)  # width of a stored pixel by its height, before the turn

    def __str__(self) -> str:
        """Nothing for nearly every file."""
        turned = self.turn.name.lower().replace("_", " ") if self.turn is not None else ""
        return ", ".join(filter(None, [turned, f"pixels {self.aspect}" if self.aspect != 1 else ""]))

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) as shown, of a picture stored at this size."""
        wide = max(1, round(width * self.aspect))
        return (height, wide) if self.turn in SIDEWAYS else (wide, height)

    def fitted(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """uint8 [H W 3] of this (width, height): as shown, scaled to cover it, cropped in the middle."""
        shape = self.shape(*image.size)
        return fit(image if self.turn is None else image.transpose(self.turn), size, shape=shape)


def view_of_image(image: Image.Image) -> View:
    return View(EXIF.get(image.getexif().get(EXIF_ORIENTATION, 1)))


def view_of_frame(frame: Any, aspect: Fraction | None) -> View:
    """Of a decoded frame; `aspect`: what its stream says, None or 0 if nothing. A
    DataError if it cannot be shown so."""
    aspect = aspect or Fraction(1)
    if not Fraction(1, SQUEEZE) <= aspect <= SQUEEZE:
        raise DataError(
            f"its pixels are {aspect} times as wide as high, expected at most {SQUEEZE} or 1/{SQUEEZE}"
        )
    raw = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if raw is None:
        return View(None, aspect)
    a, b, _, c, d, *_ = struct.unpack("=9i", raw)
    most = max(map(abs, (a, b, c, d)))
    signs = tuple((v > 0) - (v < 0) if abs(v) > most / 100 else 0 for v in (a, b, c, d))
    if signs not in TURNS:
        raise DataError(
            f"its display matrix ({a}, {b}, {c}, {d}) is not of quarter turns: re-encode it the right way up"
        )
    return View(TURNS[signs], aspect)


def fit(image: Image.Image, size: tuple[int, int], *, shape: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H W 3]: scaled to cover `size` (width, height), then centre-cropped.

    `shape`: the size as shown, if pixels are not square. Area averaging shrinks, Lanczos does the rest."""
    width, height = size
    shown = shape or image.size
    image = image.convert("RGB")
    scale = max(width / shown[0], height / shown[1])
    target = max(width, int(shown[0] * scale + 0.5)), max(height, int(shown[1] * scale + 0.5))
    if target != image.size:
        shrinks = target[0] <= image.width and target[1] <= image.height
        image = image.resize(target, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
