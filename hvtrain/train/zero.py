"""DeepSpeed: ZeRO stages 0-3 and optimizer offload behind the Engine protocol. The only file that imports it.

Three decisions:
- The engine runs in fp32 mode. Trainable parameters are fp32, a frozen base may be bf16, and the forward's
  precision is the caller's torch.autocast: DeepSpeed's own casting would make LoRA weights bf16.
- It is not told about sequence parallelism. Every rank hands in the full loss of its sample, so the
  plain mean over all ranks is the sum over sequence-parallel and the mean over data-parallel ones
  (engine.py). Its own ways are traps: with `mesh_param` sequence-parallel peers are never summed; with
  an `mpu` stages 0-2 sum them, but stage 3's reduce-scatter still averages, so only gradients of
  persistent small parameters would be right.
- The optimizer is ours (torch's AdamW runs on the CPU too), so offload compiles no C++ on the user's machine.
  `zero_force_ds_cpu_optimizer: false` is DeepSpeed's switch for that; torch's
  fused CPU AdamW is about as fast.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
import torch.nn.functional as F
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from hvtrain.config import ZeroConfig
from hvtrain.errors import ConfigError
from hvtrain.models.precision import autocast
from hvtrain.parallel.context import ParallelContext, at_shutdown, solo_group
from hvtrain.train.engine import LearningRate, Schedule, Step, StepResult, clip_, filled_grads
from hvtrain.train.gradients import norms_of_parts
from hvtrain.train.optstate import (
    OptimizerState,
    States,
    export_plain_state,
    load_plain_state,
    settled,
    to_cpu,
)
from hvtrain.train.parts import SEPARATOR, Piece, shape_of, span_of
from hvtrain.train.zero_config import ds_config
from hvtrain.train.zero_ops import compiled


class _Inside(nn.Module):
    """What DeepSpeed wraps: the model, under the caller's autocast."""

    def __init__(self, model: nn.Module, device_type: str) -> None:
        super().__init__()
        self.model, self.device_type = model, device_type

    def forward(self, inp: Any, enabled: bool, dtype: torch.dtype) -> Any:
        with autocast(self.device_type, dtype=dtype, enabled=enabled):
            return self.model(inp)


class _Outside(nn.Module):
    """What the caller calls. DeepSpeed's forward switches a torch.autocast around it off (on CUDA only, so no
    CPU test shows it); this carries the caller's setting through to the inside."""

    def __init__(self, engine: nn.Module, device_type: str) -> None:
        super().__init__()
        self.engine, self.device_type = engine, device_type

    def forward(self, inp: Any) -> Any:
        on = torch.is_autocast_enabled(self.device_type)
        return self.engine(inp, on, torch.get_autocast_dtype(self.device_type))


def _look_into_tokens(model: nn.Module) -> None:
    """DeepSpeed gathers a module's weights for its backward when a gradient reaches its outputs, which
    it finds in tuples and dicts, but not in Tokens: what a block holds itself, as a table of
    modulations, would be gone by then."""

    def enter(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return replace(args[0], img=block.post_bwd_fn.apply(args[0].img)), *args[1:]

    def leave(block: Any, args: tuple[Any, ...], tokens: Any) -> Any:
        return replace(tokens, img=block.pre_bwd_fn.apply(tokens.img))

    for block in getattr(model, "blocks", ()):
        if any(True for _ in block.parameters(recurse=False)):
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)


