"""encode, train, generate: the commands that a config describes and that run on many processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable

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


@command("generate", "make videos from prompts", options=config_options, check=_check("generate"))
def _generate(args: argparse.Namespace) -> None:
    cfg = load_config("generate", args)
    from hvtrain import generate

    generate.run(cfg)
