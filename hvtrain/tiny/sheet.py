"""The contact sheet: one row a prompt, one column a model, three frames of each video."""

from __future__ import annotations

from pathlib import Path

import numpy as np

INK, PAPER, RULE = (30, 30, 30), (250, 250, 250), (200, 200, 200)


def contact_sheet(
    path: str | Path, rows: list[tuple[str, list[np.ndarray]]], *, columns: list[str], zoom: int = 2
) -> None:
    """Write a PNG of `rows` = (prompt, one uint8 video [F H W 3] per column)."""
    from PIL import Image, ImageDraw

    frames, height, width, _ = rows[0][1][0].shape
    shown = [0, frames // 2, frames - 1]
    cell_w, cell_h = (width * zoom + 4) * len(shown) + 16, height * zoom + 26
    sheet = Image.new("RGB", (cell_w * len(columns) + 8, cell_h * len(rows) + 30), PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(columns):
        draw.text((c * cell_w + 8, 8), title, fill=INK)
    for r, (prompt, videos) in enumerate(rows):
        top = 30 + r * cell_h
        draw.line([(8, top - 2), (sheet.width - 8, top - 2)], fill=RULE)
        draw.text((8, top), prompt, fill=INK)
        for c, video in enumerate(videos):
            for i, f in enumerate(shown):
                picture = Image.fromarray(video[f]).resize(
                    (width * zoom, height * zoom), Image.Resampling.NEAREST
                )
                sheet.paste(picture, (c * cell_w + 8 + i * (width * zoom + 4), top + 16))
    sheet.save(path)
