"""encode, train, generate: the commands that a config describes and that run on many processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from launcher.report import REQUEUE
from launcher.table import command, config_options, load_config


def _check(name: str) -> Callable[[argparse.Namespace], None]:
    """The rules of a config that need no model, applied before processes are started."""

    def check(args: argparse.Namespace) -> None:
        from hvtrain import validate

        rules: dict[str, Callable] = {
            "encode": validate.check_encode,
            "train": validate.check_train,
            "generate": validate.check_generate,
        }
        rules[name](load_config(name, args))

    return check


def _encode_options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    parser.add_argument("--strict", action="store_true", help="the same as strict=true: stop at the first unusable clip")


@command("encode", "encode clips and captions into shards", options=_encode_options, check=_check("encode"))
def _encode(args: argparse.Namespace) -> None:
    if args.strict:
        args.items.append("strict=true")
    cfg = load_config("encode", args)
    from hvtrain import encode

    encode.run(cfg)


@command("train", "train a LoRA or the whole model on shards", options=config_options, check=_check("train"))
def _train(args: argparse.Namespace) -> int | None:
    from hvtrain import signals

    signals.remember()  # a job that is asked to stop while it loads must not die of it
    cfg = load_config("train", args)
    from hvtrain import train

    return train.run(cfg)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    add = parser.add_argument
    add("--loraid", nargs="+", action="append", default=[], metavar="N", help="slices of slices=DIR to apply: --loraid 1 2 3")
    add("--lora_multiplier", "--lora-multiplier", nargs="+", action="append", default=[], metavar="X",
        help="one per slice, or one for all; 0 switches a slice off completely")


def _generate_items(args: argparse.Namespace) -> None:
    """The options as overrides. An option that takes several values also swallows what follows it: that is given back."""
    for key in ("loraid", "lora_multiplier"):
        values = [v for group in getattr(args, key) for v in group]
        numbers = [v for v in values if v.replace(".", "", 1).lstrip("-").isdigit()]
        args.items += [v for v in values if v not in numbers]
        if numbers:
            args.items.append(f"{key}=[{', '.join(numbers)}]")
        setattr(args, key, [])


def _check_generate(args: argparse.Namespace) -> None:
    _generate_items(args)
    _check("generate")(args)


@command("generate", "make videos from prompts", options=_generate_options, check=_check_generate)
def _generate(args: argparse.Namespace) -> int:
    from hvtrain import signals

    signals.remember()  # as for train: obeyed at the end of a sampling step
    _generate_items(args)
    cfg = load_config("generate", args)
    from hvtrain import generate
    from hvtrain.generate.stop import Stopped

    try:
        generate.run(cfg)
    except Stopped:
        return REQUEUE
    return 0