class DeepSpeedEngine:
    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        cfg: ZeroConfig,
        step: Step,
        ctx: ParallelContext,
        *,
        optimizer: Optimizer,
        schedule: Schedule,
    ) -> None:
        # A LoRA is small: one file of all is as good, and is written behind the training.
        n_trained = sum(p.numel() for p in params.values())
        self.parted = cfg.stage == 3 and 2 * n_trained > sum(p.numel() for p in model.parameters())
        solo_group(ctx)
        if "nvme" in (cfg.offload_optimizer, cfg.offload_param):
            _disk_access(str(cfg.nvme_path), ctx)
        with _quiet():
            _forgo_compiled_ops(ctx)
            config = ds_config(cfg, model, cuda=ctx.device.type == "cuda", step=step)
            if cfg.stage == 3:
                # Parameter by parameter: the whole model never lies on a device.
                # `initialize` would move it there first.
                deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
                for buffer in model.buffers():
                    buffer.data = buffer.to(ctx.device)
            self.engine, *_ = deepspeed.initialize(
                model=_Inside(model, ctx.device.type), optimizer=optimizer, dist_init_required=False,
                config=config
            )
            if cfg.stage == 3:
                _look_into_tokens(model)
        at_shutdown(deepspeed.comm.destroy_process_group)
        self.model: nn.Module = _Outside(self.engine, ctx.device.type)
        self.params, self.cfg, self.how, self.ctx = dict(params), cfg, step, ctx
        self.rate, self.n_steps = LearningRate(self.basic, schedule), 0

    @property
    def basic(self) -> Optimizer:
        """The torch optimizer, which under ZeRO steps flat partitions instead of parameters."""
        return self.engine.optimizer.optimizer if self.cfg.stage else self.engine.optimizer

    def accumulate(self, loss: Tensor, *, last: bool) -> StepResult | None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro-step, nothing else
            return None
        lr = self.rate.set(self.n_steps)
        self.n_steps += 1
        if self.cfg.stage:
            norms = self._norms_of_pieces()
            self.engine.step()
            norm, skipped = float(self.engine.get_global_grad_norm()), bool(self.engine.optimizer.overflow)
        else:
            grads = filled_grads(self.params.values())
            each, parts = torch._foreach_norm(grads), self.how.parts_at(self.n_steps)
            norms = norms_of_parts(dict(zip(self.params, each, strict=True)), parts, device=self.ctx.device)
            norm = clip_(grads, self.how.max_grad_norm, each).item()
            skipped = not math.isfinite(norm)
            if skipped:
                self.engine.zero_grad()
            else:
                self.engine.step()
        return StepResult(norm, lr, skipped, norms)

    def _norms_of_pieces(self) -> dict[str, float]:
        """Of Step.parts: of the pieces that this rank has, and then of all ranks'."""
        if not (parts := self.how.parts_at(self.n_steps)):
            return {}
        pieces = {
            n: piece for n,
            p in self.params.items() if (piece := _piece_of_gradient(p, self.cfg.stage)) is not None
        }
        each = dict(zip(pieces, torch._foreach_norm(list(pieces.values())) if pieces else (), strict=True))
        return norms_of_parts(each, parts, device=self.ctx.device, total=deepspeed.comm.all_reduce)

    def settled(self) -> AbstractContextManager[None]:
        return settled(self.basic, {} if self.cfg.stage else self.params)

    def export_params(self) -> dict[str, Tensor]:
        values = {}
        with self.settled():
            for name, p in self.params.items():  # one at a time: the whole never lies on a device
                with deepspeed.zero.GatheredParameters([p], enabled=self.cfg.stage == 3):
                    if self.ctx.is_main:
                        values[name] = to_cpu(p)
        return values

    def export_optimizer(self) -> OptimizerState:
        if not self.cfg.stage:
            return export_plain_state(self.basic, self.params)
        like, scalars = self._flat_keys()
        self._link_state()
        states: OptimizerState = {}
        for name, p in self.params.items():
            whole = {key: safe_get_full_optimizer_state(p, key) for key in like}
            if self.ctx.is_main and whole:
                states[name] = {k: to_cpu(t).view(_shape(p)) for k, t in whole.items()} | scalars
        return states

    def pieces(self) -> list[Piece]:
        if not self.parted:
            return []
        like, scalars = self._flat_keys()
        found = []
        p: Any
        for name, p in self.params.items():
            start, part = self._my_part(p)
            n, shape = min(part, p.ds_numel - start), tuple(p.ds_shape)
            reads = {name: partial(safe_get_local_fp32_param, p)}
            reads |= {
                f"{name}{SEPARATOR}{key}": partial(safe_get_local_optimizer_state, p, key) for key in like
            }
            found += [
                Piece(key, shape, start, n, partial(_first, n, read)) for key, read in reads.items() if n > 0
            ]
            if self.ctx.is_main:
                found += [
                    Piece(f"{name}{SEPARATOR}{key}", (), 0, 1, value.clone) for key, value in scalars.items()
                ]
        return found

    def _my_part(self, p: Any) -> tuple[int, int]:
        """Where this rank's part of a flat ZeRO-3 parameter begins, and its length, padded
        to be the same on every rank."""
        part = p.ds_tensor.numel()
        return min(part * self.ctx.rank, p.ds_numel), part

    def load_state(self, params: Mapping[str, Tensor], optimizer: States, *, n_steps: int) -> None:
        self.n_steps = n_steps
        if not self.cfg.stage:
            load_plain_state(self.basic, self.params, params, optimizer)
            return
        if optimizer and not self._flat_keys()[0]:
            self._create_state()
        self._link_state()
        for name, p in self.params.items():
            self._set(p, params, name)
            states = optimizer.get(name, {})
            for key in states:
                if shape_of(states, key):
                    self._set(p, states, key, state=key)
                else:
                    self._set_scalar(key, states[key])
        if self.cfg.stage < 3:
            self.engine.optimizer.update_lp_params()

    def _set(self, p: Any, values: Mapping[str, Tensor], name: str, *, state: str | None = None) -> None:
        """Write a parameter (state None) or a piece of its optimizer state into this rank's partition, from
        the whole tensor `values[name]`, of which ZeRO-3 reads no more than its part."""
        if self.cfg.stage == 3:
            self._set_part(p, values, name, state)
        elif state is None:
            safe_set_full_fp32_param(p, values[name].to(self.ctx.device, torch.float32))
        else:
            safe_set_full_optimizer_state(p, values[name].to(self.ctx.device, torch.float32), state)

    def _set_part(self, p: Any, values: Mapping[str, Tensor], name: str, state: str | None) -> None:
        """Stage 3 pads a parameter to a multiple of the ranks; its own whole-tensor setter forgets that."""
        start, part = self._my_part(p)
        mine = span_of(values, name, start, min(start + part, p.ds_numel)).to(self.ctx.device, torch.float32)
        mine = F.pad(mine, (0, part - mine.numel()))
        if state is not None:
            safe_set_local_optimizer_state(p, mine, state)
            return
        safe_set_local_fp32_param(p, mine)
        if (
            p.ds_persist or self.cfg.offload_param == "nvme"
            or getattr(p, "ds_secondary_tensor", None) is not None
        ):
            # there is more than this part of it
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                p.data.copy_(values[name])
        else:
            p.ds_tensor.data.copy_(mine)

    def _flat_keys(self) -> tuple[list[str], dict[str, Tensor]]:
        """Which state the optimizer keeps per element, and its scalars ("step"),
        which all partitions share."""
        for flat, state in self.basic.state.items():
            like = [k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape and v.ndim]
            return like, {k: to_cpu(torch.as_tensor(v)) for k, v in state.items() if k not in like}
        return [], {}

    def _set_scalar(self, key: str, value: Tensor) -> None:
        for state in self.basic.state.values():
            old = state[key]
            # A copy each: optimizers count "step" up in place.
            state[key] = value.to(old, copy=True) if torch.is_tensor(old) else type(old)(value.item())

    def _create_state(self) -> None:
        """Torch optimizers make their state in the first step: take one at rate zero with zero gradients."""
        optimizer = self.engine.optimizer
        stage3 = self.cfg.stage == 3
        flats = (
            optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
        )
        groups = self.basic.param_groups
        rates, members = [g["lr"] for g in groups], [g["params"] for g in groups]
        kept = [flat.grad for flat in flats]
        for flat in flats:
            flat.grad = torch.zeros_like(flat)
        groups[0]["params"] = list(flats)
        for group in groups:
            group["lr"] = 0.0
        for group in groups[1:]:
            group["params"] = []
        self.basic.step()
        for group, rate, member in zip(groups, rates, members, strict=True):
            group["lr"], group["params"] = rate, member
        for flat, grad in zip(flats, kept, strict=True):
            flat.grad = grad

    def _link_state(self) -> None:
        """Stages 1 and 2 map parameters to their pieces of optimizer state once, after the first group's
        first step, when other groups have none yet: do it again, or these are never found."""
        if self.cfg.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _shape(p: nn.Parameter) -> torch.Size:
    return getattr(p, "ds_shape", p.shape)  # a ZeRO-3 parameter is empty between uses


