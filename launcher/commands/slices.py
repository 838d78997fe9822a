"""slices plan: cut a model into slots for LoRAs that are trained apart."""

from __future__ import annotations

import argparse

from launcher.table import GROUPS, command

GROUPS["slices"] = (
    "train a dataset in slices: independent LoRAs that own disjoint parts of the model, then one merge"
)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--dit", metavar="FILE",
        help="the model that the slices will be trained on; the plan remembers its weights"
    )
    add("--model", metavar="NAME", help="or an architecture")
    add("--flavor", metavar="NAME", help="flavor of the architecture")
    add("--n", type=int, metavar="N", help="how many slices")
    add(
        "--blocks-per-loraid", type=int, metavar="B",
        help="or how many blocks each has: LORAID 1 owns the first B, and so on"
    )
    add(
        "--granularity", metavar="KIND",
        help="what is never divided: module (default), block (with --blocks-per-loraid) or rows"
    )
    add(
        "--order", metavar="KIND",
        help="interleaved over the depth (default), or contiguous ranges (with --blocks-per-loraid)"
    )
    add(
        "--include", action="append", default=[], metavar="PATTERN",
        help="only layers that match (may be repeated)"
    )
    add(
        "--exclude", action="append", default=[], metavar="PATTERN",
        help="never layers that match; wins over --include"
    )
    add("--output", required=True, metavar="DIR", help="gets plan.json and plan.png")


@command(
    "slices plan", "cut a model into disjoint slots: plan.json and a picture of who owns what",
    options=_plan_options
)
def _plan(args: argparse.Namespace) -> None:
    from hvtrain.slices import run
    from hvtrain.slices.plan import Cut

    cut = Cut(
        args.n, args.blocks_per_loraid, args.granularity, args.order, tuple(args.include), tuple(args.exclude)
    )
    for line in run.run(cut, args.output, dit=args.dit, model=args.model, flavor=args.flavor):
        print(line)
