"""data: look at a dataset file before any GPU time is spent."""

from __future__ import annotations

import argparse

from hvtrain.errors import ConfigError
from launcher.table import GROUPS, command

GROUPS["data"] = (
    "look at a dataset before encoding: what it yields, what is wrong with it, how it will be cropped"
)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="dataset file (TOML or YAML)")
    parser.add_argument(
        "--model", metavar="NAME", help="architecture, for frame rate and sizes (default: that of configs)"
    )
    parser.add_argument("--flavor", metavar="NAME", help="its flavor (default: the first)")
    parser.add_argument(
        "--workers", type=int, default=8, metavar="N", help="files that are looked at together (default: 8)"
    )


def _preview_options(parser: argparse.ArgumentParser) -> None:
    _options(parser)
    parser.add_argument(
        "--output", default="preview.html", metavar="FILE", help="the page to write (default: preview.html)"
    )
    parser.add_argument(
        "--max", type=int, default=60, metavar="N", help="samples to show, spread evenly (default: 60)"
    )


def _look(args: argparse.Namespace):
    from hvtrain.encode import check

    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    return check.look(args.dataset, model=args.model, flavor=args.flavor, workers=args.workers)


@command(
    "data check",
    "buckets, frames, captions, unreadable files, size of the shards; exit code 1 if clips are unusable",
    options=_options, prints=True
)
def _check(args: argparse.Namespace) -> int:
    from hvtrain.encode import check

    report = _look(args)
    for line in check.lines(report):
        print(line)
    return 1 if report.refused else 0


@command(
    "data preview", "a page with the clips as they will be cropped, and their captions",
    options=_preview_options
)
def _preview(args: argparse.Namespace) -> None:
    from hvtrain.encode import check, contact

    if args.max < 1:
        raise ConfigError(f"--max {args.max}: expected 1 or more")
    if not args.output.lower().endswith((".html", ".htm")):
        raise ConfigError(f"--output {args.output}: expected a page to write, for example preview.html")
    report = _look(args)
    n = contact.write(report.samples, args.output, n=args.max, workers=args.workers)
    print(f"{args.output}: {n} of {len(report.samples)} samples")
    if report.refused:
        print(
            f"{check.n_of(len(report.refused), 'clip')} cannot be used; `hvtrain data check {args.dataset}` "
            "lists them"
        )
