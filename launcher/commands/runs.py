"""runs: what has been trained, and how it went."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.table import command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="a run, or a directory with runs in it at any depth"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="also compare their curves: writes runs.png and runs.html there"
    )


@command(
    "runs", "list runs: status, step, loss, speed, last error; compare their curves", options=_options,
    prints=True
)
def _runs(args: argparse.Namespace) -> None:
    from hvtrain.runs.listing import lines
    from hvtrain.runs.read import find_runs

    found = find_runs(args.folders)
    for line in lines(found):
        print(line)
    if args.output is None:
        return
    from hvtrain.runs import draw

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    draw.png(found, output / "runs.png")
    draw.page(found, output / "runs.html")
    print(f"curves: {output / 'runs.png'}, {output / 'runs.html'}")
