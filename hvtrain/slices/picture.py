"""Pictures of a slice plan: which slice owns which part of the model. For the terminal, and as a PNG."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from hvtrain.slices.plan import SlicePlan, block_of
from shards.atomic import atomic_path

_CELL, _GAP, _LEFT, _TOP = 26, 2, 170, 40


def colour(loraid: int, n: int) -> tuple[int, int, int]:
    """Neighbours far apart on the wheel."""
    hue = (loraid - 1) * 0.618034 % 1
    r, g, b = colorsys.hls_to_rgb(hue, 0.42 + 0.16 * ((loraid - 1) % 2), 0.65)
    return int(r * 255), int(g * 255), int(b * 255)


def owners(plan: SlicePlan) -> dict[str, list[tuple[int, int, int]]]:
    """module -> (begin, end, loraid), by rows; in the order of the model."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for s in plan.slices:
        for slot in s.slots:
            found.setdefault(slot.module, []).append((slot.begin, slot.end, s.loraid))
    return {module: sorted(rows) for module, rows in sorted(found.items(), key=lambda item: _depth(item[0]))}


def _depth(module: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", module))


def lines(plan: SlicePlan) -> Iterator[str]:
    """A row per slice, and a row per block of who owns it."""
    yield f"{plan.n} slices of {plan.model} {plan.flavor}: {plan.granularity}, {plan.order}"
    yield f"largest slice / smallest: {plan.balance:.3f}"
    for s in plan.slices[:40]:
        modules = {slot.module for slot in s.slots}
        blocks = {block_of(m) for m in modules}
        yield (
            f"LORAID {s.loraid:>3}: {s.parameters:>14,} weights in {len(modules)} layers of {len(blocks)} "
            "blocks"
        )
    if plan.n > 40:
        yield f"... and {plan.n - 40} more"
    for block, cells in _by_block(plan).items():
        shown = " ".join(
            ",".join(str(i) for i in ids[:6]) + ("+" if len(ids) > 6 else "") for ids in cells.values()
        )
        yield f"{block:<20} {shown}"


def _by_block(plan: SlicePlan) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for module, rows in owners(plan).items():
        ids = list(dict.fromkeys(loraid for _, _, loraid in rows))
        found.setdefault(block_of(module), {})[module] = ids
    return found


def draw(plan: SlicePlan, path: str | Path) -> None:
    """A row of cells per block, a cell per layer, coloured by owner; a layer of
    several owners is striped by rows."""
    parts = owners(plan)
    blocks: dict[str, list[str]] = {}
    for module in parts:
        blocks.setdefault(block_of(module), []).append(module)
    widest = max(len(modules) for modules in blocks.values())
    width = _LEFT + widest * (4 * _CELL + _GAP) + 20
    height = _TOP + len(blocks) * (_CELL + _GAP) + 30 + 22 * -(-min(plan.n, 64) // 8)
    image = Image.new("RGB", (max(width, 640), height), "white")
    pen = ImageDraw.Draw(image)
    pen.text(
        (10, 12), f"{plan.model} {plan.flavor}: {plan.n} slices, {plan.granularity}, {plan.order}",
        fill="black"
    )
    for row, (block, modules) in enumerate(blocks.items()):
        y = _TOP + row * (_CELL + _GAP)
        pen.text((10, y + 7), block, fill="black")
        for column, module in enumerate(modules):
            x = _LEFT + column * (4 * _CELL + _GAP)
            _cell(pen, x, y, parts[module], plan.n)
            pen.text((x + 4, y + 7), module.removeprefix(block + ".")[:16], fill="white")
    _legend(pen, plan, _TOP + len(blocks) * (_CELL + _GAP) + 14)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def _cell(pen: ImageDraw.ImageDraw, x: int, y: int, rows: list[tuple[int, int, int]], n: int) -> None:
    last, wide = max(end for _, end, _ in rows), 4 * _CELL
    pen.rectangle((x, y, x + wide - 1, y + _CELL - 1), fill=(225, 225, 225))
    for begin, end, loraid in rows:
        pen.rectangle(
            (x + wide * begin // last, y, x + wide * end // last - 1, y + _CELL - 1), fill=colour(loraid, n)
        )


def _legend(pen: ImageDraw.ImageDraw, plan: SlicePlan, top: int) -> None:
    for i, s in enumerate(plan.slices[:64]):
        x, y = 10 + 76 * (i % 8), top + 22 * (i // 8)
        pen.rectangle((x, y, x + 14, y + 14), fill=colour(s.loraid, plan.n))
        pen.text((x + 20, y + 2), f"{s.loraid}", fill="black")


