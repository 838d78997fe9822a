"""An optimizer's state out of it and back: what is exported under which name, and
what an optimizer then has."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvtrain.train.optim import Together
from hvtrain.train.optstate import export_plain_state, load_plain_state


@dataclass
class Quantised:
    codes: Tensor
    scale: Tensor


class Packed(torch.optim.Optimizer):
    """Moments of 8 bits, which only its own steps make; a step of its moves weights
    also where gradients are zero."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["first.moment"] = Quantised(torch.zeros(p.shape, dtype=torch.uint8), torch.ones(1))
            state["step"] += 1
            state["first.moment"].codes += 7
            state["first.moment"].scale *= 0.5
            p.sub_(1 + p.grad)


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([4.0]))}


def stepped(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], n: int = 3) -> None:
    for _ in range(n):
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_a_moment_of_8_bits_goes_out_as_its_two_parts_and_back_into_one():
    params = parameters()
    optimizer = Packed(params.values())
    stepped(optimizer, params)
    state = export_plain_state(optimizer, params)
    names = ["step", "first.moment.codes", "first.moment.scale"]
    assert {n: list(s) for n, s in state.items()} == {"a": names, "b": names}
    codes = state["a"]["first.moment.codes"]
    assert (
        codes.tolist() == [21, 21] and codes.dtype == torch.uint8
        and state["a"]["first.moment.scale"].tolist() == [0.125]
    )
    stepped(optimizer, params, 1)
    assert codes.tolist() == [21, 21]  # a copy
    again = parameters()
    other = Packed(again.values())
    load_plain_state(
        other, again, {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor([7.0])}, {"a": state["a"]}
    )
    mine = other.state[again["a"]]
    assert mine["first.moment"].codes.tolist() == [21, 21] and mine["first.moment"].scale.tolist() == [0.125]
    assert mine["step"].item() == 3.0 and mine["first.moment"].codes.dtype == torch.uint8
    # the steps that made the moments left no trace
    assert again["a"].tolist() == [5.0, 6.0] and again["b"].tolist() == [7.0]
    assert all(p.grad is None for p in again.values())
    stepped(other, again, 1)
    assert mine["first.moment"].codes.tolist() == [28, 28] and codes.tolist() == [21, 21]


class Plain(torch.optim.Optimizer):
    """Keeps what it is given."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})


def test_a_state_that_is_called_scale_is_no_moment_of_8_bits():
    params = parameters()
    optimizer = Plain(params.values())
    load_plain_state(optimizer, params, dict(params), {"a": {"scale": torch.tensor([3.0])}})
    assert {k: v.tolist() for k, v in optimizer.state[params["a"]].items()} == {"scale": [3.0]}


def test_what_is_counted_for_a_group_is_exported_and_set_with_its_type():
    """Numbers, also as tensors of one element; not settings, truths, words or whole tensors."""
    params = parameters()
    optimizer = Plain(params.values())
    group = optimizer.param_groups[0]
    counts = {"k": 3, "d": 0.1, "one": torch.tensor([0.5], requires_grad=True), "none": torch.tensor(2.5)}
    group |= {**counts, "fast": True, "word": "x", "many": torch.ones(2)}
    optimizer.state[params["a"]] = {"sum": torch.tensor([1.0, 2.0]), "missing": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = export_plain_state(optimizer, params)
    assert list(state) == ["a"] and set(state["a"]) == {"sum", *(f"group.{name}" for name in counts)}
    numbers = [state["a"][f"group.{name}"] for name in counts]
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in numbers)
    assert [x.tolist() for x in numbers] == [3.0, 0.1, [0.5], 2.5]
    again = parameters()
    other = Plain(again.values())
    given = {**state["a"], "trained": torch.tensor([8.0, 9.0])}
    load_plain_state(other, again, {"a": torch.zeros(2), "b": torch.ones(1)}, {"a": given})
    mine = other.param_groups[0]
    assert (
        (mine["k"], mine["d"], mine["none"]) == (3, 0.1, 2.5)
        and [type(mine[n]) for n in ("k", "d")] == [int, float]
    )
    assert mine["one"].tolist() == [0.5] and mine["one"].dtype == torch.float32
    assert set(mine) == {"params", "lr", *counts} and set(other.state[again["a"]]) == {"sum"}
    # those that train on, not the file's average
    assert again["a"].tolist() == [8.0, 9.0] and again["b"].tolist() == [1.0]


def test_the_weights_that_are_trained_go_along_where_others_are_meant_to_be_used():
    """As of a schedule-free optimizer: those in the file are its average."""

    class Averaging(Plain):
        def eval(self) -> None: ...

        def train(self) -> None: ...

    params = parameters()
    for kind, own in ((Plain, {"sum"}), (Averaging, {"sum", "trained"})):
        optimizer = kind(params.values())
        optimizer.state[params["a"]] = {"sum": torch.ones(2)}
        state = export_plain_state(optimizer, params)
        assert set(state) == {"a"} and set(state["a"]) == own
    assert state["a"]["trained"].tolist() == [1.0, 2.0]


def test_settings_of_optimizers_that_are_one_are_theirs():
    params = parameters()
    optimizer = Together(
        [torch.optim.SGD([params["a"]], lr=0.1, momentum=0.9), torch.optim.AdamW([params["b"]], lr=0.2)]
    )
    stepped(optimizer, params)
    state = export_plain_state(optimizer, params)
    assert {n: set(s) for n, s in state.items()} == {
        "a": {"momentum_buffer"}, "b": {"step", "exp_avg", "exp_avg_sq"}
    }


def test_a_state_that_is_half_there_is_loaded_for_those_that_have_it():
    params = parameters()
    optimizer = torch.optim.AdamW([{"params": [params["b"]]}, {"params": [params["a"]]}], lr=0.1)
    given = {"step": torch.tensor(2.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    load_plain_state(optimizer, params, {n: p.detach().clone() for n, p in params.items()}, {"a": given})
    assert list(optimizer.state) == [params["a"]]
    optimizer.state[params["a"]]["exp_avg"].zero_()
    assert given["exp_avg"].tolist() == [1.0, 1.0]  # the optimizer goes on in its own
    with pytest.raises(KeyError, match="b"):
        load_plain_state(optimizer, params, {"a": torch.ones(2)}, {"a": given})
