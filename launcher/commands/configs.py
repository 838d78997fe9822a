"""import, config: configs of other trainers in ours, and what ours can say."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from hvtrain.errors import ConfigError
from hvtrain.registry import Registry
from launcher.table import GROUPS, command, split_items

GROUPS["import"] = "the config of another trainer in ours, with a line for every option"

_TOOLS = {
    "musubi": (
        "musubi-tuner's command lines, each in quotes; or files with one, or its config TOML",
        "COMMAND | FILE"
    ),
    "diffusion-pipe": ("diffusion-pipe's config TOML, or the command line that names it; with its dataset "
    "TOML", "FILE.toml"),
    "ai-toolkit": ("ai-toolkit's job YAML; its datasets go along", "FILE.yaml"),
}


def _import_options(tool: str) -> Callable[[argparse.ArgumentParser], None]:
    def options(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        # A command line has options of its own: it may stand without quotes, as it was typed there.
        add(
            "sources", nargs=argparse.REMAINDER if tool == "musubi" else "+", metavar=_TOOLS[tool][1],
            help=_TOOLS[tool][0]
        )
        about = "write it there, with FILE-encode.yaml (and FILE-dataset.yaml) beside it (default: print it)"
        add("--out", metavar="FILE.yaml", help=about)
        add(
            "--model", metavar="NAME",
            help="which model it is, where nothing in the config says so (`hvtrain models`)"
        )
        add(
            "--shards", metavar="DIR",
            help="where the encoded clips are, or will be (default: in the output's folder)"
        )

    return options


def _import(tool: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        """1 if an option could not be carried over."""
        if tool == "musubi":
            args.sources = _as_typed(args)
        if args.out is not None and not args.out.endswith((".yaml", ".yml")):
            raise ConfigError(f"--out {args.out}: expected a name that ends with .yaml")
        from hvtrain.elsewhere.run import convert

        name = str(Path(args.out).with_suffix("")) if args.out else "lora"
        found = convert(tool, args.sources, model=args.model, shards=args.shards, name=name)
        if args.out is None:
            print(found.train, end="")
            more = "; with --out FILE.yaml also the config of encoding" if found.encode else ""
            for said in (*found.lost, found.summary() + more):
                print(said, file=sys.stderr)
        else:
            _write(
                {
                    args.out: found.train, f"{name}-encode.yaml": found.encode,
                    f"{name}-dataset.yaml": found.dataset
                }
            )
            for line in (*found.lines, f"{args.out}: {found.summary()}"):
                print(line)
            start = "hvtrain" if found.gpus == 1 else f"hvtrain launch --nproc {found.gpus}"
            encode = f"{start} encode {name}-encode.yaml && " if found.encode else ""
            print(f"then: {encode}{start} train {args.out}")
        return 1 if found.lost else 0

    return run


def _as_typed(args: argparse.Namespace) -> list[str]:
    """The command lines. Our own options may stand behind them; a line without
    quotes is put together again."""
    words = list(args.sources)
    for name in ("out", "model", "shards"):
        for i in [i for i, word in enumerate(words) if word.partition("=")[0] == f"--{name}"][::-1]:
            _, sign, value = words[i].partition("=")
            if not sign and i + 1 == len(words):
                raise ConfigError(f"--{name}: expected a value")
            setattr(args, name, value if sign else words[i + 1])
            del words[i : i + 2 - bool(sign)]
    if not words:
        raise ConfigError(
            "import musubi: give its command line, as in `import musubi \"accelerate launch ...\"`, or a file"
        )
    return [shlex.join(words)] if any(word.startswith("-") and " " not in word for word in words) else words


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


_CONFIG_WORDS = (
    "[train | encode | generate | merge] | show NAME [CONFIG.yaml] [key=value ...] | schema [NAME]"
)


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar=_CONFIG_WORDS, help=(
        "nothing or a command's name: every key with its default; show: the values that a config comes to, "
        "and where each is from; schema: a JSON Schema for editors (default: of train)"
    ))  # fmt: skip


@command(
    "config",
    "every key of a command's config; the values of a config and where each is from; a JSON Schema for "
    "editors",
    options=_config_options, prints=True
)
def _config(args: argparse.Namespace) -> None:
    first, *rest = args.words or [None]
    if first == "show":
        print(_shown(rest), end="")
    elif first == "schema" and len(rest) < 2:
        import json

        from hvtrain.config.schema import schema

        name = rest[0] if rest else "train"
        print(json.dumps(schema(_root(name), title=f"hvtrain {name}"), indent=1, ensure_ascii=False))
    elif rest:
        raise ConfigError(
            f"config: '{rest[0]}' is too much; `hvtrain config show {first} {rest[0]}` shows a config's "
            "values"
        )
    else:
        print(reference_text(first), end="")


def _root(name: str) -> type:
    from hvtrain import config

    return Registry("config", config.ROOTS).find(name, key="hvtrain config")


def reference_text(name: str | None = None) -> str:
    """The keys of one command as YAML that loads, or of all as one YAML document each."""
    from hvtrain import config

    if name is not None:
        return config.reference(_root(name))
    head = "# Every key with its default and meaning. Generated: hvtrain config > configs/reference.yaml\n"
    return head + "".join(f"--- # hvtrain {n}\n{config.reference(root)}" for n, root in config.ROOTS.items())


def _shown(words: list[str]) -> str:
    """YAML that loads: every key, with its origin behind it."""
    if not words:
        raise ConfigError(
            "config show: of which command? As in `hvtrain config show train CONFIG.yaml optim.lr=1e-4`"
        )
    from hvtrain.config import ModelConfig
    from hvtrain.config.origins import DEFAULT, effective
    from hvtrain.config.write import commented

    cls, (path, overrides) = _root(words[0]), split_items(words[1:])
    found = effective(cls, path, overrides)
    values, origins = dict(found.values), dict(found.origins)
    head = []
    if isinstance(getattr(found.config, "model", None), ModelConfig):
        from hvtrain.fit.effective import of_model

        own, which = of_model(found.config.model, values)
        values |= own
        origins |= dict.fromkeys(own, which)
        head = [] if own else [f"null: {which}"]
    given = sum(origin != DEFAULT for origin in origins.values())
    return commented(
        values, origins, cls, head=[f"{given} of {len(values)} values are not the defaults", *head]
    )
