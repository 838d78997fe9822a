"""Which frames of a clip become samples. Pure index arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

EXTRACTIONS: dict[str, Callable[[int, int, FrameRule], list[int]]] = {}


@dataclass(frozen=True)
class FrameRule:
    """A video dataset's frame settings."""

    target_frames: tuple[int, ...] = (1,)
    extraction: str = "head"
    stride: int = 1
    sample: int = 1
    max_frames: int = 129

    def windows(self, n: int) -> list[tuple[int, int]]:
        """(start, length) of each sample of a clip of n frames."""
        if self.extraction == "full":
            length = _whole(min(n, self.max_frames))
            return [(0, length)] if length >= 1 else []
        starts = EXTRACTIONS[self.extraction]
        return [(start, t) for t in normalised(self.target_frames) if n >= t for start in starts(n, t, self)]


def normalised(targets: tuple[int, ...]) -> list[int]:
    """Sorted, without repetitions, each cut to 4n + 1."""
    return sorted({_whole(t) for t in targets})


def kept_frames(n: int, *, source_fps: float | None, target_fps: float) -> list[int]:
    """Indices of the frames that remain when a clip is brought to the model's rate by dropping; none are doubled.

    Frame i is at time i / source; it stays if it begins a new frame of the target, floor(i * target / source).
    """
    if source_fps is None or source_fps <= target_fps:
        return list(range(n))
    ratio = Fraction(target_fps).limit_denominator(100_000) / Fraction(source_fps).limit_denominator(100_000)
    return [i for i in range(n) if i == 0 or int(i * ratio) > int((i - 1) * ratio)]


def _whole(frames: int) -> int:
    return (frames - 1) // 4 * 4 + 1


def _extraction(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        EXTRACTIONS[name] = function
        return function

    return register


@_extraction("head")
def _head(n: int, t: int, rule: FrameRule) -> list[int]:
    return [0]


@_extraction("chunk")
def _chunk(n: int, t: int, rule: FrameRule) -> list[int]:
    """Side by side."""
    return list(range(0, n - t + 1, t))


@_extraction("slide")
def _slide(n: int, t: int, rule: FrameRule) -> list[int]:
    """Every `frame_stride` frames."""
    return list(range(0, n - t + 1, rule.stride))


@_extraction("uniform")
def _uniform(n: int, t: int, rule: FrameRule) -> list[int]:
    """`frame_sample` of them, evenly spread; one is the head."""
    if rule.sample == 1:
        return [0]
    return [int(i) for i in np.linspace(0, n - t, rule.sample, dtype=int)]


LEGAL = (*EXTRACTIONS, "full")
