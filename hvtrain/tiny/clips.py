"""Synthetic captioned clips: colour x shape x motion on a background, drawn by code.

Small enough to learn on a CPU, rich enough that a prompt can be checked by looking at pixels (score.py).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 60, 60),
    "green": (60, 175, 75),
    "blue": (60, 85, 210),
    "yellow": (225, 210, 70),
    "magenta": (200, 70, 190),
    "cyan": (60, 195, 205),
}
SHAPES = ("circle", "square", "triangle")
SOFTNESS = 4.0  # width of an edge in pixels: what a small VAE can follow
# x, y
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (130, 130, 130), "dark": (55, 55, 60), "light": (200, 200, 196)
}

N_HELD_OUT = 24  # of the 72 colour x shape x motion combinations
CONCEPT = "zorb"  # the word of the demo's concept: an orange ring, which no other caption describes
CONCEPT_RGB = (235, 130, 40)


@dataclass(frozen=True)
class Drawing:
    """One clip: a caption's facts plus the seed of what the caption leaves open
    (start, size, shade, speed)."""

    color: str
    shape: str
    motion: str
    background: str
    seed: int = 0
    # what the caption calls it; "": colour and shape. Not part of the drawing
    word: str = field(default="", repr=False)
    # by the word, beside the colour: motion or background; "": neither
    told: str = field(default="", repr=False)

    @property
    def caption(self) -> str:
        name = self.word or (CONCEPT if self.shape == CONCEPT else f"{self.color} {self.shape}")
        moves = "" if self.told == "motion" else f" moves {self.motion}"
        return f"a {name}{moves}" + (
            "" if self.told == "background" else f" on a {self.background} background"
        )


def combinations() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """(training, held-out) lists of (colour, shape, motion); every colour, shape and motion is in both."""
    every = list(itertools.product(COLORS, SHAPES, MOTIONS))
    # A Latin-square pattern holds out each shape-motion pair for two of the six colours.
    names = list(COLORS), list(SHAPES), list(MOTIONS)
    held = [
        c for c in every
        if (names[0].index(c[0]) + names[1].index(c[1]) + 2 * names[2].index(c[2])) % 3 == 0
    ]
    return [c for c in every if c not in held], held


def training_clips(n: int, *, seed: int) -> list[Drawing]:
    """`n` clips that cover the training combinations and backgrounds evenly."""
    train, _ = combinations()
    pool = [(*c, b) for c in train for b in BACKGROUNDS]
    rng = random.Random(seed)
    rng.shuffle(pool)
    return [Drawing(*pool[i % len(pool)], seed=seed * 1_000_003 + i) for i in range(n)]


def concept_clips(n: int, *, seed: int) -> list[Drawing]:
    """`n` clips of the demo's concept over all motions and backgrounds."""
    pool = list(itertools.product(MOTIONS, BACKGROUNDS))
    return [Drawing("orange", CONCEPT, *pool[i % len(pool)], seed=seed * 1_000_003 + i) for i in range(n)]


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance (pixels, negative inside) to a shape of radius `r` centred at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if shape == "triangle":  # pointing up
        side = 0.866 * np.abs(x) - 0.5 * y - 0.55 * r
        return np.maximum(side, y - 0.75 * r)
    if shape == CONCEPT:
        return np.abs(np.hypot(x, y) - 0.85 * r) - 0.3 * r
    raise ValueError(f"no such shape: {shape}")


def render(clip: Drawing, *, frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    """Draw a clip: uint8 [frames, height, width, 3], soft-edged; the object never leaves the picture."""
    # The name that the record had when the shipped models were trained: it is part of every picture.
    rng = random.Random(repr(clip).replace(type(clip).__name__, "Clip", 1))
    unit = min(height, width)
    r = unit * rng.uniform(0.17, 0.23)
    travel = unit * rng.uniform(0.15, 0.20)
    dx, dy = MOTIONS[clip.motion]
    room_x, room_y = width / 2 - 1.2 * r - 1, height / 2 - 1.2 * r - 1
    # Centre of the path: anywhere such that the whole path stays inside.
    mid_x = width / 2 + rng.uniform(-1, 1) * max(0.0, room_x - abs(dx) * travel / 2)
    mid_y = height / 2 + rng.uniform(-1, 1) * max(0.0, room_y - abs(dy) * travel / 2)
    rgb = CONCEPT_RGB if clip.color == "orange" else COLORS[clip.color]
    color = np.clip(np.array(rgb, np.float32) + rng.uniform(-10, 10), 0, 255)
    shade = np.clip(np.array(BACKGROUNDS[clip.background], np.float32) + rng.uniform(-12, 12), 0, 255)
    slope = rng.uniform(-14, 14)

    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    canvas = shade + (slope * (ys / height - 0.5))[..., None]  # a faint vertical gradient
    video = np.empty((frames, height, width, 3), np.uint8)
    for f in range(frames):
        along = (f / max(1, frames - 1) - 0.5) * travel
        away = _distance(clip.shape, xs - mid_x - dx * along, ys - mid_y - dy * along, r)
        cover = np.clip(0.5 - away / SOFTNESS, 0, 1)
        video[f] = np.clip(canvas + (color - canvas) * cover[..., None], 0, 255).round()
    return video
