"""From noise to latents: DiT and solver, on all ranks that share a video.

Where a flavor has experts, all videos are sampled with the one for much noise, then all with the next: each
is loaded once, and never two of them are in memory. In between, the solver's state of each video lies on the
disk, as when a run is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hvtrain.adapters.attach import merging
from hvtrain.errors import ConfigError, DataError
from hvtrain.flow.guidance import classifier_free
from hvtrain.flow.solvers import SOLVERS, State, Velocity
from hvtrain.generate.conditions import Cond, Conditions, free
from hvtrain.generate.loras import on_expert
from hvtrain.generate.plan import DIT, Lot, Plan, last_step, latent_shapes, phases
from hvtrain.generate.progress import StepsBar
from hvtrain.generate.requests import Request
from hvtrain.generate.spool import find, keep
from hvtrain.generate.stop import Stop, Stopped
from hvtrain.generate.write import parameters
from hvtrain.lorafiles.whole import editing, summed
from hvtrain.models.conditions import stack
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.load import load_dit
from hvtrain.models.precision import autocast
from hvtrain.models.sparse_masks import kept_note
from hvtrain.models.spec import Expert, Flavor, ModelSpec
from hvtrain.parallel.apply import largest_work, parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.products import note
from hvtrain.parallel.spread import spread_weights
from hvtrain.parallel.swap import BlockShards, BlockSwap
from hvtrain.rng import generator
from hvtrain.weights.float8 import use_products

Models = Callable[[float], Callable[[ModelInput], Tensor]]  # noise level -> the model that predicts there


@torch.no_grad()
def sample_latents(
    models: Models,
    spec: ModelSpec,
    flavor: Flavor,
    cond: Cond,
    *,
    request: Request,
    ctx: ParallelContext,
    uncond: Cond | None = None,
    seeds: Sequence[int] = (),
    x0: Tensor | None = None,
    begin: State | None = None,
    until: int | None = None,
    exact_steps: int = 0,
    on_step: Callable[[State], None] | None = None,
) -> Tensor:
    """Scaled latents [B C T H W], float32, the same on every sequence-parallel rank. Collective among them.

    One video per entry of cond; all take the request's size and schedule, and its seed unless `seeds` has one
    for each. `uncond` holds the negative prompts, as many; `x0` a clip's latents, for conditions that a model
    takes from there. The caller chooses autocast. `on_step` is called on every rank after each step; `begin`
    goes on from such a state and ends with the same latents, or with those after `until` steps. Sparse
    attention begins after `exact_steps`.
    """
    seeds, n = seeds or [request.seed], len(next(iter(cond.values())))
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds for {n} prompts")
    if uncond is None and request.guided:
        needed = "a negative prompt's conditions; set it to 1 without"
        raise ConfigError(f"cfg_scale {request.cfg_scale} needs {needed}")
    task, conds = flavor.tasks[0], [_placed(c, ctx.device) for c in (cond, uncond) if c is not None]
    solver = SOLVERS[request.solver]
    schedule = solver.schedule(request.steps, shift=request.shift)

    def given(x: Tensor, sigma: Tensor, which: int = 0, until: float = 0, exact: bool = False) -> ModelInput:
        cond = {**conds[which], "next_sigma": torch.full_like(sigma, until)}  # some are told a step's end
        made = spec.make_input(x, sigma, cond, task=task, guidance=request.guidance, x0=x0)
        return replace(made, exact=exact)

    def velocity_at(step: int) -> Velocity:
        level, until = (float(sigma) for sigma in schedule[step : step + 2])
        model, scale = models(level), request.scale(flavor.expert(level))

        def under(which: int) -> Velocity:
            return lambda x, sigma: model(given(x, sigma, which, until, step < exact_steps))

        return under(0) if scale == 1 else classifier_free(under(0), under(1), scale)

    if begin is None:
        noise = noise_of(flavor, request, seeds).to(ctx.device)
        begin = State(noise if spec.start is None else spec.start(noise, conds[0], task=task, x0=x0))
    x = begin.x.to(ctx.device)
    hold = _holding(given(x, torch.full((n,), float(schedule[0]), device=ctx.device)), channels=x.shape[1])
    state = State(x, begin.step, tuple(h.to(ctx.device) for h in begin.history))
    while state.step < (request.steps if until is None else until):
        state = solver.step(velocity_at(state.step), state, schedule)
        state = replace(state, x=hold(state.x))
        if on_step is not None:
            on_step(state)
    return state.x


def noise_of(flavor: Flavor, request: Request, seeds: Sequence[int]) -> Tensor:  # [B C T H W]
    """On the CPU whatever the device, and per video: neither machine nor batch changes a seed's video."""
    shape = flavor.latent.shape(frames=request.frames, height=request.height, width=request.width)
    return torch.stack([torch.randn(shape, generator=generator(seed, stream="video")) for seed in seeds])


