"""Optimizers: one decorated function each, or any class by its path.

ZeRO 1 to 3 step flat pieces of the parameters, cut anywhere: only an optimizer that treats each number by
itself is the same optimizer there. Those that look at whole matrices, or at all parameters together, say
so in the table and are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvtrain.config import OptimConfig, ZeroConfig
from hvtrain.errors import ConfigError, suggest
from hvtrain.registry import Registry
from hvtrain.train.optstate import settings_of
from hvtrain.train.schedules import check_schedule

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    make: Callable[[Groups, OptimConfig], Optimizer]
    whole: str = ""  # why it needs whole parameters on a rank
    least_lr: float = 0.0  # a smaller rate is a misunderstanding
    one_rate: bool = False  # takes the first group's for all
    state_bytes: float = 8.0  # per trained value
    matrices: bool = False  # groups marked "hidden" hold the blocks' matrices


OPTIMIZERS: Registry[Kind] = Registry("optimizer", also=("a.class.path",))
HIDDEN = re.compile(r"blocks\.\d+\.")  # in the name of what lies in a block


def optimizer(name: str, **how: Any) -> Callable:
    """Put the function below into the table."""

    def enter(make: Callable[[Groups, OptimConfig], Optimizer]) -> Callable:
        OPTIMIZERS[name] = Kind(make, **how)
        return make

    return enter


@optimizer("adamw")
def adamw(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Decoupled weight decay. arXiv 1711.05101"""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True, **cfg.args)