def _piece_of_gradient(p: Any, stage: int) -> Tensor | None:
    """This rank's part of it, whole steps' gradients averaged, between the backward and the step."""
    if stage == 3:
        return safe_get_local_grad(p)
    return None if p._hp_mapping is None else p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)


def _first(n: int, read: Callable[[], Tensor]) -> Tensor:
    """Without the padding of the last rank."""
    return read().reshape(-1)[:n]


def _disk_access(path: str, ctx: ParallelContext) -> None:
    """Compiled where it is not yet; without libaio DeepSpeed would fail with a traceback."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    if not Path(path).is_dir():
        raise ConfigError(f"zero.nvme_path: {path} is not a directory")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "zero.offload_optimizer: nvme needs libaio to compile DeepSpeed's disk access; install "
            "libaio-dev (Debian) or libaio-devel (Red Hat), or use cpu"
        )
    # the second loads the first
    compiled(PinMemoryBuilder(), AsyncIOBuilder(), says=ctx.local_rank == 0)


def _forgo_compiled_ops(ctx: ParallelContext) -> None:
    """On the CPU, DeepSpeed would compile a shared-memory all-reduce when it starts (45 s,
    needs a C++ compiler). Only its inference engine uses it. The dict of available ops is
    DeepSpeed's own switch board."""
    if ctx.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed greets every process with warnings that do not concern us, and
    calls collectives by old names."""
    old_names = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