def _holding(inp: ModelInput, *, channels: int) -> Callable[[Tensor], Tensor]:
    """Puts back the cells of the latents that a model's input gives and its loss leaves out, as an image in
    the first frame: the solver moves them too."""
    if inp.loss_mask is None:
        return lambda x: x
    where, value = inp.loss_mask == 0, inp.x[:, :channels]  # [B 1 T 1 1], [B C T H W]
    return lambda x: torch.where(where, value, x)


def _placed(cond: Cond, device: torch.device) -> dict[str, Tensor]:
    """Lengths stay on the CPU: the model reads them as numbers, and to fetch them would
    wait for all the GPU's work."""
    return {name: v if name.endswith("_len") else v.to(device) for name, v in cond.items()}


def sample_lots(
    plan: Plan, lots: Sequence[Lot], conds: Conditions, *, ctx: ParallelContext, stop: Stop
) -> Iterator[Lot]:
    """Each lot when its latents are on the disk; the DiT lives in here. Collective
    among the ranks that share videos.

    Raises Stopped at the end of a step, with what is under way on the disk too, and DataError
    for latents that are not finite.
    """
    if not lots:
        return
    lots = list(lots)
    with StepsBar(sum(lot.n_left for lot in lots), show=ctx.is_main) as progress:
        for expert in phases(plan.flavor):
            ends = [last_step(lot.jobs[0].request, expert) for lot in lots]
            if all(end <= lot.step for end, lot in zip(ends, lots, strict=True)):
                continue
            model = open_dit(plan, expert, ctx)
            stop.check()  # also: what another rank has put on the disk is there
            for i, end in enumerate(ends):
                if end > lots[i].step:
                    _sample(model, plan, lots[i], end, conds, ctx=ctx, stop=stop, progress=progress)
                    lots[i] = replace(lots[i], step=end)
                    if not lots[i].n_left:
                        yield lots[i]
            del model
            free(ctx.device)


def _sample(
    model: DiT, plan: Plan, lot: Lot, until: int, conds: Conditions, *, ctx: ParallelContext, stop: Stop,
    progress: StepsBar
) -> None:
    """A lot's next steps, to the disk."""
    requests, fields = [job.request for job in lot.jobs], plan.flavor.cond

    def on_step(state: State) -> None:
        progress.step()
        _refuse_broken(lot, state.step, state.x)
        stopped = state.step < requests[0].steps and stop.agreed()
        if stopped or state.step == until:
            keep_lot(plan, lot, state, ctx=ctx)
        if stopped:
            raise Stopped

    with autocast(ctx.device.type, enabled=plan.compute.precision == "bf16"):
        sample_latents(
            lambda sigma: model,
            plan.spec,
            plan.flavor,
            stack([conds.of(r) for r in requests], fields),
            request=requests[0],
            ctx=ctx,
            uncond=stack([conds.negative(r) for r in requests], fields) if requests[0].guided else None,
            seeds=[r.seed for r in requests],
            begin=_begin(plan, lot),
            until=until,
            exact_steps=plan.compute.sparse.exact_steps,
            on_step=on_step,
        )


