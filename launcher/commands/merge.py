"""merge."""

from __future__ import annotations

import argparse
from pathlib import Path

from hvtrain.errors import ConfigError
from launcher.table import command


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dit", default="", metavar="FILE", help="the model: a file, a sharded index or a directory")
    add("--lora", action="append", default=[], metavar="PATH",
        help="a LoRA file or the directory of a finished run; may be repeated")
    add("--multiplier", action="append", type=float, metavar="X",
        help="one for each --lora, in order, or one for all (default 1.0); 0 switches it off")
    add("--plan", metavar="FILE", help="plan.json: all its slices")
    add("--slices", metavar="DIR", help="where the slices' runs are: 01, 02, ... (default: beside the plan)")
    add("--allow-missing", action="store_true", help="merge the slices that are finished")
    add("--any-base", action="store_true", help="accept LoRAs that were trained on other weights")
    add("--output", required=True, metavar="PATH", help="the .safetensors file to write; a directory for a sharded model")
    add("--as", dest="target", default="model", metavar="KIND", help="model (default), or lora: one LoRA of all")
    add("--rank", type=int, metavar="R", help="for --as lora: cut to this rank by SVD (default: ranks add up, exact)")
    add("--on-overlap", default="error", metavar="POLICY",
        help="rows that several LoRAs change: error (default), sum, average, ties, dare, orthogonal, priority (first wins)")
    add("--density", type=float, metavar="X", help="for ties (default 0.2) and dare (0.5): the share of elements kept")
    add("--seed", type=int, default=0, metavar="N", help="for dare")
    add("--dtype", metavar="NAME", help="bfloat16, float16 or float32 (default: each tensor keeps its own)")
    add("--max-shard-gb", type=float, metavar="X", help="cut the model into files of at most X GB")
    add("--device", default="cpu", metavar="NAME", help="where sums are computed: cpu (default) or cuda")
    add("--evaluate", action="append", default=[], metavar="SET",
        help="report the held-out loss on this shard set: base, each LoRA alone, merged")


@command("merge", "LoRAs or all slices of a plan into a model or one LoRA, and the proof that none overwrote another",
         options=_options)
def _merge(args: argparse.Namespace) -> None:
    from hvtrain.config import LoraFileConfig, MergeConfig

    if not args.lora and args.plan is None:
        raise ConfigError("merge: nothing to merge; give --lora PATH, or --plan FILE")
    factors = args.multiplier or [1.0]
    if len(factors) == 1 and len(args.lora) != 1:
        factors = factors * len(args.lora)
    if len(factors) != len(args.lora):
        raise ConfigError(f"{len(args.lora)} --lora but {len(factors)} --multiplier; give one for each, in order, or one for all")
    if args.target not in ("model", "lora"):
        raise ConfigError(f"--as {args.target}: expected model or lora")
    for path in args.evaluate:
        if not Path(path).is_dir():
            raise ConfigError(f"--evaluate {path}: no such shard set")
    cfg = MergeConfig(
        dit=args.dit, lora=tuple(LoraFileConfig(path=p, multiplier=m) for p, m in zip(args.lora, factors, strict=True)),
        plan=args.plan, slices=args.slices, allow_missing=args.allow_missing, any_base=args.any_base, output=args.output,
        target=args.target, rank=args.rank, on_overlap=args.on_overlap, density=args.density, seed=args.seed,
        dtype=args.dtype, max_shard_gb=args.max_shard_gb, device=args.device, evaluate=tuple(args.evaluate),
    )
    from hvtrain.adapters import merge

    evaluate = None
    if cfg.evaluate:
        from hvtrain.train.compare import losses_of

        evaluate = losses_of(cfg)
    merge.run(cfg, evaluate)
