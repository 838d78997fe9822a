"""fit: what a run will need, before it runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hvtrain.errors import ConfigError
from launcher.table import at_least, command, config_options, load_config


def _options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    add = parser.add_argument
    add(
        "--generate", action="store_true",
        help="the config is of `hvtrain generate` (default: of `hvtrain train`)"
    )
    add("--merge", action="store_true", help="the config is of `hvtrain merge`, one that reconciles")
    add("--loras", type=int, metavar="N", help="with --merge: so many LoRAs, where the config names none")
    add("--lora-rank", type=int, metavar="R", help="with --loras or a plan: their rank (default: 32)")
    add("--gpus", default="1", metavar="N,N", help="numbers of GPUs to try, as in 1,4,8 (default: 1)")
    add(
        "--memory", type=float, metavar="GIB", help="memory of one GPU (default: this machine's GPU, else 80)"
    )
    add(
        "--size", metavar="WxHxF",
        help="width x height x frames of the clips, as in 960x544x33 (default: the flavor's own)"
    )
    add(
        "--table", action="store_true",
        help="generation at all sizes that the model's authors list, on 1 to 8 GPUs"
    )


def _weights_or_none(model) -> None:
    from hvtrain.config import asset

    if model.dit is None or Path(asset(model.dit)).exists():
        return
    from hvtrain.models import find

    flavor = model.flavor or next(iter(find(model.name).flavors))
    raise ConfigError(
        f"model.dit: {model.dit} does not exist; without weights: add model.dit=null model.flavor={flavor}"
    )


def _config(args: argparse.Namespace):
    """Of training, or of generation where that is asked for; what would be one of the other is told so."""
    if args.generate or args.table:
        return load_config("generate", args)
    try:
        return load_config("train", args)
    except ConfigError as error:
        try:
            load_config("generate", args)
        except ConfigError:
            raise error from None
        raise ConfigError(f"{error}; for a config of `hvtrain generate` add --generate") from None


def _of_merge(
    args: argparse.Namespace, gpus: tuple[int, ...], size: tuple[int | None, int | None, int | None]
) -> str:
    if args.generate or args.table:
        raise ConfigError("--merge goes without --generate and --table")
    at_least(args, 1, "loras", "lora_rank")
    cfg = load_config("merge", args)
    from hvtrain.fit.merges.run import Loras, merging
    from hvtrain.fit.run import Asked

    return merging(cfg, Asked(gpus, args.memory, *size), Loras(args.loras, args.lora_rank))


@command(
    "fit", "predict memory, tokens and operations of a config, and the nearest that fits", options=_options,
    prints=True
)
def _fit(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.gpus):
        raise ConfigError(f"--gpus '{args.gpus}': expected numbers, as in 8 or 1,4,8")
    numbers = tuple(int(n) for n in args.gpus.split(","))
    width = height = frames = None
    if args.size is not None:
        found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", args.size)
        if found is None:
            raise ConfigError(f"--size '{args.size}': expected width x height x frames, as in 960x544x33")
        width, height, frames = (None if part is None else int(part) for part in found.groups())
    if args.merge:
        print(_of_merge(args, numbers, (width, height, frames)), end="")
        return
    if args.loras is not None or args.lora_rank is not None:
        raise ConfigError(f"--{'loras' if args.loras is not None else 'lora-rank'} is for --merge")
    cfg = _config(args)
    _weights_or_none(cfg.model)
    from hvtrain.fit import run as fit

    asked = fit.Asked(numbers, args.memory, width, height, frames)
    if args.table:
        print(fit.size_table(cfg.model))
    elif args.generate:
        print(fit.sampling(cfg, asked), end="")
    else:
        print(fit.training(cfg, asked), end="")