def keep_lot(plan: Plan, lot: Lot, state: State, *, ctx: ParallelContext) -> None:
    """A lot's latents to the disk, each video's in a file of its own: by the first
    of the ranks that share it."""
    if ctx.sp_rank == 0:
        history = state.history if state.step < lot.jobs[0].request.steps else ()
        for job, x, *rest in zip(lot.jobs, state.x.cpu(), *(h.cpu() for h in history), strict=True):
            identity = plan.sources.latents(job.request)
            one = State(x, state.step, tuple(rest))
            keep(job.output, one, identity=identity, parameters=parameters(plan, job.request))


def _begin(plan: Plan, lot: Lot) -> State | None:
    """Where a run before was stopped, or another expert has come to."""
    if not lot.step:
        return None
    found = [find(job.output, plan.sources.latents(job.request)) for job in lot.jobs]
    sound = [kept for kept in found if kept is not None and kept.step == lot.step]
    if len(sound) < len(lot.jobs):
        raise DataError(
            f"{lot.jobs[0].output.parent}: the latents that process 0 left there are not seen by every "
            "process"
        )
    history = zip(*(kept.history for kept in sound), strict=True)
    return State(torch.stack([kept.x for kept in sound]), lot.step, tuple(map(torch.stack, history)))


def _refuse_broken(lot: Lot, n: int, x: Tensor) -> None:
    """NaN would become a black video."""
    for job, one in zip(lot.jobs, x, strict=True):
        if not torch.isfinite(one).all():
            r = job.request
            raise DataError(
                f"{job.output}: its latents are not finite after step {n} of {r.steps} (guidance "
                f"{r.guidance}, cfg_scale {r.cfg_scale:g}, shift {r.shift:g}): the weights, a LoRA or its "
                "multiplier, or model.dtype does it; try without LoRAs, then precision=fp32 with "
                "model.dtype=float32"
            )


def open_dit(plan: Plan, expert: Expert | None, ctx: ParallelContext) -> DiT:
    """With the LoRAs in it."""
    m, n_swapped, loras = plan.model, plan.compute.blocks_to_swap, on_expert(plan.loras, expert)
    # What is to be swapped or cut up must not fill the device first.
    device = torch.device("cpu") if n_swapped or plan.compute.shard_weights else ctx.device
    whole = summed(loras, {name: p.shape for name, p in plan.dits.empty.named_parameters()}, once=False)
    with spread_weights(ctx, frozen=True, device=device) as spread:
        loaded = load_dit(
            plan.dits.files[DIT if expert is None else expert.part].path,
            model=plan.spec.name,
            flavor=m.flavor,
            dtype=getattr(torch, m.dtype),
            device=device,
            quantize_to=m.quantize,
            edit=editing(merging(plan.dits.layers, loras), whole) if loras else None,
            spread=spread,
        )
    model = loaded.model.eval().requires_grad_(False)
    use_products(model, plan.compute.float8)
    visits: BlockSwap | BlockShards | None = None
    if plan.compute.shard_weights:
        visits = BlockShards(model.blocks, ctx)
    elif n_swapped:
        visits = BlockSwap(model.blocks, n_swapped, ctx.device)
    model.to(ctx.device)
    how = plan.compute
    shapes = latent_shapes(plan.jobs, plan.flavor)
    work = largest_work(plan.flavor, map(plan.flavor.latent.n_tokens, shapes), ctx)
    kernel = parallelize(
        model, ctx, kernel=how.kernel, dtype=how.dtype, training=False, visits=visits, sparse=how.sparse,
        work=work
    )
    if ctx.is_main:
        away = note(model) + (f", {visits.describe()}" if visits else "")
        who = f"{expert.name}: " if expert else ""
        print(
            f"{who}{ctx.device_name}, Ulysses {ctx.ulysses} x ring {ctx.ring}, {kernel.name} attention{away}",
            flush=True
        )
        if how.sparse.sampled:
            print(_left_out(plan, len(model.blocks)), flush=True)
    return model


def _left_out(plan: Plan, n_blocks: int) -> str:
    exact = plan.compute.sparse.exact_steps
    first = f", after {exact} exact steps" if exact else ""
    grids = map(plan.flavor.latent.grid, latent_shapes(plan.jobs, plan.flavor))
    return kept_note(plan.compute.sparse, grids, n_blocks) + first
