"""Which frames of a clip become samples. Pure index arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from hvtrain.errors import DataError
from hvtrain.registry import Registry

EXTRACTIONS: Registry[Callable[[int, int, FrameRule], list[int]]] = Registry("extraction")


@dataclass(frozen=True)
class FrameRule:
    """A video dataset's frame settings."""

    per_latent: int  # frames of each latent frame but the first, which spans one
    target_frames: tuple[int, ...] = (1,)
    extraction: str = "head"
    stride: int = 1
    sample: int = 1
    max_frames: int = 1

    @property
    def targets(self) -> list[int]:
        """Sorted, without repetitions, each cut to whole latent frames."""
        return sorted({self._whole(t) for t in self.target_frames})

    def windows(self, n: int) -> list[tuple[int, int]]:
        """(start, length) of each sample of a clip of n frames."""
        if self.extraction == "full":
            length = self._whole(min(n, self.max_frames))
            return [(0, length)] if length >= 1 else []
        starts = EXTRACTIONS[self.extraction]
        return [(start, t) for t in self.targets if n >= t for start in starts(n, t, self)]

    def _whole(self, frames: int) -> int:
        return (frames - 1) // self.per_latent * self.per_latent + 1


def kept_frames(n: int, *, source_fps: float | None, target_fps: float) -> list[int]:
    """Indices of the frames that remain when a clip is brought to the model's rate
    by dropping; none are doubled.

    Frame i is at time i / source; it stays if it begins a new frame of the
    target, floor(i * target / source).
    """
    if source_fps is None or source_fps <= target_fps:
        return list(range(n))
    ratio = Fraction(target_fps).limit_denominator(100_000) / Fraction(source_fps).limit_denominator(100_000)
    return [i for i in range(n) if i == 0 or int(i * ratio) > int((i - 1) * ratio)]


SLIDES = 100  # frames shown per frame stored, on average: more is a damaged clock, or no video


def is_constant(times: Sequence[float]) -> bool:
    """Whether frames that begin at these ascending times come at one rate, but for
    rounding (half a frame in all)."""
    if len(times) < 3:
        return True
    steps = np.diff(times)
    drift = np.asarray(times) - np.linspace(times[0], times[-1], len(times))
    usual = float(np.median(steps))
    return bool(steps.max() < 1.75 * usual and np.abs(drift).max() <= 0.5 * steps.mean())


def shown_frames(times: Sequence[float], *, source_fps: float | None, target_fps: float) -> list[int]:
    """Indices of the frames of a clip of variable rate, brought to a constant one by
    the times at which they begin.

    The rate is that of its usual step; with `source_fps` the model's, if that is lower. At tick k
    the newest frame with time < (k + 1/2) / rate is on the screen: one that stays long repeats, one
    that is gone at once is left out.
    """
    steps = np.diff(times)
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    n_ticks = (times[-1] - times[0]) / usual + 1 if usual else np.inf
    if not n_ticks < SLIDES * len(times):
        raise DataError(
            f"its {len(times)} frames begin at times that make no sense; re-encode it at a constant rate"
        )
    rate = 1 / usual if source_fps is None else min(1 / usual, target_fps)
    ticks = np.arange(int((times[-1] - times[0]) * rate + 0.5) + 1)
    begun = np.searchsorted((np.asarray(times) - times[0]) * rate - 0.5, ticks, side="left")
    return [int(i) for i in begun - 1]


@EXTRACTIONS.add("head")
def _head(n: int, t: int, rule: FrameRule) -> list[int]:
    return [0]


@EXTRACTIONS.add("chunk")
def _chunk(n: int, t: int, rule: FrameRule) -> list[int]:
    """Side by side."""
    return list(range(0, n - t + 1, t))


@EXTRACTIONS.add("slide")
def _slide(n: int, t: int, rule: FrameRule) -> list[int]:
    """Every `frame_stride` frames."""
    return list(range(0, n - t + 1, rule.stride))


@EXTRACTIONS.add("uniform")
def _uniform(n: int, t: int, rule: FrameRule) -> list[int]:
    """`frame_sample` of them, evenly spread; one is the head."""
    if rule.sample == 1:
        return [0]
    # there are no more starts
    return [int(i) for i in np.linspace(0, n - t, min(rule.sample, n - t + 1), dtype=int)]


LEGAL = (*EXTRACTIONS, "full")
