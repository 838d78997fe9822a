"""merge."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

from hvtrain.errors import ConfigError
from launcher.table import command, config_options, load_config


def _options(parser: argparse.ArgumentParser) -> None:
    """Every option is a key of the config, and wins over it; one that is not given is None."""
    config_options(parser)
    add = parser.add_argument
    add("--dit", metavar="FILE", help="the model: a file, a sharded index or a directory")
    add("--lora", action="append", metavar="PATH",
        help="a LoRA file or the directory of a finished run; may be repeated")
    add("--multiplier", action="append", type=float, metavar="X",
        help="one for each --lora, in order, or one for all (default 1.0); 0 switches it off")
    add("--plan", metavar="FILE", help="plan.json: all its slices")
    add("--slices", metavar="DIR", help="where the slices' runs are: 01, 02, ... (default: beside the plan)")
    add("--allow-missing", action="store_true", default=None, help="merge the slices that are finished")
    add(
        "--expert", metavar="NAME",
        help="of a model of several: whose LoRAs, where a file or a run holds one for each"
    )
    add(
        "--any-base", action="store_true", default=None,
        help="accept LoRAs that were trained on other weights"
    )
    add("--output", metavar="PATH", help="the .safetensors file to write; a directory for a sharded model")
    add("--as", dest="target", metavar="KIND", help="model (default), or lora: one LoRA of all")
    add(
        "--rank", type=int, metavar="R",
        help="for --as lora: cut to this rank by SVD (default: ranks add up, exact)"
    )
    add("--on-overlap", metavar="POLICY",
        help="rows that several LoRAs change: error (default), sum, average, ties, dare, orthogonal, "
        "priority (first wins)")
    add("--reconcile", metavar="HOW",
        help="by what each LoRA does to samples of its own data: fit, distill or fit+distill, which computes "
        "with the model (default: fit+distill of several that each have samples, if --on-overlap is not "
        "given, else none)")
    add("--samples", action="append", metavar="SET",
        help="for --reconcile: a shard set for each --lora, in order (default: calibration/ beside each)")
    add("--keep", action="append", metavar="SET",
        help="for --reconcile: what the base knows and the merge must not change: a shard set, or captions "
        "one a line (.txt)")
    add(
        "--density", type=float, metavar="X",
        help="for ties (default 0.2) and dare (0.5): the share of elements kept"
    )
    add("--seed", type=int, metavar="N", help="for dare")
    add("--dtype", metavar="NAME", help="bfloat16, float16 or float32 (default: each tensor keeps its own)")
    add("--max-shard-gb", type=float, metavar="X", help="cut the model into files of at most X GB")
    add("--device", metavar="NAME",
        help="where it computes: cpu or cuda (default: a GPU, if there is one, for what runs the model; else "
        "the CPU)")
    add("--evaluate", action="append", metavar="SET",
        help="report the held-out loss on this shard set: base, each LoRA alone, merged")


def _check(args: argparse.Namespace) -> None:
    from hvtrain.config.rules import check_merge

    cfg = _config(args)
    if cfg.reconcile.how in ("auto", "none") and not cfg.evaluate:
        raise ConfigError(
            "launch: a merge has nothing to share unless it is asked to compute: give --reconcile "
            "fit+distill, or --evaluate, or leave `launch` away"
        )
    check_merge(cfg)


@command(
    "merge",
    "LoRAs or all slices of a plan into a model or one LoRA, and the proof that none overwrote another",
    options=_options, check=_check
)
def _merge(args: argparse.Namespace) -> None:
    cfg = _config(args)
    from hvtrain.merge import run as merge

    merge.run(cfg)


def _config(args: argparse.Namespace):
    """`[CONFIG.yaml] [key=value ...]`, then the options."""
    from hvtrain.config import LoraFileConfig

    cfg = load_config("merge", args)
    paths = [entry.path for entry in cfg.lora] if args.lora is None else args.lora
    if args.lora is not None or args.multiplier is not None:
        factors = args.multiplier or [1.0]
        if len(factors) == 1:
            factors = factors * len(paths)
        if len(factors) != len(paths):
            raise ConfigError(
                f"{len(paths)} --lora but {len(factors)} --multiplier; give one for each, in order, or one "
                "for all"
            )
        args.lora = tuple(LoraFileConfig(path=p, multiplier=m) for p, m in zip(paths, factors, strict=True))
    if args.evaluate is not None:
        args.evaluate = tuple(args.evaluate)
    own = {"how": args.reconcile, "samples": args.samples, "keep": args.keep}
    own = {
        name: tuple(value) if isinstance(value, list) else value for name,
        value in own.items() if value is not None
    }
    args.reconcile = replace(cfg.reconcile, **own)
    given = {field.name: getattr(args, field.name, None) for field in fields(cfg)}
    return replace(cfg, **{name: value for name, value in given.items() if value is not None})
