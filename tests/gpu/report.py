"""What checks of a GPU find: rows, kept as they come, and one table of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hvtrain.models import find
from hvtrain.models.spec import Flavor, ModelSpec


@dataclass(frozen=True)
class Row:
    """One line. None: not of interest here."""

    what: str
    passed: bool = True
    error: float | None = None  # relative, of the largest value
    ms: float | None = None
    tflops: float | None = None  # per second
    mfu: float | None = None  # of the matrix product measured on this device
    peak_gib: float | None = None
    fit_gib: float | None = None  # what `hvtrain fit` says
    note: str = ""


@dataclass(frozen=True)
class Setup:
    """Where and how large. On a GPU the model at its real sizes; elsewhere the same code, tiny."""

    device: torch.device
    spec: ModelSpec
    flavor: Flavor
    sizes: tuple[tuple[int, int, int], ...]  # width, height, frames
    tokens: tuple[int, ...]  # of attention alone
    heads: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def setup(device: torch.device) -> Setup:
    spec = find("hunyuan-video")
    if device.type == "cuda":
        sizes = ((960, 544, 33), (960, 544, 129), (1280, 720, 129))
        return Setup(device, spec, spec.flavor("t2v"), sizes, (18_616, 67_576, 119_056), 24)
    return Setup(device, spec, spec.flavor("tiny"), ((64, 64, 9),), (200,), 2)


@dataclass(frozen=True)
class Check:
    name: str
    about: str
    seconds: int  # about so long, on an H100
    run: Callable[[Setup], Iterator[Row]]


def carry_out(check: Check, here: Setup, file: Path) -> list[Row]:
    """Its rows, each in `file` as soon as it is known. What breaks is a row too."""
    rows: list[Row] = []
    try:
        for row in check.run(here):
            rows.append(row)
            keep(file, rows)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:150]
        rows.append(Row("broke off", passed=False, note=f"{type(error).__name__}: {said}"))
    keep(file, rows)
    return rows


def keep(file: Path, rows: Iterable[Row]) -> None:
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read(file: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(file.read_text())] if file.is_file() else []


def table_of(found: dict[str, list[Row]], title: str) -> Table:
    table = Table(title=title)
    columns = ("check", "what", "", "error", "ms", "TFLOP/s", "MFU", "peak GiB", "fit GiB", "note")
    for name in columns:
        table.add_column(name, justify="left" if name in ("check", "what", "", "note") else "right")
    for check, rows in found.items():
        for i, r in enumerate(rows):
            fit = r.fit_gib and r.peak_gib and f"{r.fit_gib:.1f} ({r.fit_gib / r.peak_gib - 1:+.0%})"
            cells: list[Any] = [
                _n(r.error, "{:.1e}"), _n(r.ms, "{:,.1f}"), _n(r.tflops, "{:,.0f}"), _n(r.mfu, "{:.2f}")
            ]
            cells += [_n(r.peak_gib, "{:.1f}"), fit or _n(r.fit_gib, "{:.1f}"), r.note]
            table.add_row("" if i else check, r.what, "pass" if r.passed else "FAIL", *cells)
    return table


def _n(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
