"""xfuser's attention as an optional path for sampling on GPUs, behind the same `attend`.

Never for training: its ring backward saves neither the joint (text) queries nor their keys and values and
returns no gradient for them, which no error would show (xFuserRingFlashAttnFunc, xfuser 0.7).
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch

from hvtrain.errors import ConfigError
from hvtrain.models.attention import Attention, rows_of_equal_length, split, stack_rows
from hvtrain.models.dit import Grid, Joint
from hvtrain.models.kernels import KERNELS, Kernel
from hvtrain.parallel.context import ParallelContext, at_shutdown

NAME = "xfuser"


def refuse(ctx: ParallelContext, *, training: bool) -> None:
    """Raise ConfigError, with the reason, where this path cannot be taken."""
    reason = None
    if training:
        reason = "its backward gives text keys and values no gradient; train with 'auto'"
    elif ctx.device.type != "cuda":
        reason = f"it needs a CUDA device, this is {ctx.device.type}"
    elif importlib.util.find_spec("xfuser") is None:
        reason = "the Python package 'xfuser' is not installed"
    elif ctx.sp == 1:
        reason = (
            "there is nothing to share among one rank; set parallel.ulysses or parallel.ring, or use 'auto'"
        )
    else:
        reason = _unfit()
    if reason:
        raise ConfigError(f"parallel.kernel: 'xfuser' cannot be used: {reason}")


def _unfit() -> str | None:
    """Whether the package can be imported and told which kernel to use: what it takes by
    itself differs between releases."""
    try:
        from xfuser.core.long_ctx_attention import xFuserLongContextAttention
        from yunchang.kernels import AttnType

        takes = inspect.signature(xFuserLongContextAttention.__init__).parameters
        if "attn_type" not in takes or not hasattr(AttnType, "TORCH_FLASH"):
            return "this release does not let one choose its kernel; install a newer xfuser and yunchang"
    except Exception as error:  # of any kind: it is not our code
        return (
            f"the Python package 'xfuser' is installed, but {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}"
        )
    return None


def _kernel_of(device: torch.device) -> Any:
    """The fastest of xfuser's kernels that works here; PyTorch's own needs no package."""
    from yunchang.kernels import AttnType

    for ours, theirs in (("flash3", "FA3"), ("flash2", "FA")):
        if KERNELS[ours].missing(device, torch.bfloat16) is None:
            return AttnType[theirs]
    return AttnType.TORCH_FLASH


class XfuserAttention(Attention):
    """Joint attention by xfuser: image tokens sharded, text joint at the rear."""

    def __init__(self, ctx: ParallelContext, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.ctx, self.layer = ctx, _layer(ctx)

    def joint(
        self, q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int,
        sparse: Grid | None = None
    ) -> Joint:
        ctx, layer = self.ctx, self.layer
        n_local = q.img.shape[1]
        if n_local * ctx.sp != n_img:
            raise ConfigError(
                f"parallel.kernel: xfuser cannot pad {n_img} image tokens to a multiple of {ctx.sp} ranks; "
                "use 'auto', which can"
            )
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.img.dtype
        parts = []
        for rows, n_txt in rows_of_equal_length(txt_len):
            img = [x.img[rows].to(dtype) for x in (q, k, v)]
            txt = [x.txt[rows, :n_txt].to(dtype) for x in (q, k, v)]
            out = layer(
                None, *img, dropout_p=0.0, causal=False, joint_tensor_query=txt[0], joint_tensor_key=txt[1],
                joint_tensor_value=txt[2], joint_strategy="rear",
            )
            parts.append(split(out, n_img=n_local, pad_img=n_local, pad_txt=q.txt.shape[1]))
        return stack_rows(parts)


def _layer(ctx: ParallelContext) -> Any:
    from xfuser.core import distributed as xdist
    from xfuser.core.long_ctx_attention import xFuserLongContextAttention

    if not xdist.model_parallel_is_initialized():
        xdist.init_distributed_environment(rank=ctx.rank, world_size=ctx.world)
        xdist.initialize_model_parallel(
            data_parallel_degree=ctx.dp, sequence_parallel_degree=ctx.sp, ulysses_degree=ctx.ulysses,
            ring_degree=ctx.ring
        )
        at_shutdown(xdist.destroy_model_parallel)
    return xFuserLongContextAttention(attn_type=_kernel_of(ctx.device))
