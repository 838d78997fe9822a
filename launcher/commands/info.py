"""models, config, demo: what there is."""

from __future__ import annotations

import argparse
import os

from hvtrain.errors import ConfigError
from hvtrain.registry import Registry
from launcher.table import command


def _models_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", metavar="keys", help="list a model's parameters and their shapes")
    parser.add_argument("name", nargs="?", help="of which model")
    parser.add_argument("--flavor", help="of which of its flavors (default: the first)")


@command("models", "list the architectures and their sizes", options=_models_options, prints=True)
def _models(args: argparse.Namespace) -> None:
    if args.what not in (None, "keys"):
        raise ConfigError(f"models: unknown word '{args.what}'; `hvtrain models keys {args.what}` lists a model's parameters")
    from hvtrain.models import listing

    if args.what is None:
        print(listing.table())
        return
    if args.name is None:
        raise ConfigError("models keys: of which model? `hvtrain models` lists them")
    for line in listing.keys(args.name, args.flavor):
        print(line)


def _config_command_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="train, encode, generate or merge (default: all of them)")


@command("config", "print every key of a command's config with default and meaning", options=_config_command_options,
         prints=True)
def _config(args: argparse.Namespace) -> None:
    print(reference_text(args.name), end="")


def reference_text(name: str | None = None) -> str:
    """The keys of one command as YAML that loads, or of all as one YAML document each."""
    from hvtrain import config

    if name is not None:
        return config.reference(Registry("config", config.ROOTS).find(name, key="hvtrain config"))
    head = "# Every key with its default and meaning. Generated: hvtrain config > configs/reference.yaml\n"
    return head + "".join(f"--- # hvtrain {n}\n{config.reference(root)}" for n, root in config.ROOTS.items())


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: demo/)")


@command("demo", "the whole road on a tiny model, on the CPU: encode, train, generate, merge", options=_demo_options)
def _demo(args: argparse.Namespace) -> int | None:
    from launcher import demo

    # Two processes show what several do; a machine with one GPU has none for the second.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return demo.run(args.output)
