"""One micro-step: a batch of samples becomes a loss. Knows nothing of engines, ranks' groups or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hvtrain.flow.loss import add_noise, squared_error, target
from hvtrain.flow.timesteps import Quantile, stratified
from hvtrain.models.conditions import drop
from hvtrain.models.precision import autocast
from hvtrain.models.spec import Field, ModelSpec
from hvtrain.rng import generator


@dataclass(frozen=True)
class Where:
    """The place of a micro-step in the run: all that its random numbers depend on."""

    seed: int
    step: int
    micro: int
    n_micro: int
    dp_rank: int
    dp: int


@dataclass(frozen=True)
class MicroResult:
    loss: Tensor  # scalar with a graph: the mean over this rank's samples
    per_sample: Tensor  # [B], detached
    sigma: Tensor  # [B]


@dataclass(frozen=True)
class Objective:
    """Flow matching for one model and task."""

    spec: ModelSpec
    task: str
    guidance: float | None  # embedded; None: the model embeds none
    quantile: Quantile
    device: torch.device
    autocast: bool

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], where: Where) -> MicroResult:
        """Draw sigma and noise for this place in the run, and compare velocities. `batch`: see shards.loader."""
        part, n_parts = where.micro * where.dp + where.dp_rank, where.n_micro * where.dp
        u = stratified(len(batch["latents"]), seed=where.seed, step=where.step, part=part, n_parts=n_parts)
        draw = generator(where.seed, step=where.step, micro=where.micro, dp_rank=where.dp_rank, stream="noise")
        return self.compare(model, batch, sigma=self.quantile(u), draw=draw)

    def compare(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, sigma: Tensor, draw: torch.Generator
    ) -> MicroResult:
        """The loss at given noise levels [B]; also what the held-out loss uses."""
        latents = batch["latents"]
        noise = torch.randn(latents.shape, generator=draw).to(self.device)
        x0 = latents.to(self.device, non_blocking=True).float()  # pinned batches are copied while the GPU computes
        sigma = sigma.to(self.device, torch.float32)
        # Lengths stay on the CPU: the model reads them as numbers, and to fetch them would wait for all the GPU's work.
        cond = {n: v if n.endswith("_len") else self._placed(v) for n, v in batch.items() if n != "latents"}
        noised = add_noise(x0, noise, sigma)
        inp = self.spec.make_input(noised, sigma, cond, task=self.task, guidance=self.guidance, x0=x0)
        with autocast(self.device.type, enabled=self.autocast):
            velocity = model(inp)
        errors = squared_error(velocity, target(x0, noise), inp.loss_mask)
        return MicroResult(errors.mean(), errors.detach(), sigma)

    def _placed(self, value: Tensor) -> Tensor:
        """Stored in bf16, computed from float32: without autocast a bf16 input would not meet float32 weights."""
        there = value.to(self.device, non_blocking=True)
        return there.float() if there.is_floating_point() else there


def drop_captions(
    batch: Mapping[str, Tensor], empty: Mapping[str, Tensor], *, shares: Sequence[float], draw: torch.Generator,
    fields: Sequence[Field],
) -> dict[str, Tensor]:
    """Give each sample, with its own probability, the empty prompt's embeddings instead of its caption's."""
    dropped = torch.rand(len(shares), generator=draw) < torch.tensor(shares)
    return drop(batch, empty, dropped, fields) if dropped.any() else dict(batch)
