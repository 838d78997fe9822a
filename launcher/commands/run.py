"""encode, train, generate: the commands that a config describes and that run on many processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hvtrain.config.load import override
from hvtrain.errors import ConfigError
from hvtrain.stopping import REQUEUE
from launcher.table import command, config_options, load_config


def _check(name: str) -> Callable[[argparse.Namespace], None]:
    """The rules of a config that need no model, applied before processes are started."""

    def check(args: argparse.Namespace) -> None:
        from hvtrain.config import rules

        getattr(rules, f"check_{name}")(load_config(name, args))

    return check


def _encode_options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    parser.add_argument(
        "--strict", action="store_true", help="the same as strict=true: stop at the first unusable clip"
    )


@command("encode", "encode clips and captions into shards", options=_encode_options, check=_check("encode"))
def _encode(args: argparse.Namespace) -> None:
    if args.strict:
        args.items.append("strict=true")
    cfg = load_config("encode", args)
    from hvtrain.encode import run as encode

    encode.run(cfg)


def _train_options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    parser.add_argument("--show-timesteps", action="store_true",
                        help="draw which noise levels the config trains, here and in timesteps.png; train "
                        "nothing")


@command("train", "train a LoRA or the whole model on shards", options=_train_options, check=_check("train"))
def _train(args: argparse.Namespace) -> int | None:
    from hvtrain import stopping

    stopping.remember()  # a job that is asked to stop while it loads must not die of it
    cfg = load_config("train", args)
    from hvtrain.train import run as train

    if args.show_timesteps:
        for line in train.show_timesteps(cfg, "timesteps.png"):
            print(line)
        return None
    return train.run(cfg)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    add = parser.add_argument
    add("--lora", action="append", default=[], metavar="FILE", help="a LoRA file; may be repeated")
    add("--loraid", "--LORAID", nargs="+", action="append", default=[], metavar="N",
        help="slices of slices=DIR to apply: --loraid 1 2 3")
    add("--lora_expert", "--lora-expert", nargs="+", action="append", default=[], metavar="NAME",
        help="of a model of several: whose each --lora is, in order, or one for all (default: what each file "
        "says)")
    add("--lora_multiplier", "--lora-multiplier", nargs="+", action="append", default=[], metavar="X",
        help="one for each --lora or --loraid, in order, or one for all; 0 switches one off completely")


def _generate_items(args: argparse.Namespace) -> None:
    """The options as overrides. An option that takes several values also swallows what
    follows it: that is given back."""
    numbers: dict[str, list[str]] = {}
    for key, fits in {
        "loraid": _is_number, "lora_multiplier": _is_number, "lora_expert": str.isidentifier
    }.items():
        values = [v for group in getattr(args, key) for v in group]
        numbers[key] = [v for v in values if fits(v)]
        args.items += [v for v in values if not fits(v)]
        setattr(args, key, [])
    experts = numbers.pop("lora_expert")
    if args.lora:
        args.items.append(
            _lora_item(args, numbers.pop("lora_multiplier"), experts, slices=bool(numbers["loraid"]))
        )
        args.lora = []
    elif experts:
        raise ConfigError(
            "--lora_expert says whose a --lora is; give that, or lora=[{path: FILE, expert: NAME}]"
        )
    args.items += [f"{key}=[{', '.join(found)}]" for key, found in numbers.items() if found]


def _lora_item(args: argparse.Namespace, factors: list[str], experts: list[str], *, slices: bool) -> str:
    if slices and factors:
        raise ConfigError(
            "--lora_multiplier: of --lora or of --loraid? give the files as lora=[{path: FILE, multiplier: "
            "X}]"
        )
    if any(item.startswith("lora=") for item in args.items):
        raise ConfigError("--lora and lora=...: both give LoRA files; give all of them in one way")
    for option, given in {"--lora_multiplier": factors, "--lora_expert": experts}.items():
        if len(given) not in (0, 1, len(args.lora)):
            numbers = f"{len(args.lora)} --lora but {len(given)} {option}"
            raise ConfigError(f"{numbers}; give one for each, in order, or one for all")
    factors = factors * len(args.lora) if len(factors) == 1 else factors or ["1.0"] * len(args.lora)
    whose = (
        [{"expert": name} for name in experts * (len(args.lora) if len(experts) == 1 else 1)]
        or [{}] * len(args.lora)
    )
    return override(
        "lora",
        [
            {"path": p, "multiplier": float(x), **of} for p, x,
            of in zip(args.lora, factors, whose, strict=True)
        ]
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_generate(args: argparse.Namespace) -> None:
    _generate_items(args)
    _check("generate")(args)


@command("generate", "make videos from prompts", options=_generate_options, check=_check_generate)
def _generate(args: argparse.Namespace) -> int:
    from hvtrain import stopping

    stopping.remember()  # as for train: obeyed at the end of a sampling step
    _generate_items(args)
    cfg = load_config("generate", args)
    from hvtrain.generate import run as generate
    from hvtrain.generate.stop import Stopped

    try:
        generate.run(cfg)
    except Stopped:
        return REQUEUE
    return 0
