"""The table of commands and the parser made of it. A command's own code is imported when
it runs: --help is instant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hvtrain.errors import ConfigError, suggest
from launcher.exits import USER_ERROR

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Command:
    """One entry of the table. `check` finds the mistakes that need no model, so that
    `launch` starts no process."""

    name: str  # "train", or a group and its command: "shards info"
    about: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    check: Callable[[argparse.Namespace], object] | None = None  # None: cannot run as several processes
    # its result is what it prints: it ends when nobody reads on; others finish their work
    prints: bool = False


COMMANDS: dict[str, Command] = {}
GROUPS: dict[str, str] = {}  # name -> about


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line look like all other mistakes: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The namespace of one command line; its `command` is a key of COMMANDS."""
    from hvtrain import __version__

    parser = Parser(prog="hvtrain", description="Train, merge and sample video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"hvtrain {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    groups: dict[str, tuple[Parser, argparse._SubParsersAction]] = {}
    leaves: dict[str, Parser] = {}
    for command in COMMANDS.values():
        group, _, name = command.name.rpartition(" ")
        if group and group not in groups:
            part = commands.add_parser(group, help=GROUPS[group], description=GROUPS[group])
            groups[group] = part, part.add_subparsers(dest="inner", metavar="COMMAND", parser_class=Parser)
        place = groups[group][1] if group else commands
        leaves[command.name] = leaf = place.add_parser(name, help=command.about, description=command.about)
        command.options(leaf)
    if not arguments:
        parser.print_help()
        raise SystemExit(USER_ERROR)
    _known(arguments, {name: part for name, (part, _) in groups.items()})
    words = 2 if arguments[0] in groups else 1
    leaf = leaves.get(" ".join(arguments[:words]), parser)
    if leaf is parser:
        return parser.parse_args(arguments)  # --help, --version
    return _parse_leaf(leaf, arguments[words:], argparse.Namespace(command=" ".join(arguments[:words])))


def _parse_leaf(leaf: Parser, arguments: Sequence[str], found: argparse.Namespace) -> argparse.Namespace:
    """Options may stand anywhere, also between positionals; but what follows `launch ...
    COMMAND` belongs to that command."""
    whole = any(action.nargs == argparse.REMAINDER for action in leaf._actions)
    if whole or "-h" in arguments or "--help" in arguments:
        return leaf.parse_args(arguments, found)
    found, extra = leaf.parse_known_intermixed_args(arguments, found)
    unknown = [word.partition("=")[0] for word in extra if word.startswith("-")]
    if unknown:
        near = suggest(unknown[0], leaf._option_string_actions)
        leaf.error(f"unknown option {unknown[0]}" + (f", {near}" if near.startswith("did you mean") else ""))
    if extra:
        leaf.error(f"unexpected argument '{extra[0]}'")
    return found


def _known(arguments: Sequence[str], groups: dict[str, Parser]) -> None:
    """An unknown command is answered with the nearest one."""
    first = arguments[0]
    singles = [name for name in COMMANDS if " " not in name]
    if not first.startswith("-") and first not in singles and first not in groups:
        raise ConfigError(f"no command '{first}'; {suggest(first, [*singles, *groups])}")
    if first not in groups:
        return
    if len(arguments) == 1:
        groups[first].print_help()
        raise SystemExit(USER_ERROR)
    inner = [name.split(" ")[1] for name in COMMANDS if name.startswith(f"{first} ")]
    if not arguments[1].startswith("-") and arguments[1] not in inner:
        raise ConfigError(f"no command '{first} {arguments[1]}'; {suggest(arguments[1], inner)}")


def command(
    name: str, about: str, *, options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    check: Callable[[argparse.Namespace], object] | None = None, prints: bool = False,
) -> Callable:
    """Put the function below into the table."""

    def register(run: Callable[[argparse.Namespace], int | None]) -> Callable:
        COMMANDS[name] = Command(name, about, options, run, check, prints)
        return run

    return register


def config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items", nargs="*", metavar="CONFIG.yaml | key=value",
        help="a YAML file, and single keys that win over it (`hvtrain config` lists them)",
    )


def split_items(items: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config file, if one is given, and the key=value items."""
    files = [item for item in items if not OVERRIDE.match(item)]
    if len(files) > 1:
        raise ConfigError(
            f"one config file expected, got {' and '.join(files)}; single values are given as key=value"
        )
    return (files[0] if files else None), [item for item in items if OVERRIDE.match(item)]


def load_config(name: str, args: argparse.Namespace):
    """The config of a command from `[CONFIG.yaml] [key=value ...]`."""
    from hvtrain import config

    return config.load(config.ROOTS[name], *split_items(args.items))


def at_least(args: argparse.Namespace, least: int, *options: str) -> None:
    """Refuse numbers that are too small. Raises ConfigError."""
    for option in options:
        if (value := getattr(args, option)) is not None and value < least:
            raise ConfigError(f"--{option.replace('_', '-')} {value}: expected {least} or more")
