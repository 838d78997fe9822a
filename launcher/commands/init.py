"""init: a config to begin with."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from hvtrain.errors import ConfigError, suggest
from launcher.table import at_least, command

_QUESTIONS = {  # option -> what is asked at a terminal where it is not given
    "model": "architecture", "flavor": "flavor", "dit": "file of the DiT (empty: not yet)",
    "data": "shard set (empty: not yet)", "gpus": "GPUs", "memory": "GiB of memory of one GPU",
    "train": "what is trained: lora or full", "out": "file to write",
}


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "items", nargs="*", metavar="key=value",
        help="any key of the config; what is given here stays as it is"
    )
    add("--model", metavar="NAME", help="architecture (`hvtrain models`)")
    add("--flavor", metavar="NAME", help="its flavor (default: what the DiT's file says, else the first)")
    add("--dit", metavar="FILE", help="the DiT's weights")
    add("--data", metavar="DIR", help="a shard set; its largest clips must fit")
    add("--train", choices=("lora", "full"), help="a LoRA, or all weights (default: lora)")
    add("--gpus", type=int, metavar="N", help="GPUs of the run (default: 1)")
    add("--memory", type=float, metavar="GIB", help="memory of one (default: this machine's GPU, else 80)")
    add(
        "--size", metavar="WxHxF",
        help="of the largest clips, as in 960x544x33 (default: of --data, else the flavor's own)"
    )
    add("--out", metavar="FILE.yaml", help="where to write it (default: train.yaml)")


@command(
    "init", "write a config to begin with, that fits: asks what its options do not say", options=_options
)
def _init(args: argparse.Namespace) -> None:
    from hvtrain.models import all_specs, find

    names = [spec.name for spec in all_specs()]
    default: dict[str, Any] = {"model": names[0], "gpus": 1, "train": "lora", "out": "train.yaml"}
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"architectures: {', '.join(names)}. Return takes what is in brackets.")
        default["model"] = _ask(args, "model", default["model"], names)
        flavors = list(find(default["model"]).flavors)
        print(f"flavors: {', '.join(flavors)}")
        _ask(args, "flavor", flavors[0], flavors)
        for option in ("dit", "data", "gpus", "memory", "train", "out"):
            legal = ("lora", "full") if option == "train" else None
            _ask(args, option, default.get(option, 80 if option == "memory" else ""), legal)
    for option, value in default.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    at_least(args, 1, "gpus")
    out = Path(args.out)
    if out.exists():
        raise ConfigError(f"{out} exists; remove it, or choose another --out")
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a name that ends with .yaml, in a directory that exists")
    from hvtrain.fit.begin import begin
    from shards.atomic import write_text

    text, verdict = begin(
        args.items, model=args.model, flavor=args.flavor or None, dit=args.dit or None,
        data=args.data or None, whole=args.train == "full", gpus=args.gpus, memory_gib=args.memory,
        size=_size(args.size),
    )
    write_text(out, text)
    print(
        f"{out}: {verdict}\nthen: hvtrain {f'launch --nproc {args.gpus} ' if args.gpus > 1 else ''}train "
        f"{out}"
    )


def _ask(args: argparse.Namespace, option: str, default: Any, legal: Any = None) -> Any:
    """Until the answer is one; an option that is given is not asked for."""
    kind = {"gpus": int, "memory": float}.get(option, str)
    while getattr(args, option) is None:
        answer = input(f"{_QUESTIONS[option]} [{default}]: ").strip() or str(default)
        try:
            if legal is not None and answer not in legal:
                raise ConfigError(f"no '{answer}'; {suggest(answer, legal)}")
            setattr(args, option, kind(answer))
        except ConfigError as error:
            print(error)
        except ValueError:
            print(f"'{answer}' is no number")
    return getattr(args, option)


def _size(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise ConfigError(f"--size '{text}': expected width x height x frames, as in 960x544x33")
    return dict(zip(("width", "height", "frames"), map(int, found.groups()), strict=True))
