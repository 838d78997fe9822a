"""What a training step needs from the machinery under it: backward, step, and
state in a layout no rank shows in.

`TorchEngine` is plain PyTorch with an all-reduce: the reference, and enough for one device. `DeepSpeedEngine`
(zero.py) is the product. One convention: every rank hands in the full loss of its sample, also
sequence-parallel peers, and gradients are averaged over all ranks. Because each collective has its true
adjoint (parallel/collectives.py), the peers' gradients of their sample are parts of sp times the whole, so
this mean over all is the SUM over sequence-parallel peers of loss / sp and the MEAN over data-parallel ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hvtrain.config import ZeroConfig
from hvtrain.errors import ConfigError
from hvtrain.parallel.context import ParallelContext
from hvtrain.registry import Registry
from hvtrain.train.gradients import Parts, norms_of_parts
from hvtrain.train.optstate import (
    OptimizerState,
    States,
    export_plain_state,
    load_plain_state,
    settled,
    to_cpu,
)
from hvtrain.train.parts import Piece

Schedule = Callable[[int], float]  # optimizer step (from 0) -> factor of each group's learning rate

ENGINES = Registry("engine", dict.fromkeys(("deepspeed", "torch")))
PLACES = Registry("place", dict.fromkeys(("none", "cpu", "nvme")))
BUCKET = 1 << 26  # elements per all-reduce: 256 MiB in fp32


@dataclass(frozen=True)
class Step:
    """How gradients become a step."""

    grad_accum: int = 1
    max_grad_norm: float = 1.0  # 0: no clipping
    parts: Parts = field(default_factory=dict)  # whose norms are reported one by one
    parts_every: int = 1  # steps between those that do

    def parts_at(self, step: int) -> Parts:
        """Those that step number `step`, from 1, reports."""
        return {} if step % self.parts_every else self.parts


@dataclass(frozen=True)
class StepResult:
    grad_norm: float | None  # before clipping, over all parameters; not finite if the step was skipped
    lr: float  # of the first parameter group, in this step
    skipped: bool  # a gradient was not finite: parameters and optimizer state are untouched
    norms: Mapping[str, float] = field(default_factory=dict)  # of Step.parts, before clipping


class Engine(Protocol):
    model: nn.Module  # call this for a forward pass
    n_steps: int  # optimizer steps so far, skipped ones included

    def accumulate(self, loss: Tensor, *, last: bool) -> StepResult | None:
        """Backward of one of grad_accum micro-steps; the last one clips and steps."""
        ...

    def export_params(self) -> dict[str, Tensor]:
        """Trainable parameters, whole, fp32 on the CPU. Collective; the result is for
        rank 0 (others may get {})."""
        ...

    def export_optimizer(self) -> OptimizerState:
        """Optimizer state per parameter. Collective; for rank 0. Empty before the first step."""
        ...

    def settled(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that its optimizer means to be used: an
        average, where it keeps one."""
        ...

    def pieces(self) -> list[Piece]:
        """Of parameters and optimizer state, what this rank has: for a full fine-tune under
        ZeRO-3. Empty: export it whole."""
        ...

    def load_state(self, params: Mapping[str, Tensor], optimizer: States, *, n_steps: int) -> None:
        """Continue from exported state, whatever engine, stage or number of ranks
        exported it. Every rank passes it."""
        ...


def build_engine(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    zero: ZeroConfig,
    ctx: ParallelContext,
    *,
    optimizer: Optimizer,
    schedule: Schedule,
    step: Step,
) -> Engine:
    """`params` are the trainable parameters by name; `optimizer` holds exactly these."""
    check_engine(zero)
    if zero.engine == "torch":
        return TorchEngine(model, params, step, ctx, optimizer=optimizer, schedule=schedule)
    from hvtrain.train.zero import DeepSpeedEngine

    return DeepSpeedEngine(model, params, zero, step, ctx, optimizer=optimizer, schedule=schedule)


