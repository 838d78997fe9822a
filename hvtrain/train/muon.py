"""Muon: momentum, then the nearest orthogonal matrix (Jordan et al. 2024, Newton-Schulz
quintic).

torch.optim.Muon takes matrices only, and makes them orthogonal in bfloat16, whose rounding depends on the
order in which ranks add gradients up. Here a kernel [out, in, kt, kh, kw] is the matrix [out, in*kt*kh*kw],
and all is computed in the weights' own precision.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENT = "momentum"


class Muon(torch.optim.Optimizer):
    """Updates every parameter of two or more dimensions by the orthogonalised Nesterov momentum of its
    gradient. `like_adam`: steps as large as AdamW's of the same rate (arXiv 2502.16982)."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, like_adam: bool = False
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "like_adam": like_adam})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if MOMENT not in state:
                    state[MOMENT] = torch.zeros_like(weight)
                moment = state[MOMENT].mul_(group["momentum"]).add_(weight.grad)
                nesterov = weight.grad + group["momentum"] * moment
                update = orthogonalise(nesterov.reshape(weight.shape[0], -1))
                rate = group["lr"] * _gain(update, group["like_adam"])
                weight.add_(update.reshape(weight.shape), alpha=-rate)


def _gain(update: Tensor, like_adam: bool) -> float:
    rows, columns = update.shape
    if like_adam:  # the mean square of an orthogonal matrix is 1 / its longer side
        return 0.2 * max(rows, columns) ** 0.5
    # Tall matrices get a larger step, so that every layer's output changes by about the same amount.
    return max(1.0, rows / columns) ** 0.5


def orthogonalise(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """The matrix with (nearly) all singular values moved to 1: five Newton-Schulz steps, no SVD."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
