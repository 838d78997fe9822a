"""The command line: a table of commands. What a command needs is imported when it runs, so that --help is instant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hvtrain.errors import ConfigError, LaunchError, suggest
from launcher.report import USER_ERROR, guarded

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Command:
    """One entry of the table. `check` finds the mistakes that need no model, so that `launch` starts no process."""

    name: str
    about: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    check: Callable[[argparse.Namespace], object] | None = None  # None: cannot run as several processes


COMMANDS: dict[str, Command] = {}


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line look like all other mistakes: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. The console script and launcher.worker end with it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int | None:
    args = parse(arguments)
    return COMMANDS[args.command].run(args)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from hvtrain import __version__

    parser = Parser(prog="hvtrain", description="Train, merge and sample video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"hvtrain {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS.values():
        part = commands.add_parser(command.name, help=command.about, description=command.about)
        command.options(part)
    if not arguments:
        parser.print_help()
        raise SystemExit(USER_ERROR)
    first = arguments[0]
    if not first.startswith("-") and first not in COMMANDS:
        raise ConfigError(f"no command '{first}'; {suggest(first, COMMANDS)}")
    return parser.parse_args(arguments)


def command(
    name: str,
    about: str,
    *,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    check: Callable[[argparse.Namespace], object] | None = None,
) -> Callable:
    """Put the function below into the table."""

    def register(run: Callable[[argparse.Namespace], int | None]) -> Callable:
        COMMANDS[name] = Command(name, about, options, run, check)
        return run

    return register


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="a YAML file, and single keys that win over it (`hvtrain config` lists them)",
    )


def _load(name: str, args: argparse.Namespace):
    """The config of a command from `[CONFIG.yaml] [key=value ...]`."""
    from hvtrain import config

    files = [item for item in args.items if not OVERRIDE.match(item)]
    if len(files) > 1:
        raise ConfigError(f"one config file expected, got {' and '.join(files)}; single values are given as key=value")
    overrides = [item for item in args.items if OVERRIDE.match(item)]
    return config.load(config.ROOTS[name], files[0] if files else None, overrides)


def _check(name: str) -> Callable[[argparse.Namespace], None]:
    """The rules of a config that need no model, applied before processes are started."""

    def check(args: argparse.Namespace) -> None:
        from hvtrain import validate

        rules: dict[str, Callable] = {
            "encode": validate.check_encode,
            "train": validate.check_train,
            "generate": validate.check_generate,
        }
        rules[name](_load(name, args))

    return check


@command("encode", "encode clips and captions into shards", options=_config_options, check=_check("encode"))
def _encode(args: argparse.Namespace) -> None:
    cfg = _load("encode", args)
    from hvtrain import encode

    encode.run(cfg)


@command("train", "train a LoRA or the whole model on shards", options=_config_options, check=_check("train"))
def _train(args: argparse.Namespace) -> int | None:
    cfg = _load("train", args)
    from hvtrain import train

    return train.run(cfg)


@command("generate", "make videos from prompts", options=_config_options, check=_check("generate"))
def _generate(args: argparse.Namespace) -> None:
    cfg = _load("generate", args)
    from hvtrain import generate

    generate.run(cfg)


def _merge_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dit", required=True, metavar="FILE", help="the model: a file, a sharded index or a directory")
    add("--lora", action="append", required=True, metavar="FILE", help="may be given several times")
    add("--multiplier", action="append", type=float, metavar="X", help="one for each --lora, in order (default 1.0)")
    add("--output", required=True, metavar="FILE", help="the safetensors file to write")
    add("--dtype", metavar="NAME", help="bfloat16, float16 or float32 (default: each tensor keeps its own)")


@command("merge", "add LoRAs to a model file, tensor by tensor", options=_merge_options)
def _merge(args: argparse.Namespace) -> None:
    from hvtrain.config import LoraFileConfig, MergeConfig

    factors = args.multiplier or [1.0] * len(args.lora)
    if len(factors) != len(args.lora):
        raise ConfigError(f"{len(args.lora)} --lora but {len(factors)} --multiplier; give one for each, in order")
    loras = tuple(LoraFileConfig(path=p, multiplier=m) for p, m in zip(args.lora, factors, strict=True))
    cfg = MergeConfig(dit=args.dit, lora=loras, output=args.output, dtype=args.dtype)
    from hvtrain.adapters import merge

    merge.run(cfg)


def _launch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nproc", type=int, required=True, help="processes on this machine: one per GPU")
    add("--nnodes", type=int, default=1, help="machines; start this command on each of them")
    add("--node-rank", type=int, default=0, help="which of them this is, from 0")
    add("--master-addr", default="127.0.0.1", help="host name of machine 0")
    add("--master-port", type=int, help="a free port on machine 0 (one machine: chosen)")
    about = "encode, train or generate, and its own arguments"
    add("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=about)


@command("launch", "run a command as several processes", options=_launch_options)
def _launch(args: argparse.Namespace) -> int:
    inner = [a for i, a in enumerate(args.arguments) if not (i == 0 and a == "--")]
    able = [c.name for c in COMMANDS.values() if c.check]
    if not inner or inner[0] not in able:
        given = f"'{inner[0]}'" if inner else "nothing"
        raise LaunchError(f"launch: cannot start {given} as several processes; {suggest(given.strip(chr(39)), able)}")
    parsed = parse(inner)
    check = COMMANDS[parsed.command].check
    assert check is not None
    check(parsed)
    from launcher import local

    topology = local.Topology(
        nproc=args.nproc,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
    )
    return local.launch(inner, topology)


def _models_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=["keys"], help="list a model's parameters and their shapes")
    parser.add_argument("name", nargs="?", help="of which model")
    parser.add_argument("--flavor", help="of which of its flavors (default: the first)")


@command("models", "list the architectures and their sizes", options=_models_options)
def _models(args: argparse.Namespace) -> None:
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


@command("config", "print every key of a command's config with default and meaning", options=_config_command_options)
def _config(args: argparse.Namespace) -> None:
    print(reference_text(args.name), end="")


def reference_text(name: str | None = None) -> str:
    """The keys of one command as YAML that loads, or of all as one YAML document each."""
    from hvtrain import config

    if name is not None and name not in config.ROOTS:
        raise ConfigError(f"no config '{name}'; {suggest(name, config.ROOTS)}")
    if name is not None:
        return config.reference(config.ROOTS[name])
    head = "# Every key with its default and meaning. Generated: hvtrain config > configs/reference.yaml\n"
    return head + "".join(f"--- # hvtrain {n}\n{config.reference(root)}" for n, root in config.ROOTS.items())


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo", metavar="DIR", help="where everything goes (default: demo/)")


@command("demo", "the whole road on a tiny model: encode, train, generate, merge", options=_demo_options)
def _demo(args: argparse.Namespace) -> int | None:
    from hvtrain.tiny import demo

    return demo.run(args.output)


@command("doctor", "check this machine: packages, GPUs, memory, disk")
def _doctor(args: argparse.Namespace) -> int:
    from launcher import doctor

    return doctor.run()


if __name__ == "__main__":
    sys.exit(main())
