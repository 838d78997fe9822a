"""Runs as rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hvtrain.runs.read import Run

HEAD = ("run", "status", "step", "loss", "held-out", "s/step", "tokens/s", "MFU", "last error")


def row(run: Run) -> tuple[str, ...]:
    """As HEAD says; numbers are means of the last steps, the held-out loss is the last one."""

    def shown(name: str, form: str) -> str:
        value = run.recent(name)
        return "" if value is None else format(value, form)

    held = run.curves.get("eval/loss", [])
    return (
        run.name, run.state, f"{run.step}/{'?' if run.steps is None else run.steps}",
        shown("train/loss", ".4f"), f"{held[-1][1]:.4f}" if held else "", shown("speed/step_s", ".2f"),
        shown("speed/tokens_per_s", ",.0f"), shown("speed/mfu", ".1%"), run.error,
    )


def lines(runs: Sequence[Run]) -> Iterator[str]:
    rows = [HEAD, *map(row, runs)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEAD))]
    for cells in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
