"""What of a run can be refused before any weights are read, and said on all ranks alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from hvtrain.adapters.attach import (
    add_adapter,
    check_kind,
    check_patterns,
    check_rows,
    how_of,
    linear_shapes,
    ranks_of,
    trained,
)
from hvtrain.adapters.lokr import LokrLinear
from hvtrain.adapters.table import kind_of
from hvtrain.config import (
    AdapterConfig,
    DataConfig,
    LoraFileConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SparseConfig,
    ZeroConfig,
    asset,
)
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.lorafiles.experts import check_range
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.metadata import EXPERT_KEY, SUM_KEY, Under
from hvtrain.models.dit import DiT, Grid
from hvtrain.models.kernels import pick_kernel
from hvtrain.models.load import float8_shapes, identify, load_dit
from hvtrain.models.measure import LONG
from hvtrain.models.sparse import pick_sparse
from hvtrain.models.sparse_masks import kept_note
from hvtrain.parallel import xfuser_path
from hvtrain.parallel.apply import EXACT, parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.products import check_products, pick_products
from hvtrain.parallel.recompute import pick_policy
from hvtrain.parallel.swap import swap_savings
from hvtrain.slices.plan import SlicePlan
from hvtrain.train import checkpoint
from hvtrain.train.engine import check_engine
from hvtrain.train.optim import check_optimizer
from hvtrain.train.runlock import RunLock
from hvtrain.train.setup import Origin, find_idle
from hvtrain.weights.containers import open_weights
from hvtrain.weights.float8 import NO_PRODUCTS, Chosen, use_products
from shards import ShardError, ShardSet

T = TypeVar("T")


def on_all(ctx: ParallelContext, work: Callable[[], T]) -> T:
    """`work` on every rank; the first refusal of any (a file that one node lacks)
    is raised on all. Collective."""
    refusal, result = None, None
    try:
        result = work()
    except (HvtrainError, ShardError, OSError) as error:
        refusal = error
    said = [error for error in ctx.gather_objects(refusal) if error is not None]
    if refusal or said:
        raise refusal or said[0]
    return result  # type: ignore[return-value]


def take(output: Path, claim: Callable[[], RunLock], ctx: ParallelContext) -> tuple[RunLock, Path | None]:
    """The run's directory, held by rank 0, and the checkpoint to continue from. Refusals
    are raised on all ranks alike.

    Raises ConfigError, CheckpointError and Busy. Collective.
    """
    lock, found = RunLock(output), None

    def claimed() -> None:
        nonlocal lock, found
        if not ctx.is_main:
            return
        lock = claim()
        try:
            found = checkpoint.newest_sound(output / "checkpoints", say)
        except BaseException:
            lock.release()
            raise

    on_all(ctx, claimed)
    return lock, ctx.gather_objects(found)[0]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_machinery(
    zero: ZeroConfig, optim: OptimConfig, parallel: ParallelConfig, ctx: ParallelContext, *, recompute: str,
    dtype: torch.dtype, model: ModelConfig, ratios: bool = False, sparse: SparseConfig = EXACT,
) -> None:
    """What a run computes with, whatever the model."""
    check_products(model.fp8_matmul, model.quantize, device=ctx.device, dtype=dtype)
    check_engine(zero)
    check_optimizer(optim, zero, ratios=ratios)
    pick_policy(recompute)
    if parallel.kernel == xfuser_path.NAME:
        xfuser_path.refuse(ctx, training=True)
    else:
        dense = pick_kernel(parallel.kernel, device=ctx.device, dtype=dtype, training=True)
        pick_sparse(sparse, dense=dense, device=ctx.device, dtype=dtype)


def check_weights(
    base: Origin, zero: ZeroConfig, ctx: ParallelContext, *, whole: bool, n_bytes: int,
    blocks_to_swap: int = 0, n_models: int = 1,
) -> None:
    """Whether the weights of `n_models` like this can lie where they are to, `n_bytes` a value, and with
    `whole` their gradients. What else a run needs, `hvtrain fit` tells. Raises ConfigError."""
    model = base.outline.requires_grad_(False)
    least = n_bytes * sum(p.numel() for p in model.parameters())
    if blocks_to_swap:
        least -= swap_savings(model.blocks, blocks_to_swap) * n_bytes // 4  # the outline is float32
    least *= n_models
    gradients = least if whole else 0
    if zero.engine == "deepspeed":
        if zero.stage == 3:
            least = 0 if zero.offload_param != "none" else least // ctx.world
        gradients //= ctx.world if zero.stage > 1 else 1
        gradients = 0 if zero.offload_optimizer != "none" else gradients
    if least + gradients > ctx.memory_bytes:
        what = "weights and their gradients" if whole else "frozen weights"
        raise ConfigError(
            f"the {what} alone take {(least + gradients) / 2**30:.1f} GiB of each process's "
            f"{ctx.device_name}, which has {ctx.memory_bytes / 2**30:.1f} GiB; `hvtrain fit CONFIG` says "
            "what fits"
        )


def idle_on_host(
    bases: Sequence[Origin], where: str, zero: ZeroConfig, ctx: ParallelContext, *, whole: bool, n_bytes: int
) -> bool:
    """Whether the frozen weights of an expert that is not computed with are in host memory."""
    if len(bases) == 1 or whole or (zero.engine == "deepspeed" and zero.stage == 3):
        return False
    n = sum(p.numel() for base in bases for p in base.outline.parameters())
    return (
        where == "host"
        or (where == "auto" and ctx.device.type != "cpu" and n * n_bytes > ctx.memory_bytes / 2)
    )


def find_others(model: ModelConfig, bases: Sequence[Origin]) -> dict[str, Origin]:
    """The experts that a run does not train, by name: its previews are made with all. Raises ConfigError."""
    try:
        return find_idle(model, bases)
    except ConfigError as error:
        name = bases[0].flavor.name
        raise ConfigError(
            f"preview.every_steps: '{name}' makes videos with all experts: {error}, or set it to 0"
        ) from None


def open_idle(
    base: Origin, model: ModelConfig, ctx: ParallelContext, *, kernel: str, dtype: torch.dtype,
    sparse: SparseConfig = EXACT, float8: Chosen = NO_PRODUCTS,
) -> DiT:
    """A DiT that only makes videos, whole on every rank. Collective."""
    dit = load_dit(
        str(base.path), model=model.name, flavor=model.flavor, dtype=getattr(torch, model.dtype),
        device=ctx.device, quantize_to=model.quantize,
    ).model.eval().requires_grad_(False)
    use_products(dit, float8)
    parallelize(dit, ctx, kernel=kernel, dtype=dtype, training=False, sparse=sparse)
    return dit


def pick_float8(
    bases: Sequence[Origin], model: ModelConfig, sets: Sequence[ShardSet], ctx: ParallelContext, *,
    data: DataConfig, dtype: torch.dtype,
) -> Chosen:
    """Which layers multiply in float8, for batches of the largest clips. Collective."""
    shapes: set[tuple[int, int]] = set()
    for base in bases if model.quantize != "none" else ():
        if base.path is not None:
            found = identify(base.path, model=model.name, flavor=model.flavor)
            shapes |= float8_shapes(found, model.quantize)
    longest = max(map(math.prod, grids(bases[0], sets)), default=LONG.tokens)
    tokens = max(longest * data.batch_size, data.batch_tokens or 0) // ctx.sp
    return pick_products(
        model.fp8_matmul, shapes, ctx, dtype=dtype, tokens=tokens, learns=True,
        factors=model.quantize != "fp8",
    )


def check_silent(zero: ZeroConfig, *, whole: bool) -> None:
    """Samples on which the adapter shall change nothing."""
    if whole:
        raise ConfigError(
            "data.mixture: silent is what an adapter is on those samples; adapter.type none trains all "
            "weights"
        )
    if zero.engine == "deepspeed" and zero.stage == 3:
        raise ConfigError(
            "data.mixture: silent samples take another forward pass on the ranks that have them, and under "
            "ZeRO-3 every rank must take part in each; use zero.stage 0, 1 or 2"
        )


def subject_note(a: AdapterConfig) -> str:
    """What is trained, in words."""
    if a.type == "none":
        return "some weights" if a.train or a.freeze else "all weights"
    kind = kind_of(a.type, a.slice_type).LABEL
    if a.type == "loraid":
        kind = f"LORAID {a.loraid}{'' if kind == 'LoRA' else f', a {kind}'}"
    return f"{kind} rank {a.rank}"


def lora_note(lora: LoraFileConfig) -> dict[str, object]:
    """A LoRA that is in the base, with the sum of its tensors, by which a merge knows it again."""
    known = open_weights(asset(lora.path)).metadata
    return Under(Path(lora.path).name, lora.multiplier, known.get(SUM_KEY)).entry


def sparse_note(cfg: SparseConfig, base: Origin, sets: Sequence[ShardSet]) -> str:
    """A line of what a run leaves out; nothing where attention is exact."""
    if cfg.pattern == "none":
        return ""
    return kept_note(cfg, grids(base, sets), len(base.outline.blocks)) + "\n"


def grids(base: Origin, sets: Iterable[ShardSet]) -> list[Grid]:
    """Tokens of each size of clip."""
    latent, found = base.flavor.latent, []
    for bucket in {bucket for found in sets for bucket in found.groups()}:
        frames, height, width = map(int, bucket.split("x"))
        found.append(latent.grid(latent.shape(frames=frames, height=height, width=width)))
    return found


def check_whole(base: Origin, a: AdapterConfig) -> None:
    """Of a full fine-tune: which weights."""
    names = trained([n for n, _ in base.outline.named_parameters()], train=a.train, freeze=a.freeze)
    check_patterns({"adapter.lr_ratios": a.lr_ratios}, names)


def check_adapter(base: Origin, a: AdapterConfig, plan: SlicePlan | None) -> None:
    """A pair of a higher rank than its layer says nothing more, and an absurd one fills the host's memory.
    The file to start from is read, and tried on the model without weights."""
    kind, shapes = kind_of(a.type, a.slice_type), linear_shapes(base.outline)
    check_kind(kind, a.dropout, how_of(a))
    names = base.spec.lora_targets(base.outline, include=a.include, exclude=a.exclude)
    if plan is not None:
        slots = plan.slice(a.loraid or 0).slots
        names = [s.module for s in slots]
        for s in slots:
            check_rows(kind, s.module, (s.begin, s.end), shapes[s.module][0])
    check_patterns(
        {"adapter.lr_ratios": a.lr_ratios},
        [f"{name}.{part}" for name in names for part in kind.PARTS.values()]
    )
    rank = max(rank for rank, _ in ranks_of(a, names).values())
    largest = max(names, key=lambda name: min(shapes[name]))
    bound, (n_out, n_in) = min(shapes[largest]), shapes[largest]
    if rank > bound and kind is not LokrLinear:  # a high rank of a LoKr says that its large matrix is whole
        raise ConfigError(
            f"adapter.rank is {rank}, but a layer of {n_in} x {n_out} ('{largest}', the largest it adapts) "
            f"has no more than {bound}; expected 1 to {bound}, as a rule 8 to 128"
        )
    if a.init_from is not None:
        add_adapter(base.outline, base.spec, a, plan, seed=0)
        start = LoraFile(Path(a.init_from), {}, dict(open_weights(Path(a.init_from)).metadata))
        said = start.metadata.get(EXPERT_KEY)
        if base.expert is not None and said not in (None, base.expert.name):
            raise ConfigError(
                f"adapter.init_from: {a.init_from} was trained as the expert '{said}', this is "
                f"'{base.expert.name}', for other "
                "noise levels; give that expert's ({expert} in the name stands for it)"
            )
        if base.expert is not None:
            check_range(start, base.expert)
