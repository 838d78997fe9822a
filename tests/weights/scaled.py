"""torch._scaled_mm as a GPU has it: what it refuses there is refused here, and what it
computes is computed in float32."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest
import torch
import torch._inductor.kernel.mm  # takes torch._scaled_mm by its name when it is imported
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
of_rows = pytest.mark.skipif(
    not hasattr(torch.distributed, "all_gather_single"),
    reason="before torch 2.13 a CPU's float8 product takes one factor only"
)


@dataclass(eq=False)  # with a hash: torch.compile looks up all that torch has
class ScaledProduct:
    """In the place of torch._scaled_mm. `coarse`: what fast sums are wrong by, relatively."""

    coarse: float = 0.0
    shapes: list[tuple[int, int, int]] = field(default_factory=list)  # tokens, n, m of each call
    fast: list[bool] = field(default_factory=list)
    biased: list[bool] = field(default_factory=list)

    def __call__(
        self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None, use_fast_accum: bool = False,
    ) -> Tensor:
        (tokens, n), m = a.shape, b.shape[1]
        assert a.dtype == b.dtype == FLOAT8 and b.shape[0] == n
        assert a.stride(1) == 1 and b.stride(0) == 1, "rows of the one, columns of the other"
        assert n % 16 == m % 16 == 0, "sizes in sixteens"
        assert scale_a.shape == (tokens, 1) and scale_b.shape == (1, m)
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert out_dtype == torch.bfloat16 and (bias is None or bias.dtype == out_dtype)
        self.shapes.append((tokens, n, m))
        self.fast.append(use_fast_accum)
        self.biased.append(bias is not None)
        out = (a.float() @ b.float()) * scale_a * scale_b
        if use_fast_accum:
            out = out * (1 + self.coarse)
        return (out if bias is None else out + bias.float()).to(out_dtype)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))) or " " in torch.__file__,
    reason="torch.compile makes no kernel for this CPU: no C++ compiler, or a space in torch's path, "
    "which it does not quote",
)