def check_engine(zero: ZeroConfig) -> None:
    """Refuse what makes no sense, naming what to use instead."""
    ENGINES.find(zero.engine, key="zero.engine")
    PLACES.find(zero.offload_optimizer, key="zero.offload_optimizer")
    PLACES.find(zero.offload_param, key="zero.offload_param")
    if zero.stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero.stage: {zero.stage} is not a ZeRO stage; choose 0, 1, 2 or 3")
    _check_places(zero)
    if zero.engine == "torch" and (zero.deepspeed or zero.communication_dtype != "fp32" or zero.bucket_mb):
        raise ConfigError(
            "zero.deepspeed, zero.communication_dtype and zero.bucket_mb are DeepSpeed's, zero.engine is "
            "torch; use zero.engine=deepspeed"
        )
    if zero.deepspeed:
        own_settings(zero.deepspeed)
    if zero.bucket_mb is not None and zero.bucket_mb <= 0:
        raise ConfigError(f"zero.bucket_mb is {zero.bucket_mb}, expected more than 0")


def _check_places(zero: ZeroConfig) -> None:
    where = "the torch engine" if zero.engine == "torch" else f"ZeRO stage {zero.stage}"
    if zero.offload_optimizer != "none" and (zero.engine == "torch" or zero.stage == 0):
        raise ConfigError(
            f"zero.offload_optimizer: {where} keeps the optimizer beside the parameters; "
            "use zero.engine=deepspeed with zero.stage 1, 2 or 3"
        )
    if zero.offload_param != "none" and (zero.engine == "torch" or zero.stage != 3):
        raise ConfigError(
            f"zero.offload_param: {where} keeps the whole weights on each device; "
            "use zero.stage=3, or for a LoRA run.blocks_to_swap"
        )
    nvme = "nvme" in (zero.offload_optimizer, zero.offload_param)
    if nvme:
        _check_toolkit()
    if nvme and zero.stage != 3:
        raise ConfigError(f"zero.offload_optimizer: {where} cannot put it on nvme; use zero.stage=3, or cpu")
    if zero.offload_param == "nvme" and zero.offload_optimizer != "nvme":
        raise ConfigError(
            "zero.offload_param: nvme needs the optimizer there too; set zero.offload_optimizer=nvme"
        )
    if nvme != (zero.nvme_path is not None):
        raise ConfigError(
            "zero.nvme_path: give a directory on a local disk for what is offloaded to nvme" if nvme
            else "zero.nvme_path is set but nothing is offloaded to nvme; set zero.offload_optimizer=nvme"
        )


# What the Engine protocol rests on: another value would be silently wrong, or belongs to an option of ours.
_OURS = {
    "optimizer": "optim", "scheduler": "optim.schedule", "gradient_accumulation_steps": "run.grad_accum",
    "fp16": "run.precision", "gradient_clipping": "optim.max_grad_norm",
    "train_batch_size": "data.batch_size", "bf16": "run.precision",
    "train_micro_batch_size_per_gpu": "data.batch_size", "amp": "run.precision",
    "torch_autocast": "run.precision", "zero_optimization.stage": "zero.stage",
    "communication_data_type": "zero.communication_dtype",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "sequence_parallel_size": "parallel.ulysses",
    "zero_optimization.offload_param.device": "zero.offload_param",
}


