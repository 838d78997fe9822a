"""Model FLOPs utilization: the operations that training needs, as a share of what the
devices could do in that time.

Recomputed activations do not count. A DiT's operations are a quadratic polynomial in its image tokens (linear
layers and attention), so three traces of the real code on tensors without values give those of every size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hvtrain.config import AdapterConfig, ModelConfig, ParallelConfig, RunSettings, SparseConfig, ZeroConfig
from hvtrain.models.dit import Grid
from hvtrain.models.sparse_masks import kept_share
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import EXACT

# Dense bf16 TFLOPS by the makers' data sheets; the first name that is in the device's.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "GH200": 989, "GB200": 2500,
    "B200": 2250, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125,
    "A6000": 155, "RTX 6000 Ada": 364, "5090": 209, "4090": 165, "3090": 71, "MI300X": 1307, "MI250X": 383,
}


@dataclass(frozen=True)
class Work:
    """Operations of one sample forward and backward, a + b n + c n^2 of n image tokens, the last for their
    attention among each other; and a device's per second."""

    a: float
    b: float
    c: float
    peak: float
    sparse: SparseConfig = EXACT
    n_blocks: int = 1

    def flops(self, n_tokens: int, kept: float = 1.0) -> float:
        """`kept`: of the pairs of image tokens."""
        return self.a + self.b * n_tokens + self.c * n_tokens**2 * kept

    def kept(self, grid: Grid) -> float:
        return 1.0 if self.sparse.pattern == "none" else kept_share(self.sparse, grid, self.n_blocks)


def peak_of(device_name: str, tflops: float | None) -> float | None:
    """Operations per second of one device: as given, else of a GPU that is known."""
    if tflops is None:
        tflops = next((value for name, value in PEAKS.items() if name in device_name), None)
    return None if tflops is None else tflops * 1e12


def work_of(
    spec: ModelSpec, flavor: Flavor, model: ModelConfig, adapter: AdapterConfig, run: RunSettings, *,
    peak: float, sparse: SparseConfig = EXACT,
) -> Work:
    from hvtrain.fit.estimate import Candidate, Training, flops_of_sample
    from hvtrain.fit.trace import Shape

    # a slice's backward goes through all blocks too
    kind = "lora" if adapter.type == "loraid" else adapter.type
    cfg = Training(model, replace(adapter, type=kind), ParallelConfig(), ZeroConfig("torch", 0), run)
    counts, flops, (height, width) = [], [], flavor.latent.unit
    for times in (2, 4, 6):
        shape = Shape(1, 1, times * height, times * width)
        counts.append(
            flavor.latent.n_tokens(flavor.latent.shape(frames=1, height=shape.height, width=shape.width))
        )
        flops.append(flops_of_sample(cfg, Candidate(spec, flavor), shape))
    c, b, a = np.polyfit(np.array(counts, dtype=float), np.array(flops, dtype=float), 2)
    with torch.device("meta"):
        n_blocks = len(spec.build(flavor.arch).blocks)
    return Work(float(a), float(b), float(c), peak, sparse, n_blocks)