@optimizer("adam")
def adam(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Weight decay as part of the gradient. arXiv 1412.6980"""
    return torch.optim.Adam(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True, **cfg.args)


@optimizer("adamw8bit", state_bytes=2.0, whole="keeps one scale for each 256 numbers of a parameter")
def adamw8bit(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """AdamW with moments of 8 bits, in parameters of 4096 numbers and more. arXiv 2110.02861"""
    return _class("torchao.optim.AdamW8bit", "adamw8bit")(
        groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, **cfg.args
    )


@optimizer("lion", state_bytes=4.0)
def lion(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """The sign of a momentum: a third to a tenth of AdamW's rate, as much more
    weight decay. arXiv 2302.06675"""
    return _other("Lion")(groups, lr=cfg.lr, betas=cfg.betas, **cfg.args)


@optimizer("adafactor", state_bytes=0.0, whole="keeps one number per row and column of a matrix")
def adafactor(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Its steps are a share of each parameter's size; optim.lr is the largest share. arXiv 1804.04235"""
    return torch.optim.Adafactor(groups, lr=cfg.lr, **cfg.args)


@optimizer("came", state_bytes=4.0, whole="keeps one number per row and column of a matrix")
def came(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Adafactor's memory, with a momentum that counts as far as it is sure. arXiv 2307.02047"""
    return _other("CAME")(groups, lr=cfg.lr, betas=(*cfg.betas, 0.9999), **cfg.args)


@optimizer(
    "prodigy", whole="finds one rate for all parameters together", least_lr=0.01, one_rate=True,
    state_bytes=16.0
)
def prodigy(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """Finds its rate d; optim.lr is a factor on it. arXiv 2306.06101"""
    return _other("Prodigy")(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, **cfg.args)


@optimizer("schedulefree", whole="puts an average into the model's weights for evaluation and files")
def schedulefree(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """AdamW at a constant rate; what is saved and evaluated is an average of its way. arXiv 2405.15682"""
    return _other("ScheduleFreeAdamW")(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, **cfg.args)


@optimizer("muon", whole="orthogonalises each matrix", matrices=True, state_bytes=4.0)
def muon(groups: Groups, cfg: OptimConfig) -> Optimizer:
    """The blocks' matrices by their orthogonalised momentum, in steps of the size of AdamW's (arXiv
    2502.16982); the rest by AdamW."""
    matrices = [g for g in groups if g["hidden"]]
    rest = [g for g in groups if not g["hidden"]]
    parts: list[Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=cfg.lr, adjust_lr_fn="match_rms_adamw", **cfg.args))
    return Together([*parts, adamw(rest, replace(cfg, args={}))] if rest else parts)


class Together(Optimizer):
    """Several optimizers of different parameters, to the outside one: their groups and states are its own."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([{"params": list(g["params"])} for part in parts for g in part.param_groups], {})
        self.__setstate__({"param_groups": [g for part in parts for g in part.param_groups]})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the end of load_state_dict, which makes new groups
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


# --- building -----------------------------------------------------------------------------------------------


def build_optimizer(
    params: Mapping[str, nn.Parameter], cfg: OptimConfig, ratios: Mapping[str, float] | None = None
) -> Optimizer:
    """The optimizer of the named parameters. Weight decay acts on matrices, not on biases and norms.
    `ratios`: the rates of single parameters, as multiples of the common one."""
    kind = _kind(cfg)
    groups: dict[tuple[bool, bool, bool, float], list[nn.Parameter]] = {}
    for name, p in params.items():
        hidden = kind.matrices and p.ndim == 2 and HIDDEN.search(name) is not None
        ratio = (ratios or {}).get(name, 1.0)
        # the common rate, which is logged, first
        groups.setdefault((not hidden, ratio != 1.0, p.ndim < 2, ratio), []).append(p)
    made: Groups = [
        {"params": members, "weight_decay": 0.0 if vectors else cfg.weight_decay, "lr": cfg.lr * ratio}
        | ({"hidden": not rest} if kind.matrices else {})
        for (rest, _, vectors, ratio), members in sorted(groups.items(), key=lambda item: item[0])
    ]
    optimizer = kind.make(made, cfg)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def check_optimizer(cfg: OptimConfig, zero: ZeroConfig | None = None, *, ratios: bool = False) -> None:
    """What a run optimizes with, tried on two small parameters; `ratios`: these are to have rates of
    their own. Raises ConfigError for what is unknown, not installed, told what it does not take, or
    not itself on ZeRO's pieces."""
    check_schedule(cfg)
    kind = _kind(cfg)
    if cfg.lr < kind.least_lr:
        raise ConfigError(
            f"optim.lr is {cfg.lr:g}: {cfg.name} finds its rate, and this is a factor on it; use optim.lr=1"
        )
    if ratios and kind.one_rate:
        raise ConfigError(
            f"adapter.lr_ratios: {cfg.name} has one rate for all parameters; leave them out, or use adamw"
        )
    try:
        made = build_optimizer(
            {"blocks.0.w": nn.Parameter(torch.ones(4, 2)), "b": nn.Parameter(torch.ones(2))}, cfg
        )
        # some take and forget whatever they are given
        if unknown := sorted(set(cfg.args) - settings_of(made)):
            raise TypeError(
                f"no '{unknown[0]}'; {suggest(unknown[0], settings_of(made) - {'self', 'params', 'kwargs'})}"
            )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.args: {cfg.name} does not take them: {str(error).splitlines()[0]}"
        ) from None
    if zero is None or zero.engine == "torch" or zero.stage == 0:
        return
    whole = kind.whole or ("" if cfg.name in OPTIMIZERS else _looks_around(cfg))
    if whole:
        raise ConfigError(
            f"optim.name: {cfg.name} {whole}, and ZeRO stage {zero.stage} cuts parameters up; use "
            "zero.stage=0, or one of "
            + ", ".join(name for name, kind in OPTIMIZERS.items() if not kind.whole)
        )


def state_bytes(name: str) -> float:
    """What an optimizer keeps for each trained value; of a class by its path, as much as AdamW."""
    return OPTIMIZERS[name].state_bytes if name in OPTIMIZERS else 8.0


def _kind(cfg: OptimConfig) -> Kind:
    if cfg.name in OPTIMIZERS or "." not in cfg.name:
        return OPTIMIZERS.find(cfg.name, key="optim.name")
    found = _class(cfg.name, cfg.name)
    if not isinstance(found, type) or not issubclass(found, Optimizer):
        raise ConfigError(f"optim.name: {cfg.name} is no subclass of torch.optim.Optimizer")
    make: Callable[..., Optimizer] = found
    return Kind(lambda groups, cfg: make(groups, lr=cfg.lr, **cfg.args))


def _class(path: str, name: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        there = importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        missing = f"'{package}', which is not installed: pip install {package}"
        raise ConfigError(f"optim.name: {name} needs {missing if error.name == package else error}") from None
    if not hasattr(there, attribute):
        classes = [name for name, value in vars(there).items() if isinstance(value, type)]
        raise ConfigError(f"optim.name: {module} has no '{attribute}'; {suggest(attribute, classes)}")
    return getattr(there, attribute)


def _other(name: str) -> Any:
    return _class(f"pytorch_optimizer.{name}", name.lower())


def _looks_around(cfg: OptimConfig) -> str:
    """Of a class that the table does not know: why it cannot step pieces, found by stepping a
    matrix whole and in pieces."""
    cfg, cut = replace(cfg, weight_decay=0.0), [1000, 3096]  # of matrices only
    start, gradient, *noise = torch.randn(10, 64, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    # One piece is led straight on, the other to and fro: a rate that is found from all would differ.
    fro = torch.cat([-torch.ones(cut[0]), torch.ones(cut[1])]).view(64, 64)
    gradients = [gradient * fro**i + 0.1 * more for i, more in enumerate(noise)]
    pieces = (start, *start.flatten().split(cut))
    params = [nn.Parameter(p.clone()) for p in pieces]
    try:
        each = [build_optimizer({"blocks.0.p": p}, cfg) for p in params]  # a rank knows its own piece
        for gradient in gradients:
            for one, p, part in zip(each, params, (gradient, *gradient.flatten().split(cut)), strict=True):
                p.grad = part.clone()
                one.step()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"cannot step it in pieces ({str(error).splitlines()[0]})"
    if hasattr(each[0], "eval"):
        return OPTIMIZERS["schedulefree"].whole
    whole, *parts = [(p - piece).flatten() for p, piece in zip(params, pieces, strict=True)]
    if (whole - torch.cat(parts)).norm() < 1e-3 * whole.norm():
        return ""
    return "does another step with a matrix than with its pieces"
