"""What a merge did: per LoRA what it holds and how strong it is, what overlaps, held-out
losses. JSON and one HTML file."""

from __future__ import annotations

import html
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hvtrain.lorafiles.lowrank import squared_norm
from hvtrain.lorafiles.overlap import Contribution, labels, overlaps
from hvtrain.merge.inputs import Inputs
from hvtrain.slices.plan import block_of
from hvtrain.weights.outputs import writing
from shards.atomic import write_text

FIDELITY = "Distance from what each does alone (0 as it alone, 1 as the base; keep: 0 as the base)"
SHOWN = 200  # overlapping layers that the JSON lists


@dataclass
class Entry:
    """One LoRA of the merge."""

    file: str
    loraid: str
    multiplier: float
    layers: int
    rows: int  # output rows that it changes
    parameters: int
    norm: float  # Frobenius, of all its deltas times the multiplier


@dataclass
class Report:
    policy: str
    loras: list[Entry]
    overlap_rows: int
    overlap_layers: int
    overlaps: list[dict]
    missing: tuple[int, ...]
    plan: str | None
    occupancy: dict[str, list[list]]  # layer -> [first row, last row + 1, number of the LoRA]
    errors: dict[str, float] = field(default_factory=dict)  # layer -> what cutting the rank lost
    losses: dict[str, float] = field(default_factory=dict)
    # How far the merge is from what each LoRA does alone, on clips held out: 0 as it alone, 1 as
    # the base. Summed up, and now
    summed: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    # On each one's clips, how strongly every other fires, as a share of what its own does
    leak: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs, layers: Mapping[str, list[Contribution]], policy: str) -> Report:
        names = labels(inputs.loras)
        n_rows: Counter[str] = Counter()
        squares: dict[str, float] = defaultdict(float)
        occupancy: dict[str, list[list]] = {}
        for module, found in layers.items():
            for c in found:
                rows = torch.nonzero(c.rows).flatten()
                n_rows[c.lora] += len(rows)
                squares[c.lora] += squared_norm(c.pair) * c.multiplier**2
                if len(rows):
                    occupancy.setdefault(module, []).append(
                        [int(rows[0]), int(rows[-1]) + 1, names.index(c.lora)]
                    )
        seen = list(overlaps(dict(layers)))
        entries = [
            Entry(
                name, lora.metadata.get("ss_loraid", ""), multiplier, len(lora.pairs), n_rows[name],
                sum(p.up.numel() + p.down.numel() for p in lora.pairs.values()), squares[name] ** 0.5,
            )
            for name, (lora, multiplier) in zip(names, inputs.loras, strict=True)
        ]
        return cls(
            policy, entries, sum(o.n_rows for o in seen), len({o.module for o in seen}),
            [asdict(o) for o in seen[:SHOWN]], inputs.missing, inputs.plan.hash if inputs.plan else None,
            occupancy,
        )

    def lines(self) -> Iterator[str]:
        if self.overlap_rows:
            yield (
                f"{self.overlap_rows} rows of {self.overlap_layers} layers are changed by more than one: "
                f"{self.policy}"
            )
        elif len(self.loras) > 1:
            yield (
                f"disjoint: no row of {sum(1 for _ in self.occupancy)} layers is changed by more than one of "
                f"{len(self.loras)}"
            )
        if self.missing:
            yield f"left out: LORAID {', '.join(map(str, self.missing))}"

    def kept(self) -> Iterator[str]:
        for name, away in self.fidelity.items():
            yield f"distance {self.summed[name]:.3f} summed -> {away:.3f}  {name}"


def save_report(report: Report, output: Path) -> list[Path]:
    """NAME-merge.json and NAME-merge.html beside the output; of a merge that reconciled also
    NAME-merge/, for TensorBoard."""
    folder, stem = (output.parent, output.stem) if output.suffix else (output, output.name)
    paths = [folder / f"{stem}-merge.json", folder / f"{stem}-merge.html"]
    for path, text in zip(
        paths, (json.dumps(asdict(report), indent=1) + "\n", page(report, stem)), strict=True
    ):
        with writing(path):
            write_text(path, text)
    if report.fidelity:
        paths.append(_save_events(report, folder / f"{stem}-merge"))
    return paths


