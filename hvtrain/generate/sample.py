"""From prompts to latents: text encoders, DiT and solver, on all ranks that share a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hvtrain.adapters.attach import merging
from hvtrain.config import GenerateConfig, ModelConfig, asset
from hvtrain.errors import ConfigError, DataError
from hvtrain.flow.guidance import classifier_free
from hvtrain.flow.solvers import SOLVERS, State, Velocity
from hvtrain.generate.plan import Lot, Plan
from hvtrain.generate.progress import Sampling
from hvtrain.generate.requests import Request
from hvtrain.generate.spool import find, keep
from hvtrain.generate.stop import Stop, Stopped
from hvtrain.generate.write import free, parameters
from hvtrain.models.conditions import batch_of_one, stack
from hvtrain.models.dit import DiT
from hvtrain.models.load import load_dit
from hvtrain.models.parts import open_text
from hvtrain.models.precision import autocast
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.swap import BlockSwap
from hvtrain.rng import generator
from hvtrain.weights.float8 import use_matmul

Cond = Mapping[str, Tensor]  # a flavor's condition fields, batched


def encode_prompts(
    model: ModelConfig, spec: ModelSpec, flavor: Flavor, prompts: Sequence[str], ctx: ParallelContext
) -> list[dict[str, Tensor]]:
    """Each prompt's conditions as a batch of one, on the CPU. The encoders live on rank 0 only, and not for long."""
    found: list[dict[str, Tensor]] = []
    if ctx.is_main:
        encoders = open_text(spec, model, ctx.device)
        found = encoders.encode(list(prompts))
        del encoders
        free(ctx)
    return [batch_of_one(sample, flavor.cond) for sample in ctx.gather_objects(found)[0]]


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    spec: ModelSpec,
    flavor: Flavor,
    cond: Cond,
    *,
    request: Request,
    ctx: ParallelContext,
    uncond: Cond | None = None,
    seeds: Sequence[int] = (),
    begin: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> Tensor:
    """Scaled latents [B C T H W], float32, the same on every sequence-parallel rank. Collective among them.

    One video per entry of cond; all take the request's size and schedule, and its seed unless `seeds` has one for
    each. `uncond` holds the negative prompts, as many. The caller chooses autocast. `on_step` is called on every rank
    after each step; `begin` goes on from such a state, x [B C T H W], and ends with the same latents.
    """
    seeds = seeds or [request.seed]
    n = len(next(iter(cond.values())))
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds for {n} prompts")
    if uncond is None and request.cfg_scale != 1:
        raise ConfigError(f"cfg_scale {request.cfg_scale} needs a negative prompt's conditions; set it to 1 without")

    def velocity_under(condition: Cond) -> Velocity:
        # Lengths stay on the CPU: the model reads them as numbers, and to fetch them would wait for all the GPU's work.
        here = {name: v if name.endswith("_len") else v.to(ctx.device) for name, v in condition.items()}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return model(spec.make_input(x, sigma, here, task=flavor.tasks[0], guidance=request.guidance))

        return velocity

    velocity = velocity_under(cond)
    if uncond is not None and request.cfg_scale != 1:
        velocity = classifier_free(velocity, velocity_under(uncond), request.cfg_scale)
    if begin is None:
        shape = flavor.latent.shape(frames=request.frames, height=request.height, width=request.width)
        # On the CPU whatever the device, and per video: neither the machine nor the batch changes a seed's video.
        noise = torch.stack([torch.randn(shape, generator=generator(seed, stream="video")) for seed in seeds])
        begin = State(noise)
    state = State(begin.x.to(ctx.device), begin.step, tuple(h.to(ctx.device) for h in begin.history))
    solver = SOLVERS["euler"]
    schedule = solver.schedule(request.steps, shift=request.shift)
    while state.step < request.steps:
        state = solver.step(velocity, state, schedule)
        if on_step is not None:
            on_step(state)
    return state.x


