"""Aspect-ratio buckets: which size a picture is resized and cropped to. Sizes as (width, height)."""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class BucketRule:
    """A dataset's resolution settings."""

    resolution: Size
    unit: Size  # of which width and height are multiples
    enabled: bool = False
    no_upscale: bool = False

    def choose(self, width: int, height: int) -> Size:
        """For a picture: the nearest aspect ratio of about the resolution's area."""
        if not self.enabled:
            return self.resolution
        area = self.resolution[0] * self.resolution[1]
        if self.no_upscale and width * height <= area:
            return whole((width, height), self.unit)
        ratio = width / height
        return min(sizes(area, self.unit), key=lambda s: (abs(s[0] / s[1] - ratio), s))


def whole(size: Size, unit: Size) -> Size:
    """Cut to multiples, one at least."""
    return max(unit[0], _down(size[0], unit[0])), max(unit[1], _down(size[1], unit[1]))


def sizes(area: int, unit: Size) -> list[Size]:
    """All bucket sizes of about this area, from half to once the square's side and
    mirrored (musubi-tuner's rule)."""
    wide = set(_sizes(area, unit[0], unit[1]))
    high = {(w, h) for h, w in _sizes(area, unit[1], unit[0])}
    return sorted(wide | high)


def _sizes(area: int, step: int, across: int) -> list[Size]:
    side = int(math.sqrt(area))
    found = (
        (n, _down(area // n, across)) for n in range(max(step, _down(side // 2, step)), side + step, step)
    )
    return [(n, m) for n, m in found if m]


def _down(n: int, unit: int) -> int:
    return n - n % unit
