"""Aspect-ratio buckets: which size a picture is resized and cropped to. Sizes as (width, height)."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEP = 16  # pixels: a VAE cell of 8 times a patch of 2


@dataclass(frozen=True)
class BucketRule:
    """A dataset's resolution settings."""

    resolution: tuple[int, int]  # width, height
    enabled: bool = False
    no_upscale: bool = False

    def choose(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) for a picture: the nearest aspect ratio of about the resolution's area."""
        if not self.enabled:
            return self.resolution
        area = self.resolution[0] * self.resolution[1]
        if self.no_upscale and width * height <= area:
            return max(STEP, width - width % STEP), max(STEP, height - height % STEP)
        ratio = width / height
        return min(sizes(area), key=lambda s: (abs(s[0] / s[1] - ratio), s))


def sizes(area: int) -> list[tuple[int, int]]:
    """All bucket sizes of about this area, from half to once the square's side and mirrored (musubi-tuner's rule)."""
    side = int(math.sqrt(area))
    found = set()
    for w in range(max(STEP, _down(side // 2)), side + STEP, STEP):
        h = _down(area // w)
        if h:
            found |= {(w, h), (h, w)}
    return sorted(found)


def _down(n: int) -> int:
    return n - n % STEP
