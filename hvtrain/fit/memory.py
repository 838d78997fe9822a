"""Memory of one rank by component: what each engine keeps, put together with a trace of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hvtrain.config import ZeroConfig
from hvtrain.fit.trace import Trace
from hvtrain.train.zero_config import PREFETCH

_LIVE = 10**9  # elements that DeepSpeed's stage 3 keeps gathered (its default)
_BUCKET = 1 << 28
_TORCH_BUCKET = 1 << 26


@dataclass(frozen=True)
class Layout:
    """What decides memory, besides the step itself."""

    zero: ZeroConfig = field(default_factory=ZeroConfig)
    world: int = 1
    # DeepSpeed on CUDA reduces a full fine-tune's gradients in the backward, from two buckets
    overlap: bool = True
    freed_by_swap: int = 0
    state_bytes: float = 8.0  # of the optimizer, per trained value: Adam's two moments in fp32

    @property
    def keeps_gradients(self) -> bool:
        """Whether all gradients stay until the step; ZeRO 2 and 3 reduce and drop them as they come."""
        return self.zero.engine == "torch" or self.zero.stage < 2


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank. `total` is the worst moment, which can be less than the sum: gradients
    fill up while activations go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    total: int

    def parts(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in ("weights", "gradients", "optimizer", "activations", "buffers")}


def budget(counts: Mapping[str, int], trace: Trace, layout: Layout) -> Budget:
    """`counts`: see trace.byte_counts; `trace` is of a micro-step with gradients kept or
    dropped as the layout says."""
    n, trained, frozen = counts["n_trained"], counts["trained"], counts["frozen"] - layout.freed_by_swap
    if n == 0:
        return Budget(frozen, 0, 0, trace.peak_bytes, 0, frozen + trace.peak_bytes)
    activations = trace.peak_bytes - trace.gradient_bytes
    if layout.zero.engine == "torch" or layout.zero.stage == 0:
        weights, gradients, optimizer = frozen + trained, 4 * n, int(layout.state_bytes * n)
        buffers = 4 * min(n, _TORCH_BUCKET if layout.zero.engine == "torch" else n) if layout.world > 1 else 0
        peak = max(trace.peak_bytes, gradients + buffers)
        return Budget(weights, gradients, optimizer, activations, buffers, weights + optimizer + peak)
    return _sharded(n, trained, frozen, activations, trace, layout)


def beside(one: Budget, counts: Mapping[str, int], layout: Layout, *, n: int, on_host: bool) -> Budget:
    """With `n` more models like it that take turns: their weights, the frozen ones on the device
    or not, and optimizer state."""
    held = counts["trained"] + (0 if on_host else counts["frozen"] - layout.freed_by_swap)
    if layout.zero.engine == "deepspeed" and layout.zero.stage == 3:
        held = 0 if layout.zero.offload_param != "none" else -(-held // layout.world)
    more, state = n * held, n * one.optimizer
    return replace(
        one, weights=one.weights + more, optimizer=one.optimizer + state, total=one.total + more + state
    )


@dataclass(frozen=True)
class Host:
    """Bytes of host memory of a full fine-tune: of rank 0 while it loads and while the job saves,
    of every rank all the time."""

    load: int
    resident: int
    save: int


def host(counts: Mapping[str, int], largest: int, layout: Layout) -> Host:
    """`largest`: bytes of the largest tensor, fp32.

    ZeRO-3 cuts up what rank 0 has read, and saves piece by piece: a rank's part of one tensor at a
    time; on rank 0 also one whole tensor, and in bf16, of the result that is made of the parts.
    Else rank 0 has all that is saved.
    """
    n, weights = counts["n_trained"], counts["trained"] + counts["frozen"]
    if layout.zero.engine == "torch" or layout.zero.stage < 3:
        return Host(0, _offloaded(n, weights, layout), int((4 + layout.state_bytes + 2) * n))
    return Host(weights, _offloaded(n, weights, layout), -(-largest // layout.world) + largest + largest // 2)


def _offloaded(n: int, weights: int, layout: Layout) -> int:
    part, zero = -(-n // layout.world), layout.zero
    # and gradients
    state = int((4 + layout.state_bytes + 4) * part) if zero.offload_optimizer == "cpu" else 0
    return state + (-(-weights // layout.world) if zero.offload_param == "cpu" else 0)


def _sharded(n: int, trained: int, frozen: int, activations: int, trace: Trace, layout: Layout) -> Budget:
    """ZeRO 1 to 3: an fp32 copy and the moments of this rank's part, and what is in flight."""
    zero, part = layout.zero, -(-n // layout.world)
    bucket = 4 * min(n, _BUCKET if zero.bucket_mb is None else int(zero.bucket_mb * 2**18))
    own = 0 if zero.offload_optimizer != "none" else 4 * part  # this rank's gradients, flat
    optimizer = 0 if zero.offload_optimizer != "none" else int((4 + layout.state_bytes) * part)
    gradients = 4 * n if layout.keeps_gradients else own
    buffers = bucket * (2 if layout.overlap else 1)
    weights = frozen + trained
    if zero.stage == 3:
        size = max(1, weights // max(1, n)) if not frozen else 2
        held = 0 if zero.offload_param != "none" else -(-weights // layout.world)
        weights = held + min(weights, (_LIVE + PREFETCH) * size)
    in_step = gradients + own  # once more
    in_backward = trace.peak_bytes + buffers + (0 if layout.keeps_gradients else gradients)
    return Budget(
        weights, gradients, optimizer, activations, buffers, weights + optimizer + max(in_step, in_backward)
    )
