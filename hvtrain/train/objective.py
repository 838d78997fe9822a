"""One micro-step: a batch of samples becomes a loss. Knows nothing of engines, ranks' groups or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hvtrain.adapters.attach import without_adapters
from hvtrain.config import FlowConfig
from hvtrain.flow.loss import Measure, add_noise, target
from hvtrain.flow.timesteps import Quantile, quantile_function, stratified
from hvtrain.models.conditions import drop
from hvtrain.models.precision import autocast
from hvtrain.models.spec import Field, Flavor, ModelSpec
from hvtrain.rng import generator

NOT_TOLD = ("latents", "mask", "silent")  # of a batch: no condition of the model


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
    kept: float = 1.0  # share of attention's pairs of image tokens that were computed


@dataclass(frozen=True)
class Objective:
    """Flow matching for one model and task."""

    spec: ModelSpec
    task: str
    guidance: float | None  # embedded; None: the model embeds none
    quantile: Quantile
    device: torch.device
    autocast: bool
    measure: Measure = field(default_factory=Measure)
    noise_offset: float = 0.0
    masked: bool = False  # by the batch's `mask` [B 1 T h w]

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], where: Where) -> MicroResult:
        """Draw sigma and noise for this place in the run, and compare velocities.
        `batch`: see shards.loader."""
        part, n_parts = where.micro * where.dp + where.dp_rank, where.n_micro * where.dp
        u = stratified(len(batch["latents"]), seed=where.seed, step=where.step, part=part, n_parts=n_parts)
        draw = generator(
            where.seed, step=where.step, micro=where.micro, dp_rank=where.dp_rank, stream="noise"
        )
        return self.compare(model, batch, sigma=self.quantile(u, batch["latents"].shape), draw=draw)

    def compare(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, sigma: Tensor, draw: torch.Generator
    ) -> MicroResult:
        """The loss at given noise levels [B]; also what the held-out loss uses. `silent` [B] in the
        batch: which samples are to give what the model gives without its adapter. That costs another
        forward pass, where there are any."""
        latents = batch["latents"]
        noise = torch.randn(latents.shape, generator=draw)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn(*latents.shape[:2], 1, 1, 1, generator=draw)
        noise = noise.to(self.device)
        # pinned batches are copied while the GPU computes
        x0 = latents.to(self.device, non_blocking=True).float()
        sigma = sigma.to(self.device, torch.float32)
        # Lengths stay on the CPU: the model reads them as numbers, and to fetch them would
        # wait for all the GPU's work.
        cond = {
            n: v if n.endswith("_len") else self._placed(v) for n, v in batch.items() if n not in NOT_TOLD
        }
        noised = add_noise(x0, noise, sigma)
        inp = self.spec.make_input(noised, sigma, cond, task=self.task, guidance=self.guidance, x0=x0)
        with autocast(self.device.type, enabled=self.autocast):
            velocity = model(inp)
        mask = inp.loss_mask
        if self.masked:
            own = self._placed(batch["mask"])
            mask = own if mask is None else own * mask
        wanted = target(x0, noise)
        if "silent" in batch and batch["silent"].any():
            with torch.no_grad(), without_adapters(model), autocast(self.device.type, enabled=self.autocast):
                unchanged = model(inp).to(wanted)
            silent = batch["silent"].to(self.device).view(-1, *[1] * (wanted.ndim - 1))
            wanted = torch.where(silent, unchanged, wanted)
        errors = self.measure(velocity, wanted, sigma, mask)
        return MicroResult(errors.mean(), errors.detach(), sigma)

    def _placed(self, value: Tensor) -> Tensor:
        """Stored in bf16, computed from float32: without autocast a bf16 input
        would not meet float32 weights."""
        there = value.to(self.device, non_blocking=True)
        return there.float() if there.is_floating_point() else there


def objective_of(
    flow: FlowConfig, spec: ModelSpec, flavor: Flavor, *, device: torch.device, autocast: bool
) -> Objective:
    """As a config has it, whose nulls are filled in (`setup.flow_of`). Raises ConfigError."""
    guidance = flow.guidance
    if flow.raw_guidance and guidance is not None:
        guidance = guidance / 1000  # the model multiplies it by that
    measure = Measure(flow.loss, flow.huber_c, flow.huber_schedule, flow.weighting, flow.snr_gamma)
    quantile = quantile_function(flow.timestep_sampling, flow, flavor)
    return Objective(
        spec, flavor.tasks[0], guidance, quantile, device, autocast, measure, flow.noise_offset, flow.masked
    )


def drop_captions(
    batch: Mapping[str, Tensor], empty: Mapping[str, Tensor], *, shares: Sequence[float],
    draw: torch.Generator, fields: Sequence[Field],
) -> dict[str, Tensor]:
    """Give each sample, with its own probability, the empty prompt's embeddings instead of its caption's."""
    dropped = torch.rand(len(shares), generator=draw) < torch.tensor(shares)
    return drop(batch, empty, dropped, fields) if dropped.any() else dict(batch)
