"""lora: look at LoRA files, convert, cut, extract and average them."""

from __future__ import annotations

import argparse
import math

from hvtrain.errors import ConfigError
from launcher.table import GROUPS, command

GROUPS["lora"] = "look at LoRA files, convert, cut, extract and average them"


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="a LoRA file of any dialect, or the directory of a finished run"
    )
    parser.add_argument(
        "--dit", metavar="FILE", help="the model it belongs to (default: the known models' sizes are tried)"
    )
    parser.add_argument(
        "--expert", metavar="NAME", help="of a model of several: whose LoRA is meant, or this is"
    )


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help="the .safetensors file to write")


@command("lora info", "dialect, layers, rank, alpha, blocks, LORAID, norms", options=_file, prints=True)
def _info(args: argparse.Namespace) -> None:
    from hvtrain.lorafiles import tools

    for line in tools.info(args.file, dit=args.dit, expert=args.expert):
        print(line)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    _file(parser)
    _output(parser)
    names = "musubi (also sd-scripts), comfyui, diffusers (also PEFT) or diffusion-pipe"
    parser.add_argument("--to", required=True, metavar="DIALECT", help=names)
    how = parser.add_mutually_exclusive_group()
    about = (
        "multiply alpha / rank into the up-projection (default for diffusers; always so for diffusion-pipe)"
    )
    how.add_argument("--fold-alpha", action="store_true", help=about)
    how.add_argument(
        "--keep-alpha", action="store_true", help="leave alpha as it is (default for musubi and comfyui)"
    )
    parser.add_argument("--edited", action="store_true",
        help="another program changed the file and left its checksum: do not compare it, write a new one")


@command(
    "lora convert", "between musubi / sd-scripts, ComfyUI, diffusers / PEFT and diffusion-pipe",
    options=_convert_options
)
def _convert(args: argparse.Namespace) -> None:
    from hvtrain.lorafiles import tools

    fold = True if args.fold_alpha else False if args.keep_alpha else None
    print(tools.convert(
        args.file, args.output, target=args.to, fold=fold, dit=args.dit, edited=args.edited,
        expert=args.expert
    ))  # fmt: skip


def _resize_options(parser: argparse.ArgumentParser) -> None:
    _file(parser)
    _output(parser)
    parser.add_argument("--rank", type=int, metavar="R", help="the new rank of every layer")
    about = "or: the smallest rank that keeps this share of the squared norm"
    parser.add_argument("--energy", type=float, metavar="X", help=about)


@command("lora resize", "cut to a smaller rank by SVD; says what is lost", options=_resize_options)
def _resize(args: argparse.Namespace) -> None:
    from hvtrain.lorafiles import tools

    for line in tools.resize(
        args.file, args.output, rank=args.rank, energy=args.energy, dit=args.dit, expert=args.expert
    ):
        print(line)


def _extract_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuned", metavar="TUNED", help="the fine-tuned model")
    parser.add_argument("base", metavar="BASE", help="the model it was made from")
    _output(parser)
    parser.add_argument("--rank", type=int, default=32, metavar="R", help="rank of every layer (default: 32)")


@command(
    "lora extract", "the difference of two models as a LoRA, by SVD; says what is lost",
    options=_extract_options
)
def _extract(args: argparse.Namespace) -> None:
    from hvtrain.lorafiles import tools

    for line in tools.extract(args.tuned, args.base, args.output, rank=args.rank):
        print(line)


def _ema_options(parser: argparse.ArgumentParser) -> None:
    about = (
        "checkpoints, oldest first; or one of a run's (its siblings are found); or a directory (sub-folders "
        "too)"
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help=about)
    _output(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--sigma-rel", type=float, metavar="S",
        help="power-function profile of this relative width, e.g. 0.15"
    )
    how.add_argument("--beta", type=float, metavar="B", help="constant decay per checkpoint (default: 0.95)")
    parser.add_argument(
        "--beta2", type=float, metavar="B", help="with --beta: the decay at the last merge, linear in between"
    )


@command("lora ema", "post-hoc moving average of a run's checkpoints", options=_ema_options)
def _ema(args: argparse.Namespace) -> None:
    from hvtrain.lorafiles import average

    if args.sigma_rel is not None and args.beta2 is not None:
        raise ConfigError("--beta2 goes with --beta, not with --sigma-rel")
    beta = 0.95 if args.beta is None else args.beta
    for name, value in (("--beta", beta), ("--beta2", args.beta2)):
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{name} {value}: expected 0 or more and less than 1")
    files = average.checkpoints(args.paths, output=args.output)
    if args.sigma_rel is not None:
        profile = average.power(args.sigma_rel)
    else:
        profile = average.constant(beta) if args.beta2 is None else average.linear(beta, args.beta2)
    made = average.average(files, average.weights_of(profile, len(files)), args.output)
    for path, share in zip(made.files, made.weights, strict=True):
        print(f"{share:8.4f}  {path}")
    print(f"{args.output}: average of {len(files)} files")


def _average_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="two or more LoRA files with the same layers and alphas"
    )
    _output(parser)
    parser.add_argument(
        "--weight", action="append", type=float, metavar="X",
        help="one for each file, in order (default: equal)"
    )
    parser.add_argument(
        "--democratic", action="store_true", help="a layer counts over the files that hold it: for two slices"
    )


@command(
    "lora average", "blend LoRA files: up- and down-projections averaged one by one", options=_average_options
)
def _average(args: argparse.Namespace) -> None:
    from hvtrain.lorafiles import average

    if len(args.files) < 2:
        raise ConfigError("lora average: give two or more files")
    weights = args.weight or [1.0] * len(args.files)
    if len(weights) != len(args.files):
        raise ConfigError(f"{len(args.files)} files but {len(weights)} --weight; give one for each, in order")
    if not (0 < sum(weights) < math.inf and all(w >= 0 for w in weights)):
        raise ConfigError(f"--weight {weights}: expected finite numbers, 0 or more, and not all 0")
    shares = [w / sum(weights) for w in weights]
    average.average(average.checkpoints(args.files), shares, args.output, democratic=args.democratic)
    print(f"{args.output}: average of {len(args.files)} files")
