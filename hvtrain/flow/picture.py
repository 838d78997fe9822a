"""Pictures of noise levels: how often each is trained, and what an error at it counts. For
the terminal, and as a PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvtrain.flow.timesteps import Quantile
from shards.atomic import atomic_path

BINS, DRAWS = 50, 200_000
_WIDTH, _HEIGHT, _EDGE = 900, 420, 50
_BARS, _LINE, _INK = (120, 160, 215), (205, 80, 40), (40, 40, 40)


@dataclass(frozen=True)
class Levels:
    """Of BINS equal parts of sigma in [0, 1]."""

    density: Tensor  # mean 1 over them
    weight: Tensor  # of an error at their middle

    @property
    def counted(self) -> Tensor:
        """Density times weight, mean 1: what the loss is made of."""
        both = self.density * self.weight
        return both / both.mean().clamp(min=1e-30)


def look(quantile: Quantile, weight: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Levels:
    """Evenly many of the distribution, for latents of a shape."""
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    found = torch.histc(quantile(u, shape).float(), BINS, 0.0, 1.0)
    return Levels(found / found.mean(), weight((torch.arange(BINS) + 0.5) / BINS))


def lines(levels: Levels, width: int = 40) -> Iterator[str]:
    """A row for each second bin: its bar, density and weight."""
    density, counted, weight = (
        x.view(-1, 2).mean(1) for x in (levels.density, levels.counted, levels.weight)
    )
    yield f"sigma  {'density':<{width}}  density  weight  counts"
    for i, (d, w, c) in enumerate(zip(density.tolist(), weight.tolist(), counted.tolist(), strict=True)):
        bar = "#" * round(width * d / max(density.max().item(), 1e-30))
        yield f"{(i + 0.5) / len(density):5.2f}  {bar:<{width}}  {d:7.3f}  {w:6.3g}  {c:6.3f}"


def draw(levels: Levels, path: str | Path, *, title: str) -> None:
    """Bars of the density, and a line of what the loss is made of; both have the mean 1."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    counted = levels.counted
    top = max(levels.density.max().item(), counted.max().item(), 1e-30)
    base, tall, wide = _HEIGHT - _EDGE, _HEIGHT - 2 * _EDGE, (_WIDTH - 2 * _EDGE) / BINS
    for i, d in enumerate(levels.density.tolist()):
        x = _EDGE + i * wide
        pen.rectangle((x, base - tall * d / top, x + wide - 1, base), fill=_BARS)
    points = [(_EDGE + (i + 0.5) * wide, base - tall * c / top) for i, c in enumerate(counted.tolist())]
    pen.line(points, fill=_LINE, width=3)
    pen.line((_EDGE, base, _WIDTH - _EDGE, base), fill=_INK)
    for tick in range(11):
        x = _EDGE + (_WIDTH - 2 * _EDGE) * tick / 10
        pen.line((x, base, x, base + 5), fill=_INK)
        pen.text((x - 8, base + 9), f"{tick / 10:.1f}", fill=_INK)
    pen.text((_EDGE, 12), title, fill=_INK)
    pen.text((_EDGE, 28), "bars: how often a sigma is trained", fill=_BARS)
    pen.text((_EDGE + 260, 28), "line: that times what an error counts", fill=_LINE)
    pen.text((6, base - tall * min(1 / top, 1.0) - 6), "1", fill=_INK)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")
