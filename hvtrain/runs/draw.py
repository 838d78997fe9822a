"""The charts as one PNG, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hvtrain.runs.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, charts, colour
from hvtrain.runs.listing import HEAD, row
from hvtrain.runs.read import Run
from shards.atomic import atomic_path, write_text

_ROW = 20
_GREY, _DARK = "#dddddd", "#444444"


def png(runs: Sequence[Run], path: Path) -> None:
    found, legend = charts(runs), 12 + _ROW * len(runs)
    image = Image.new("RGB", (2 * WIDTH, legend + HEIGHT * -(-len(found) // 2)), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    for i, run in enumerate(runs):
        pen.rectangle((12, 12 + _ROW * i, 26, 22 + _ROW * i), fill=colour(i))
        pen.text((34, 9 + _ROW * i), "   ".join(row(run)), fill=_DARK, font=font)
    for i, chart in enumerate(found):
        _draw(pen, chart, WIDTH * (i % 2), legend + HEIGHT * (i // 2), font)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _draw(pen: ImageDraw.ImageDraw, chart: Chart, left: int, top: int, font: Font) -> None:
    bottom = top + HEIGHT - BOTTOM
    pen.text((left + LEFT, top + 10), chart.title, fill="black", font=font)
    for tick in chart.y:
        pen.line((left + LEFT, top + tick.at, left + WIDTH - RIGHT, top + tick.at), fill=_GREY)
        pen.text((left + LEFT - 6, top + tick.at), tick.label, fill=_DARK, font=font, anchor="rm")
    for tick in chart.x:
        pen.line((left + tick.at, bottom, left + tick.at, bottom + 4), fill=_DARK)
        pen.text((left + tick.at, bottom + 8), tick.label, fill=_DARK, font=font, anchor="mt")
    for line in chart.lines:
        points = [(left + x, top + y) for x, y in line.points]
        if len(points) > 1:
            pen.line(points, fill=colour(line.run), width=2)
        else:
            pen.circle(points[0], 3, fill=colour(line.run))


_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff }
table { border-collapse: collapse; margin-bottom: 20px } th, td { text-align: left; padding: 4px 14px 4px 0 }
th { font-weight: 600; border-bottom: 1px solid #ccc } td.error { color: #b00; max-width: 40em }
tr[data-run] { cursor: pointer } tr.off { opacity: .35 }
i { display: inline-block; width: 12px; height: 12px; margin-right: 8px }
main { display: flex; flex-wrap: wrap; gap: 12px }
svg text { font-size: 12px; fill: #444 } svg .title { font-size: 14px; fill: #000 }
"""
_SCRIPT = """
for (const row of document.querySelectorAll("tr[data-run]")) row.onclick = () => {
  const off = row.classList.toggle("off");
  const lines = document.querySelectorAll(`[data-line="${row.dataset.run}"]`);
  for (const line of lines) line.style.display = off ? "none" : "";
};
"""


def page(runs: Sequence[Run], path: Path) -> None:
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join(_table_row(i, run) for i, run in enumerate(runs))
    pictures = "".join(_svg(chart, [run.name for run in runs]) for chart in charts(runs))
    write_text(path, (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>hvtrain runs</title>'
        f"<style>{_STYLE}</style></head><body><h1>{len(runs)} runs</h1><p>A click on a run hides or shows "
        "its curves.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><main>{pictures}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    ))


def _table_row(number: int, run: Run) -> str:
    name, *cells, error = map(html.escape, row(run))
    others = "".join(f"<td>{cell}</td>" for cell in cells)
    return (
        f'<tr data-run="{number}"><td title="{html.escape(str(run.path))}"><i '
        f'style="background:{colour(number)}"></i>{name}</td>{others}<td class="error">{error}</td></tr>'
    )


def _svg(chart: Chart, names: Sequence[str]) -> str:
    bottom, parts = (
        HEIGHT - BOTTOM, [f'<text class="title" x="{LEFT}" y="{TOP - 14}">{html.escape(chart.title)}</text>']
    )
    for tick in chart.y:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{tick.at}" y2="{tick.at}" stroke="{_GREY}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{tick.at + 4}" text-anchor="end">{tick.label}</text>')
    parts += [
        f'<text x="{tick.at}" y="{bottom + 18}" text-anchor="middle">{tick.label}</text>' for tick in chart.x
    ]
    for line in chart.lines:
        points = " ".join(f"{x},{y}" for x, y in line.points)
        shape = (
            f'<polyline points="{points}" fill="none" stroke-width="1.6"' if len(line.points) > 1
            else f'<circle cx="{line.points[0][0]}" cy="{line.points[0][1]}" r="3"'
        )
        name = html.escape(names[line.run])
        end = "</polyline>" if len(line.points) > 1 else "</circle>"
        parts.append(f'{shape} stroke="{colour(line.run)}" data-line="{line.run}"><title>{name}</title>{end}')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg>'
