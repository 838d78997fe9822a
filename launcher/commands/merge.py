"""merge."""

from __future__ import annotations

import argparse

from hvtrain.errors import ConfigError
from launcher.table import command


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
