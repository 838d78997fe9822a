"""The state of an optimizer that holds the model's own parameters: out of it and
back, whatever optimizer it is.

A parameter's state is tensors by name. What an optimizer keeps for all parameters of a group (Prodigy's rate,
a count of steps) is exported with each of them, as `group.NAME`; a moment of 8 bits as its two parts; and
where the weights that are saved are an average, those that train on as `trained`: so a run that continues is
bit for bit the one that was not interrupted.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# an OptimizerState, perhaps one that is read from a file when asked
States = Mapping[str, Mapping[str, Tensor]]
# parameter name -> {"exp_avg": ..., "step": ...}, fp32 on the CPU
OptimizerState = dict[str, dict[str, Tensor]]
GROUP, TRAINED = "group.", "trained"
PACKED = ("codes", "scale")  # the tensors in a quantised moment


def to_cpu(x: Tensor) -> Tensor:
    """An fp32 copy: the training goes on in the original."""
    return x.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def settled(optimizer: Optimizer, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within, the weights that the optimizer means to be used; afterwards those
    that it trains, to the bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = {name: p.detach().clone() for name, p in params.items()}
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        _set(params, kept)


def export_plain_state(optimizer: Optimizer, params: Mapping[str, nn.Parameter]) -> OptimizerState:
    shared = {p: _running(optimizer, group) for group in optimizer.param_groups for p in group["params"]}
    states: OptimizerState = {}
    for name, p in params.items():
        if state := optimizer.state.get(p):
            states[name] = {k: part for key, value in state.items() for k, part in _unpacked(key, value)}
            states[name] |= shared[p]
            if hasattr(optimizer, "eval"):
                states[name][TRAINED] = to_cpu(p)
    return states


def load_plain_state(
    optimizer: Optimizer, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], state: States
) -> None:
    names = {p: name for name, p in params.items()}
    own = {
        n: {k: v for k, v in s.items() if k != TRAINED and not k.startswith(GROUP)} for n, s in state.items()
    }
    if any(key.endswith(PACKED[0]) for s in own.values() for key in s):
        _load_packed(optimizer, names, own)
    else:
        # Through the optimizer's own loader: it puts each tensor where that optimizer wants it (a fused one
        # keeps "step" on the device, others on the CPU). It keeps what it is given, so give it copies.
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        copies = {name: {key: value.clone() for key, value in s.items()} for name, s in own.items()}
        frame = optimizer.state_dict()
        frame["state"] = {i: copies[name] for i, name in enumerate(order) if name in copies}
        optimizer.load_state_dict(frame)
    for group in optimizer.param_groups:
        of_group = [state[names[p]] for p in group["params"] if names[p] in state]
        for key, value in (of_group[0] if of_group else {}).items():
            if key.startswith(GROUP):
                name, number = key.removeprefix(GROUP), float(value.item())
                group[name] = value.float() if value.ndim else int(number) if number.is_integer() else number
    _set(params, {name: state.get(name, {}).get(TRAINED, values[name]) for name in params})


def _running(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the optimizer itself counts in a group: numbers that no setting of it is."""
    settings = settings_of(optimizer)
    numbers = {k: v for k, v in group.items() if k not in settings and not isinstance(v, bool)}
    return {  # float64: a Python number, to the bit
        GROUP + key: value.detach().cpu().double()
        if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
        for key, value in numbers.items()
        if isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1)
    }


def settings_of(optimizer: Optimizer) -> set[str]:
    """What it can be told."""
    parts = getattr(optimizer, "parts", [optimizer])
    return {name for part in parts for name in inspect.signature(type(part).__init__).parameters}


def _unpacked(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if all(hasattr(value, part) for part in PACKED):
        yield from ((f"{key}.{part}", getattr(value, part).detach().cpu().clone()) for part in PACKED)
    elif value is not None:
        yield key, to_cpu(torch.as_tensor(value))


def _load_packed(optimizer: Optimizer, names: Mapping[nn.Parameter, str], state: OptimizerState) -> None:
    """Only the optimizer itself can make a quantised moment: in a step with zero gradients,
    before the weights are set."""
    for p in names:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for p, name in names.items():
            for key, value in state.get(name, {}).items():
                moment, _, part = key.rpartition(".")
                there = getattr(optimizer.state[p][moment], part) if moment else optimizer.state[p][key]
                there.copy_(value)


@torch.no_grad()
def _set(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        p.copy_(values[name])