def _save_events(report: Report, folder: Path) -> Path:
    """A curve for each LoRA, and for `keep`: at step 0 its distance as summed up, at step 1 as merged."""
    from hvtrain.train.metrics import TensorBoard

    shutil.rmtree(folder, ignore_errors=True)
    board = TensorBoard(folder, purge_step=None)
    for step, distances in enumerate((report.summed, report.fidelity)):
        board.scalars(step, {f"distance/{name}": away for name, away in distances.items()})
    board.close()
    return folder


_STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2rem;max-width:80rem}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
.map td{padding:1px;border:0}.cell{position:relative;width:7rem;height:16px;background:#eee}
.cell i{position:absolute;top:0;height:100%}small{color:#666}"""


def page(report: Report, title: str) -> str:
    """Self-contained: no scripts, nothing fetched."""
    rows = "".join(
        f"<tr><td>{_dot(i)} {html.escape(e.file)}</td>"
        f"<td>{html.escape(e.loraid)}</td><td>{e.multiplier:g}</td>"
        f"<td>{e.layers}</td><td>{e.rows:,}</td><td>{e.parameters:,}</td><td>{e.norm:.4g}</td></tr>"
        for i, e in enumerate(report.loras)
    )
    columns = ("LoRA", "LORAID", "times", "layers", "rows", "parameters", "norm")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"
    losses = "".join(f"<tr><td>{html.escape(n)}</td><td>{v:.5f}</td></tr>" for n, v in report.losses.items())
    losses = f"<h2>Held-out loss</h2><table>{losses}</table>" if losses else ""
    kept = "".join(
        f"<tr><td>{html.escape(n)}</td><td>{report.summed[n]:.3f}</td><td>{v:.3f}</td></tr>" for n,
        v in report.fidelity.items()
    )
    kept = (
        f"<h2>{FIDELITY}</h2><table><tr><th></th><th>summed</th><th>merged</th></tr>{kept}</table>"
        if kept else ""
    )
    kept += _leak(report)
    facts = "".join(f"<p>{html.escape(line)}</p>" for line in report.lines())
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>{facts}<table>{head}{rows}</table>{kept}{losses}<h2>Who changes "
        f"what</h2>{_map(report)}\n"
    )


def _leak(report: Report) -> str:
    """How strongly each LoRA fires on each one's clips."""
    if not report.leak:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in report.leak)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{value:.2f}</td>' for value in row.values())}</tr>"
        for name, row in report.leak.items()
    )
    return (
        "<h2>On the clips of (row), how strongly does (column) fire, "
        f"alone?</h2><table><tr><th></th>{head}</tr>{rows}</table>"
    )


def _map(report: Report) -> str:
    """A row per block, a cell per layer, a stripe per LoRA at the rows that it changes."""
    blocks: dict[str, list[str]] = {}
    for module in report.occupancy:
        blocks.setdefault(block_of(module), []).append(module)
    lines = []
    for block, modules in blocks.items():
        cells = []
        for module in modules:
            parts = report.occupancy[module]
            last = max(end for _, end, _ in parts)
            stripes = "".join(_stripe(a / last, (b - a) / last, i) for a, b, i in parts)
            cells.append(f'<td title="{html.escape(module)}"><div class="cell">{stripes}</div></td>')
        lines.append(f"<tr><td><small>{html.escape(block)}</small></td>{''.join(cells)}</tr>")
    return f'<table class="map">{"".join(lines)}</table>'


def _stripe(left: float, width: float, number: int) -> str:
    place = f"left:{100 * left:.2f}%;width:{100 * width:.2f}%"
    return f'<i style="{place};background:{_colour(number)};opacity:.8"></i>'


def _colour(number: int) -> str:
    return f"hsl({number * 222.5 % 360:.0f} 65% {42 + 16 * (number % 2)}%)"


def _dot(number: int) -> str:
    return f'<span style="color:{_colour(number)}">&#9632;</span>'
