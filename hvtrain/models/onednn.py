"""Attention on a CPU by oneDNN's matrix products, for bfloat16: some rows of the
scores at a time, for each head.

PyTorch's own kernel multiplies small tiles, and forms the float32 scores with whatever BLAS it
was built with: on CPUs that have bfloat16 instructions but no matrix unit (AMX) that is half as
fast. Rounded where a flash kernel rounds: scores, softmax and log-sum-exp are float32, the
probabilities that multiply v are bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvtrain.models.precision import under_autocast

# rows at a time, and the most scores: what is held of them is 16 MB, twice in the backward
_ROWS, _SCORES = 256, 2**22


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run there, or None."""
    if device.type != "cpu":
        return f"it is for CPUs, this is {device.type}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch is built without oneDNN"
    return None


def is_faster() -> bool:
    """Than PyTorch's own. By the kind of CPU and not by a clock: on a CPU the clock
    tells what else is running."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and not torch.cpu._is_amx_tile_supported()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B S N D], differentiable."""
    from hvtrain.models.attend_op import attention
    from hvtrain.models.kernels import KERNELS

    if under_autocast(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return attention(q, k, v, KERNELS["onednn"].number)[0]


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B S N D] and [B T N D]: the output [B S N D] and the log-sum-exp [B N S] fp32."""
    (b, s, n, d), step = q.shape, _step(k)
    out, lse = q.new_empty(q.shape), q.new_empty(b, n, s, dtype=torch.float32)
    with torch.no_grad():
        for i, h in _heads(b, n):
            queries, keys, values = q[i, :, h].float() * d**-0.5, k[i, :, h].float(), v[i, :, h].contiguous()
            for rows in _some(s, step):
                scores = _product(queries[rows], keys)
                top = scores.amax(1, keepdim=True)
                scores.sub_(top).exp_()
                total = scores.sum(1, keepdim=True)
                out[i, rows, h] = (scores.to(q.dtype) @ values) / total
                lse[i, h, rows] = total.log_().add_(top)[:, 0]
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the whole result where k and v are a part of the keys (a ring)."""
    (b, s, n, d), step = q.shape, _step(k)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    with torch.no_grad():
        for i, h in _heads(b, n):
            queries, keys, grads = (x[i, :, h].contiguous() for x in (q, k, dout))
            wide_keys, wide_values, wide_grads = keys.float(), v[i, :, h].float(), grads.float()
            scaled = queries.float() * d**-0.5
            delta = (wide_grads * out[i, :, h]).sum(1, keepdim=True)
            sum_k, sum_v = torch.zeros_like(wide_keys), torch.zeros_like(wide_values)
            for rows in _some(s, step):
                chances = _product(scaled[rows], wide_keys).sub_(lse[i, h, rows, None]).exp_()
                narrow = chances.to(q.dtype)
                sum_v += narrow.T @ grads[rows]
                narrow = _product(wide_grads[rows], wide_values).sub_(delta[rows]).mul_(chances).to(q.dtype)
                dq[i, rows, h] = (narrow @ keys).mul_(d**-0.5)
                sum_k += narrow.T @ queries[rows]
            dk[i, :, h], dv[i, :, h] = sum_k.mul_(d**-0.5), sum_v
    return dq, dk, dv


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x [m D] times y' [D n], float32 by oneDNN: torch.mm goes to another BLAS."""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def _step(k: Tensor) -> int:
    return max(1, min(_ROWS, _SCORES // max(k.shape[1], 1)))


def _heads(b: int, n: int) -> list[tuple[int, int]]:
    return [(i, h) for i in range(b) for h in range(n)]


def _some(s: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, s)) for begin in range(0, s, step)]