def sample_lots(
    cfg: GenerateConfig, plan: Plan, lots: Sequence[Lot], conds: Mapping[str, Cond], *, ctx: ParallelContext, stop: Stop
) -> Iterator[Lot]:
    """Each lot when its latents are on the disk; the DiT lives in here. Collective among the ranks that share videos.

    Raises Stopped at the end of a step, with what is under way on the disk too, and DataError for latents that are not finite.
    """
    if not lots:
        return
    model = open_dit(cfg, plan, ctx)
    stop.check()
    with Sampling(sum(lot.n_left for lot in lots), show=ctx.is_main) as progress:
        for lot in lots:
            first = lot.jobs[0].request

            def on_step(state: State, lot: Lot = lot) -> None:
                progress.step()
                _refuse_broken(lot, state.step, state.x)
                if state.step < lot.jobs[0].request.steps and stop.agreed():
                    keep_lot(cfg, plan, lot, state, ctx=ctx)
                    raise Stopped

            with autocast(ctx.device.type, enabled=cfg.precision == "bf16"):
                texts = [job.request.negative_prompt for job in lot.jobs] if first.cfg_scale != 1 else []
                latents = sample_latents(
                    model,
                    plan.spec,
                    plan.flavor,
                    stack([conds[job.request.prompt] for job in lot.jobs], plan.flavor.cond),
                    request=first,
                    ctx=ctx,
                    uncond=stack([conds[text] for text in texts], plan.flavor.cond) if texts else None,
                    seeds=[job.request.seed for job in lot.jobs],
                    begin=_begin(plan, lot),
                    on_step=on_step,
                )
            keep_lot(cfg, plan, lot, State(latents, first.steps), ctx=ctx)
            del latents
            yield lot
    del model
    free(ctx)


def keep_lot(cfg: GenerateConfig, plan: Plan, lot: Lot, state: State, *, ctx: ParallelContext) -> None:
    """A lot's latents to the disk, each video's in a file of its own: by the first of the ranks that share it."""
    if ctx.sp_rank == 0:
        for job, x, *history in zip(lot.jobs, state.x.cpu(), *(h.cpu() for h in state.history), strict=True):
            identity = plan.sources.latents(job.request)
            one = State(x, state.step, tuple(history))
            keep(job.output, one, identity=identity, parameters=parameters(cfg, plan, job.request))


def _begin(plan: Plan, lot: Lot) -> State | None:
    """Where a run before was stopped."""
    if not lot.step:
        return None
    found = [find(job.output, plan.sources.latents(job.request)) for job in lot.jobs]
    sound = [kept for kept in found if kept is not None and kept.step == lot.step]
    if len(sound) < len(lot.jobs):
        raise DataError(f"{lot.jobs[0].output.parent}: the latents that process 0 found there are not seen by every process")
    history = zip(*(kept.history for kept in sound), strict=True)
    return State(torch.stack([kept.x for kept in sound]), lot.step, tuple(map(torch.stack, history)))


def _refuse_broken(lot: Lot, n: int, x: Tensor) -> None:
    """NaN would become a black video."""
    for job, one in zip(lot.jobs, x, strict=True):
        if not torch.isfinite(one).all():
            r = job.request
            raise DataError(
                f"{job.output}: its latents are not finite after step {n} of {r.steps} (guidance {r.guidance}, cfg_scale "
                f"{r.cfg_scale:g}, shift {r.shift:g}): the weights, a LoRA or its multiplier, or model.dtype does it; try "
                "without LoRAs, then precision=fp32 with model.dtype=float32"
            )


def open_dit(cfg: GenerateConfig, plan: Plan, ctx: ParallelContext) -> DiT:
    loaded = load_dit(
        asset(str(cfg.model.dit)),
        model=cfg.model.name,
        flavor=cfg.model.flavor,
        dtype=getattr(torch, cfg.model.dtype),
        device="cpu" if cfg.blocks_to_swap else ctx.device,  # what is to be swapped must not fill the device first
        quantize_to=cfg.model.quantize,
        edit=merging(plan.layers, plan.loras),
    )
    model = loaded.model.eval().requires_grad_(False)
    use_matmul(model, cfg.model.fp8_matmul)
    swap = BlockSwap(model.blocks, cfg.blocks_to_swap, ctx.device) if cfg.blocks_to_swap else None
    model.to(ctx.device)
    compute = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    kernel = parallelize(model, ctx, kernel=cfg.parallel.kernel, dtype=compute, training=False, swap=swap)
    if ctx.is_main:
        swapped = f", {swap.describe()}" if swap else ""
        print(f"{ctx.device_name}, Ulysses {ctx.ulysses} x ring {ctx.ring}, {kernel.name} attention{swapped}", flush=True)
    return model
