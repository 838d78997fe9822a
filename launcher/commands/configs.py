"""import, config: configs of other trainers in ours, and what ours can say."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from hvtrain.errors import ConfigError
from launcher.table import GROUPS, command

GROUPS["import"] = "the config of another trainer in ours, with a line for every option"

_TOOLS = {
    "musubi": ("musubi-tuner's command lines, each in quotes; or files with one, or its config TOML", "COMMAND | FILE"),
    "diffusion-pipe": ("diffusion-pipe's config TOML, or the command line that names it; its dataset TOML goes along", "FILE.toml"),
    "ai-toolkit": ("ai-toolkit's job YAML; its datasets go along", "FILE.yaml"),
}


def _import_options(tool: str) -> Callable[[argparse.ArgumentParser], None]:
    def options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("sources", nargs="+", metavar=_TOOLS[tool][1], help=_TOOLS[tool][0])
        add("--out", metavar="FILE.yaml", help="write it there, with FILE-encode.yaml (and FILE-dataset.yaml) beside it (default: print it)")
        add("--model", metavar="NAME", help="which model it is, where nothing in the config says so (`hvtrain models`)")
        add("--shards", metavar="DIR", help="where the encoded clips are, or will be (default: in the output's folder)")

    return options


def _import(tool: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        """1 if an option could not be carried over."""
        if args.out is not None and not args.out.endswith((".yaml", ".yml")):
            raise ConfigError(f"--out {args.out}: expected a name that ends with .yaml")
        from hvtrain.elsewhere.run import convert

        name = str(Path(args.out).with_suffix("")) if args.out else "lora"
        found = convert(tool, args.sources, model=args.model, shards=args.shards, name=name)
        if args.out is None:
            print(found.train, end="")
            print(f"{found.summary()}{'' if found.encode is None else '; with --out FILE.yaml also the config of encoding'}", file=sys.stderr)
            for line in found.lost:
                print(line, file=sys.stderr)
        else:
            _write({args.out: found.train, f"{name}-encode.yaml": found.encode, f"{name}-dataset.yaml": found.dataset})
            for line in (*found.lines, f"{args.out}: {found.summary()}"):
                print(line)
            start = "hvtrain" if found.gpus == 1 else f"hvtrain launch --nproc {found.gpus}"
            encode = f"{start} encode {name}-encode.yaml && " if found.encode else ""
            print(f"then: {encode}{start} train {args.out}")
        return 1 if found.lost else 0

    return run


def _write(files: dict[str, str | None]) -> None:
    """All of them or none: what is there is never written over."""
    from shards.atomic import write_text

    wanted = {Path(name): text for name, text in files.items() if text is not None}
    for path in wanted:
        if path.exists():
            raise ConfigError(f"{path} exists; remove it, or choose another --out")
        if not path.parent.is_dir():
            raise ConfigError(f"--out {path}: there is no directory {path.parent}")
    for path, text in wanted.items():
        write_text(path, text)


for _tool in _TOOLS:
    command(f"import {_tool}", f"{_TOOLS[_tool][0]}; exit code 1 if something could not be carried over",
            options=_import_options(_tool))(_import(_tool))
