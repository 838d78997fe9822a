"""models, demo: what there is."""

from __future__ import annotations

import argparse
import os

from hvtrain.errors import ConfigError
from launcher.table import command


def _models_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", metavar="keys", help="list a model's parameters and their shapes")
    parser.add_argument("name", nargs="?", help="of which model")
    parser.add_argument("--flavor", help="of which of its flavors (default: the first)")
    parser.add_argument("--part", help="which of its files, as under `model:` of a config (default: dit)")


@command("models", "list the architectures and their sizes", options=_models_options, prints=True)
def _models(args: argparse.Namespace) -> None:
    if args.what not in (None, "keys"):
        raise ConfigError(
            f"models: unknown word '{args.what}'; `hvtrain models keys {args.what}` lists a model's "
            "parameters"
        )
    from hvtrain.models import listing

    if args.what is None:
        print(listing.table())
        return
    if args.name is None:
        raise ConfigError("models keys: of which model? `hvtrain models` lists them")
    for line in listing.keys(args.name, args.flavor, args.part):
        print(line)


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="demo", metavar="DIR", help="where everything goes (default: demo/)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the tiny copy of this architecture (default: as in a config)"
    )
    parser.add_argument(
        "--slices", type=int, metavar="N", help="instead: N words (2 to 6), a slice and a job each, one merge"
    )


@command(
    "demo", "the whole road on a tiny model, on the CPU: encode, train, generate, merge",
    options=_demo_options
)
def _demo(args: argparse.Namespace) -> int | None:
    from launcher import demo, demo_slices

    # Two processes show what several do; a machine with one GPU has none for the second.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.slices is None:
        return demo.run(args.output, args.model)
    if args.model:
        raise ConfigError("--slices is shown on the default tiny model: leave --model away")
    return demo_slices.run(args.output, args.slices)