def own_settings(path: str) -> dict[str, Any]:
    """A user's settings of DeepSpeed, by its names. Raises ConfigError for one that is ours."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"zero.deepspeed: {path} is not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"zero.deepspeed: {path} holds a {type(found).__name__}, expected DeepSpeed's settings by name"
        )
    _refuse_ours(found, path)
    return found


def _refuse_ours(settings: Mapping[str, Any], path: str, prefix: str = "") -> None:
    for key, value in settings.items():
        if own := _OURS.get(prefix + key):
            raise ConfigError(
                f"zero.deepspeed: {path} sets '{prefix}{key}', which hvtrain sets from {own}; set that "
                "instead"
            )
        if isinstance(value, dict):
            _refuse_ours(value, path, f"{prefix}{key}.")


def _check_toolkit() -> None:
    """Where PyTorch sees a GPU, DeepSpeed compiles its disk access against CUDA's headers,
    also if the run is on the CPU."""
    if not torch.cuda.is_available():
        return
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not Path(CUDA_HOME, "include").is_dir():
        raise ConfigError(
            "zero.offload_optimizer: nvme needs a CUDA toolkit to compile DeepSpeed's disk access, and "
            f"CUDA_HOME is {CUDA_HOME}; install the toolkit of PyTorch's CUDA version and set CUDA_HOME to "
            "it, or use cpu"
        )


class LearningRate:
    """Sets each group's rate to its own base times the schedule, so a resumed run
    needs only the step number."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.bases = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, n_steps: int) -> float:
        """The first group's rate of step `n_steps`, after setting all: times d, of
        an optimizer that finds it."""
        factor = self.schedule(n_steps)
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            if torch.is_tensor(group["lr"]):  # a compiled optimizer's
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor
        first = self.optimizer.param_groups[0]
        return self.bases[0] * factor * (first["d"] if "d_max" in first else 1.0)


class TorchEngine:
    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        step: Step,
        ctx: ParallelContext,
        *,
        optimizer: Optimizer,
        schedule: Schedule,
    ) -> None:
        self.model, self.params, self.how, self.ctx = model, dict(params), step, ctx
        self.optimizer, self.rate, self.n_steps = optimizer, LearningRate(optimizer, schedule), 0

    def accumulate(self, loss: Tensor, *, last: bool) -> StepResult | None:
        (loss / self.how.grad_accum).backward()
        if not last:
            return None
        lr = self.rate.set(self.n_steps)
        grads = filled_grads(self.params.values())
        _reduce(grads, self.ctx)
        each = torch._foreach_norm(grads)
        norm = clip_(grads, self.how.max_grad_norm, each).item()
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.n_steps += 1
        parts = self.how.parts_at(self.n_steps)
        norms = norms_of_parts(dict(zip(self.params, each, strict=True)), parts, device=self.ctx.device)
        return StepResult(norm, lr, skipped, norms)

    def settled(self) -> AbstractContextManager[None]:
        return settled(self.optimizer, self.params)

    def export_params(self) -> dict[str, Tensor]:
        with self.settled():
            return {name: to_cpu(p) for name, p in self.params.items()}

    def export_optimizer(self) -> OptimizerState:
        return export_plain_state(self.optimizer, self.params)

    def pieces(self) -> list[Piece]:
        return []

    def load_state(self, params: Mapping[str, Tensor], optimizer: States, *, n_steps: int) -> None:
        load_plain_state(self.optimizer, self.params, params, optimizer)
        self.n_steps = n_steps


def filled_grads(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Every parameter's gradient, zeros where the loss does not depend on it: all
    ranks then reduce the same list."""
    params = list(params)
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in params if p.grad is not None]


def clip_(grads: list[Tensor], max_norm: float, each: Sequence[Tensor] = ()) -> Tensor:
    """The global norm; the gradients are scaled down to max_norm in place (0: left alone).
    `each`: their norms, if known."""
    norm = torch.linalg.vector_norm(torch.stack(list(each or torch._foreach_norm(grads))).float())
    if max_norm > 0:
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _reduce(grads: list[Tensor], ctx: ParallelContext) -> None:
    """Mean over all ranks."""
    if ctx.world == 1:
        return
    bucket: list[Tensor] = []
    for i, grad in enumerate(grads):
        bucket.append(grad)
        following = grads[i + 1] if i + 1 < len(grads) else None
        full = sum(g.numel() for g in bucket) >= BUCKET
        if following is None or full or following.dtype != grad.dtype:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= ctx.world
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []
