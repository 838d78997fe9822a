"""Memory of one rank by component: what each engine keeps, put together with a trace of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvtrain.fit.trace import Trace

STATE_BYTES = 8  # Adam's two moments in fp32, per trained value
_LIVE = 10**9  # elements that DeepSpeed's stage 3 keeps gathered (its default)
_PREFETCH = 1 << 28  # as train/zero.py sets it
_BUCKET = 1 << 28
_TORCH_BUCKET = 1 << 26


@dataclass(frozen=True)
class Layout:
    """What of a config decides memory, besides the step itself."""

    engine: str = "deepspeed"
    stage: int = 2
    offload_optimizer: bool = False
    offload_param: bool = False
    world: int = 1
    bucket_mb: float | None = None
    overlap: bool = True  # DeepSpeed on CUDA reduces a full fine-tune's gradients in the backward, from two buckets
    freed_by_swap: int = 0

    @property
    def keeps_gradients(self) -> bool:
        """Whether all gradients stay until the step; ZeRO 2 and 3 reduce and drop them as they come."""
        return self.engine == "torch" or self.stage < 2


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank. `total` is the worst moment, which can be less than the sum: gradients fill up while activations
    go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    total: int

    def parts(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in ("weights", "gradients", "optimizer", "activations", "buffers")}


def budget(counts: Mapping[str, int], trace: Trace, layout: Layout) -> Budget:
    """`counts`: see trace.byte_counts; `trace` is of a micro-step with gradients kept or dropped as the layout says."""
    n, trained, frozen = counts["n_trained"], counts["trained"], counts["frozen"] - layout.freed_by_swap
    if n == 0:
        return Budget(frozen, 0, 0, trace.peak_bytes, 0, frozen + trace.peak_bytes)
    activations = trace.peak_bytes - trace.gradient_bytes
    if layout.engine == "torch" or layout.stage == 0:
        weights, gradients, optimizer = frozen + trained, 4 * n, STATE_BYTES * n
        reduced = 4 * min(n, _TORCH_BUCKET if layout.engine == "torch" else n) if layout.world > 1 else 0
        buffers = reduced
        peak = max(trace.peak_bytes, gradients + reduced)
        return Budget(weights, gradients, optimizer, activations, buffers, weights + optimizer + peak)
    return _sharded(n, trained, frozen, activations, trace, layout)


def _sharded(n: int, trained: int, frozen: int, activations: int, trace: Trace, layout: Layout) -> Budget:
    """ZeRO 1 to 3: an fp32 copy and the moments of this rank's part, and what is in flight."""
    part = -(-n // layout.world)
    largest = _BUCKET if layout.bucket_mb is None else int(layout.bucket_mb * 2**18)
    bucket = 4 * min(n, largest)
    optimizer = 0 if layout.offload_optimizer else (4 + STATE_BYTES) * part
    gradients = 4 * n if layout.keeps_gradients else (0 if layout.offload_optimizer else 4 * part)
    buffers = bucket * (2 if layout.overlap else 1)
    weights = frozen + trained
    if layout.stage == 3:
        whole = weights
        size = max(1, whole // max(1, n)) if not frozen else 2
        held = 0 if layout.offload_param else -(-whole // layout.world)
        weights = held + min(whole, (_LIVE + _PREFETCH) * size)
    in_step = gradients + (0 if layout.offload_optimizer else 4 * part)  # this rank's gradients once more, flat
    in_backward = trace.peak_bytes + buffers + (0 if layout.keeps_gradients else gradients)
    return Budget(weights, gradients, optimizer, activations, buffers, weights + optimizer + max(in_step, in_backward))
