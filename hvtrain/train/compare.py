"""Held-out losses around a merge: of the base, of each LoRA alone, and of all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from hvtrain.adapters.lora import merge_all
from hvtrain.adapters.mergeinputs import Inputs
from hvtrain.adapters.pairs import add_pairs
from hvtrain.adapters.policies import Dense, Result
from hvtrain.config import EvalConfig, FlowConfig, MergeConfig, asset
from hvtrain.flow.timesteps import quantile_function
from hvtrain.models.load import LoadedDit, load_dit
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import start
from hvtrain.train.evaluate import HeldOut, held_out_loss
from hvtrain.train.objective import Objective
from hvtrain.train.setup import open_shards

MAX_BATCHES = 32


def losses_of(cfg: MergeConfig) -> Callable[[Inputs, Mapping[str, Result]], dict[str, float]]:
    """For merge.run: name -> loss at fixed noise levels and seeds, all on the same samples."""

    def measure(inputs: Inputs, combined: Mapping[str, Result]) -> dict[str, float]:
        ctx = start(device=None if cfg.device == "cuda" else "cpu")
        loaded = load_dit(asset(cfg.dit), model=cfg.model, dtype=torch.float32, device=ctx.device)
        parallelize(loaded.model, ctx, kernel="auto", recompute="none", dtype=torch.float32)
        original = {n: p.detach().clone() for n, p in loaded.model.named_parameters() if n.endswith(".weight")}
        result = {"base": _loss(cfg, loaded, ctx)}
        for lora, multiplier in inputs.loras:
            merge_all(loaded.model, [(lora, multiplier)])
            result[lora.path.name] = _loss(cfg, loaded, ctx)
            _restore(loaded.model, original, lora.pairs)
        for module, found in combined.items():
            _apply(loaded.model.get_submodule(module), found)
        result["merged"] = _loss(cfg, loaded, ctx)
        return result

    return measure


def _apply(layer: nn.Module, found: Result) -> None:
    weight = layer.get_parameter("weight").data
    if isinstance(found, Dense):
        weight += found.delta().to(weight)
    else:
        add_pairs(weight, [(c.pair, c.multiplier) for c in found])


def _restore(model: nn.Module, original: Mapping[str, torch.Tensor], modules: Sequence[str] | Mapping[str, object]) -> None:
    for module in modules:
        model.get_parameter(f"{module}.weight").data.copy_(original[f"{module}.weight"])


def _loss(cfg: MergeConfig, loaded: LoadedDit, ctx) -> float:
    flow, flavor, fixed = FlowConfig(), loaded.flavor, EvalConfig()
    objective = Objective(
        loaded.spec, flavor.tasks[0], flow.guidance, quantile_function(flow.timestep_sampling, flow), ctx.device, False
    )
    held = HeldOut(open_shards(cfg.evaluate, flavor, key="--evaluate"), 1, fixed.quantiles, MAX_BATCHES)
    return held_out_loss(loaded.model.eval(), objective, held, ctx=ctx)["eval/loss"]
