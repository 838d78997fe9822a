"""`hvtrain train`: from a config to a trained adapter or model. Below this file nothing sees the whole
config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hvtrain.config import TrainConfig, dump
from hvtrain.config.rules import check_train
from hvtrain.flow.picture import draw, lines, look
from hvtrain.lorafiles.metadata import BASE_LORA_KEY, EXPERT_KEY, SPARSE_KEY, of_flavor
from hvtrain.models.sparse import check_sparse
from hvtrain.parallel.apply import largest_work, parallelize
from hvtrain.parallel.context import ParallelContext, check_heads, shutdown, start
from hvtrain.parallel.products import note
from hvtrain.parallel.swap import ModelSwap
from hvtrain.slices.plan import SlicePlan
from hvtrain.stopping import REQUEUE
from hvtrain.train import data, setup
from hvtrain.train.calibration import leave_calibration
from hvtrain.train.checkpoint import step_of
from hvtrain.train.engine import Step, build_engine
from hvtrain.train.evaluate import HeldOut
from hvtrain.train.experts import Team, Trainee
from hvtrain.train.files import Product, RunFiles, is_finished, results_of
from hvtrain.train.gradients import parts_of
from hvtrain.train.loop import Cadence
from hvtrain.train.mfu import Work, peak_of, work_of
from hvtrain.train.mixture import Curriculum, plan_data
from hvtrain.train.objective import Objective, objective_of
from hvtrain.train.optim import build_optimizer
from hvtrain.train.prepare import (
    check_adapter,
    check_machinery,
    check_silent,
    check_weights,
    check_whole,
    find_others,
    grids,
    idle_on_host,
    lora_note,
    on_all,
    open_idle,
    pick_float8,
    say,
    sparse_note,
    subject_note,
    take,
)
from hvtrain.train.preview import Preview, Previews, plan_previews
from hvtrain.train.rundir import claim
from hvtrain.train.runlock import Busy, RunLock
from hvtrain.train.schedules import build_schedule
from hvtrain.train.session import Session, restore
from hvtrain.train.setup import Origin, TeamMember
from hvtrain.train.status import FINISHED, STOPPED, told
from shards import ShardSet
from shards.loader import BatchLoader
from shards.remote import shown

SAVE_EVERY = 250  # steps, of an adapter: tens of MB


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against."""

    cfg: TrainConfig  # with what the config leaves to the flavor filled in
    members: list[TeamMember]
    others: dict[str, Origin]  # experts that are not trained, but make videos
    idle_on_host: bool  # an expert that is not computed with
    plan: SlicePlan | None  # of a LORAID slice
    sets: list[ShardSet]
    curriculum: Curriculum
    held_out: list[ShardSet]
    steps: int  # of the whole run
    previews: list[Preview]

    @property
    def base(self) -> Origin:
        """Whose flavor it is."""
        return self.members[0].base

    @property
    def n_samples(self) -> int:
        return self.curriculum.n_samples


def run(cfg: TrainConfig, ctx: ParallelContext | None = None) -> int:
    """Train; the exit code is 0 when finished and 75 when a signal asked to stop (start again to
    continue)."""
    check_train(cfg)
    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    ready = on_all(ctx, lambda: prepare(cfg, ctx))
    cfg, steps = ready.cfg, ready.steps
    identity = setup.identity(
        [member.base for member in ready.members], cfg.adapter, ready.plan, cfg.flow, ready.sets,
        data=cfg.data, optimizer=cfg.optim.name, seed=cfg.run.seed, name=cfg.run.name,
        turn=cfg.run.expert_turn, sparse=cfg.sparse.trained,
    )
    output, results = Path(cfg.run.output_dir), results_of(cfg.run, [member.name for member in ready.members])
    try:
        lock, found = take(output, lambda: claim(cfg.run, shown(dump(cfg)), identity, ctx, say), ctx)
    except Busy as error:
        if not ctx.requeues:
            raise
        # Slurm started this job again while its first life goes on (on a lost node): first that ends.
        if ctx.is_main:
            say(f"{error}; asking Slurm to start this job again later")
        return REQUEUE
    with lock, told(output, steps=steps, main=ctx.is_main) as tell:
        over = found is not None and on_all(
            ctx, lambda: ctx.is_main and is_finished(results, found, steps=steps)
        )
        if over and found is not None and ctx.is_main:
            print(f"nothing to do: {output} is at step {step_of(found)} of {steps}", flush=True)
        finished = ctx.any(over)
        if not finished:
            # Subnormal moments of a converged optimizer are slow on CPUs.
            torch.set_flush_denormal(ctx.device.type == "cpu")
            try:
                finished = _train(ready, ctx, lock, found)
            finally:
                torch.set_flush_denormal(False)  # of the whole process, which may have other work after this
        if finished and ctx.is_main and cfg.adapter.type != "none":
            taught = [s for s, entry in zip(ready.sets, cfg.data.sets, strict=True) if not entry.silent]
            leave_calibration(output, taught, cfg.data.calibration)
        tell(FINISHED if finished else STOPPED)
    if own:
        shutdown()
    return 0 if finished else REQUEUE


def show_timesteps(cfg: TrainConfig, picture: str) -> Iterator[str]:
    """How often which noise levels are trained, and what an error there counts: lines of text, and a PNG
    each. Of the model only the header is read, and of the shards one sample's size."""
    bases = setup.find_bases(cfg.model, scratch=cfg.model.dit is None)
    flavor = bases[0].flavor
    sets = data.open_shards([entry.path for entry in cfg.data.sets], flavor, key="data.shards")
    shapes = [tuple(found.some().tensors["latents"].shape) for found in sets]
    d = flavor.defaults
    shape = shapes[0] if shapes else flavor.latent.shape(frames=d.frames, height=d.height, width=d.width)
    members = setup.members_of(bases, cfg.flow, cfg.run.name)
    for member in members:
        flow = setup.flow_of(member.flow, flavor)
        one = objective_of(flow, bases[0].spec, flavor, device=torch.device("cpu"), autocast=False)
        whose = f"{flavor.name} {member.name}" if len(members) > 1 else flavor.name
        title = f"{whose}: {flow.timestep_sampling}, {flow.weighting} weighting"
        levels = look(one.quantile, one.measure.weight, shape)
        yield f"{title}, latents of {' x '.join(map(str, shape[-3:]))}"
        yield from lines(levels)
        path = (
            Path(picture)
            if len(members) == 1 else Path(picture).with_stem(f"{Path(picture).stem}-{member.name}")
        )
        draw(levels, path, title=title)
        yield f"drawn in {path}"


def prepare(cfg: TrainConfig, ctx: ParallelContext) -> Prepared:
    """All of a run that can be known, and refused, before weights are read: from headers, names and
    manifests."""
    dtype = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
    check_machinery(
        cfg.zero, cfg.optim, cfg.parallel, ctx, recompute=cfg.run.recompute, dtype=dtype,
        model=cfg.model, ratios=bool(cfg.adapter.lr_ratios), sparse=cfg.sparse,
    )
    whole = cfg.adapter.type == "none"
    bases = setup.find_bases(cfg.model, scratch=whole and cfg.model.dit is None)
    base, flavor = bases[0], bases[0].flavor
    members = setup.members_of(bases, cfg.flow, cfg.run.name)
    if len(members) == 1:  # what the run writes of itself says which, and on which noise levels
        cfg = replace(cfg, flow=members[0].flow, run=replace(cfg.run, name=members[0].name))
    cfg = replace(cfg, flow=setup.flow_of(cfg.flow, flavor))
    objective_of(cfg.flow, base.spec, flavor, device=ctx.device, autocast=False)
    check_heads(flavor.n_heads, ctx.ulysses)
    plan = setup.open_plan(base, cfg.adapter, others=bases[1:]) if cfg.adapter.type == "loraid" else None
    n_bytes = 4 if whole else 1 if cfg.model.quantize != "none" else getattr(torch, cfg.model.dtype).itemsize
    wait = idle_on_host(bases, cfg.run.idle_expert, cfg.zero, ctx, whole=whole, n_bytes=n_bytes)
    check_weights(
        base, cfg.zero, ctx, whole=whole, n_bytes=n_bytes, blocks_to_swap=cfg.run.blocks_to_swap,
        n_models=1 if wait else len(bases),
    )
    check_sparse(cfg.sparse, base.outline, ring=ctx.ring, kernel=cfg.parallel.kernel)
    for one in bases:
        own = setup.adapter_of(cfg.adapter, one.expert)
        check_whole(one, own) if whole else check_adapter(one, own, plan)
        setup.open_base_loras(one, own)
    sets = data.open_shards(
        [entry.path for entry in cfg.data.sets], flavor, key="data.shards", masked=cfg.flow.masked
    )
    curriculum = plan_data(cfg.data, sets, flavor.latent, seed=cfg.run.seed)
    held_out = data.open_shards(cfg.eval.shards, flavor, key="eval.shards", masked=cfg.flow.masked)
    previews = plan_previews(
        cfg.preview, cfg.model, base.spec, flavor, sets=[*held_out, *sets],
        guidance=flavor.defaults.guidance if cfg.flow.raw_guidance else cfg.flow.guidance,
    )
    others = find_others(cfg.model, bases) if previews else {}
    if not cfg.data.allow_foreign:
        groups = {"data.shards": sets, "eval.shards": held_out}
        data.check_encoders(groups, flavor.columns, cfg.model, base.spec, flavor)
    if any(entry.silent for entry in cfg.data.sets):
        check_silent(cfg.zero, whole=whole)
    data.check_image_share(cfg.data.image_share, sets, flavor)
    if data.drops_captions(sets, cfg.data.caption_dropout):
        data.check_empty_text(sets, flavor)
    per_step = ctx.dp * curriculum.per_batch * cfg.run.grad_accum
    steps = setup.n_steps(cfg.run.steps, cfg.run.epochs, curriculum.n_samples, per_step=per_step)
    build_schedule(cfg.optim, total_steps=steps)
    return Prepared(cfg, members, others, wait, plan, sets, curriculum, held_out, steps, previews)


def _train(ready: Prepared, ctx: ParallelContext, lock: RunLock, found: Path | None) -> bool:
    from hvtrain.fit.oom import explained, is_out_of_memory

    session = None
    try:
        session = _open(ready, ctx, lock, found)
        return session.train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        flavor, latents = (ready.base.flavor, session.latents) if session else (None, ())
        raise explained(error, dump(ready.cfg), ctx, flavor, latents) from None


def _open(ready: Prepared, ctx: ParallelContext, lock: RunLock, found: Path | None) -> Session:
    """Everything that the run holds, in the order in which it takes memory."""
    cfg, base, sets = ready.cfg, ready.base, ready.sets
    previews = Previews(  # encodes its prompts before all else takes memory
        ready.previews, cfg.model, base.spec, base.flavor, ctx, folder=Path(cfg.run.output_dir) / "previews",
        precision=cfg.run.precision, ema=cfg.preview.ema, sparse=cfg.sparse,
    )
    autocast = cfg.run.precision == "bf16"
    objective = objective_of(cfg.flow, base.spec, base.flavor, device=ctx.device, autocast=autocast)
    team = _team(ready, ctx, objective)
    columns = (*base.flavor.columns, "mask") if cfg.flow.masked else base.flavor.columns
    start, ema, note = restore(team, team.trainable, found, averaged=cfg.run.ema_decay > 0)
    loader = BatchLoader(
        sets, batch_size=cfg.data.batch_size, dp_rank=ctx.dp_rank, dp_size=ctx.dp, seed=cfg.run.seed,
        cursor=start.cursor, workers=cfg.data.workers, worker_type=cfg.data.worker_type,
        on_bad_sample=cfg.data.on_bad_sample, pin=ctx.device.type == "cuda", columns=columns,
        phases=ready.curriculum.phases, step=start.step, per_step=cfg.run.grad_accum,
    )
    held = HeldOut(ready.held_out, cfg.data.batch_size, cfg.eval.quantiles, cfg.eval.max_batches, columns)
    products = [
        Product(one.member.name, one.subject, _metadata(ready, one.member), team.prefixes[key])
        for key, one in team.trainees.items()
    ]
    return Session(
        run=cfg.run, ctx=ctx, flavor=base.flavor, objective=objective, team=team, loader=loader,
        previews=previews, held=held,
        files=RunFiles(cfg.run, cfg.adapter, products, ready.steps, lock, saved=start.step),
        cadence=_cadence(ready), start=start, ema=ema, caption_dropout=cfg.data.caption_dropout,
        image_share=cfg.data.image_share, silent=tuple(entry.silent for entry in cfg.data.sets),
        config=shown(dump(cfg)), found=found, work=_work(ready, ctx),
        about=note + _about(ready, ctx, team, start.step),
    )


def _team(ready: Prepared, ctx: ParallelContext, whole: Objective) -> Team:
    """The DiTs that are trained, each with its engine; `whole`: the objective on
    all noise levels of the run."""
    cfg = ready.cfg
    stage3 = cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3
    dtype = torch.bfloat16 if whole.autocast else torch.float32
    idle, trainees = ModelSwap(ctx.device) if ready.idle_on_host else None, {}
    work = largest_work(ready.base.flavor, map(math.prod, grids(ready.base, ready.sets)), ctx)
    bases = [member.base for member in ready.members]
    float8 = pick_float8(bases, cfg.model, ready.sets, ctx, data=cfg.data, dtype=dtype)
    for member in ready.members:
        subject = setup.open_subject(
            member.base, cfg.model, cfg.adapter, ready.plan, ctx, seed=cfg.run.seed,
            blocks_to_swap=cfg.run.blocks_to_swap, move=not stage3, idle=idle, float8=float8,
        )
        kernel = parallelize(
            subject.model, ctx, kernel=cfg.parallel.kernel, recompute=cfg.run.recompute, dtype=dtype,
            visits=subject.swap, compiler="inductor" if cfg.run.compile == "blocks" else None,
            sparse=cfg.sparse, work=work,
        )
        engine = build_engine(
            subject.model, subject.trainable, cfg.zero, ctx,
            optimizer=build_optimizer(
                subject.trainable, cfg.optim, setup.rates(cfg.adapter, subject.trainable)
            ),
            schedule=build_schedule(cfg.optim, total_steps=ready.steps),
            step=Step(
                cfg.run.grad_accum, cfg.optim.max_grad_norm, parts_of(subject.trainable), cfg.run.log_every
            ),
        )
        own = objective_of(
            member.flow, whole.spec, member.base.flavor, device=ctx.device, autocast=whole.autocast
        )
        trainees[member.key] = Trainee(member, subject, engine, own, kernel.name)
    return Team(
        trainees, seed=cfg.run.seed, turn=cfg.run.expert_turn, idle=idle,
        open_idle=lambda expert: open_idle(
            ready.others[expert.name], cfg.model, ctx, kernel=cfg.parallel.kernel, dtype=dtype,
            sparse=cfg.sparse, float8=float8
        ),
    )


def _work(ready: Prepared, ctx: ParallelContext) -> Work | None:
    """What the MFU is counted by. Collective: one rank finds it out."""
    c, base, peak = ready.cfg, ready.base, peak_of(ctx.device_name, ready.cfg.run.peak_tflops)
    mine = (
        peak and ctx.is_main
        and work_of(base.spec, base.flavor, c.model, c.adapter, c.run, peak=peak, sparse=c.sparse)
    )
    return ctx.gather_objects(mine or None)[0]


def _cadence(ready: Prepared) -> Cadence:
    cfg, run, every = ready.cfg, ready.cfg.run, ready.cfg.run.save_every_steps
    if every is None:
        every = 0 if run.save_every_epochs or cfg.adapter.type == "none" else SAVE_EVERY
    return Cadence(
        steps=ready.steps, grad_accum=run.grad_accum, save=every,
        save_samples=math.ceil(run.save_every_epochs * ready.n_samples),
        evaluate=cfg.eval.every_steps if ready.held_out else 0, preview=cfg.preview.every_steps,
        max_bad_steps=run.max_bad_steps, preview_first=cfg.preview.at_start,
        preview_samples=math.ceil(cfg.preview.every_epochs * ready.n_samples),
    )


def _about(ready: Prepared, ctx: ParallelContext, team: Team, step: int) -> str:
    """What the run says of itself at its start."""
    c, base, cadence = ready.cfg, ready.base, _cadence(ready)
    shift = "" if c.flow.shift is None else f", shift {c.flow.shift:g}"
    guidance = "none" if c.flow.guidance is None else f"{c.flow.guidance:g}"
    keys, n = (
        [key for key in team.shares if key], sum(one.subject.n_parameters for one in team.trainees.values())
    )
    expert = f", expert{'s' * (len(keys) > 1)} {' and '.join(keys)}" if keys else ""
    if len(keys) > 1:
        parts = " and ".join(f"{100 * share:.0f} %" for share in team.shares.values())
        expert += f" for {parts} of the steps{', the idle one in host memory' * ready.idle_on_host}"
    zero = f"ZeRO-{c.zero.stage}" if c.zero.engine == "deepspeed" else "plain PyTorch"
    offload = f", optimizer on the {c.zero.offload_optimizer}" if c.zero.offload_optimizer != "none" else ""
    saves = "" if cadence.save or cadence.save_samples else (
        "; no checkpoint before the last step (run.save_every_steps): what breaks the run costs all of it"
    )
    return (
        f"{base.spec.name} {base.flavor.name}{expert}: training {subject_note(c.adapter)} ({n:,} parameters) "
        f"on {ready.n_samples} samples\n"
        f"{ctx.world} process(es) on {ctx.devices}: data {ctx.dp} x Ulysses {ctx.ulysses} x ring "
        f"{ctx.ring}, {zero}{offload}, {team.now.kernel} attention{note(team.now.subject.model)}, "
        f"{c.run.precision}; "
        f"{c.flow.timestep_sampling} noise levels{shift}, guidance {guidance}\n"
        f"{sparse_note(c.sparse, base, ready.sets)}"
        f"steps {step + 1} to {ready.steps}, {ctx.dp * ready.curriculum.per_batch * c.run.grad_accum:g} "
        "samples each "
        f"({'on average' if c.data.batch_tokens else 'fewer where a bucket ends'}){saves}; TensorBoard: "
        "tensorboard --logdir "
        f"{Path(c.run.output_dir, 'tensorboard')}"
    )


def _metadata(ready: Prepared, member: TeamMember) -> dict[str, object]:
    """The `ss_*` entries that LoRA managers show, and what hvtrain's own verbs read."""
    c, plan, base, flow = ready.cfg, ready.plan, member.base, member.flow
    owner: dict[str, object] = {}
    a = c.adapter
    told: dict[str, object] = {} if a.factor == -1 else {"factor": a.factor}
    told |= {
        key: getattr(a, key)
        for key in ("rank_dropout", "module_dropout", "ranks", "alphas") if getattr(a, key)
    }
    if plan is not None:
        owner = {"ss_loraid": a.loraid, "hvtrain.plan": plan.hash, "hvtrain.slices": plan.n}
        told |= {"loraid": a.loraid, "granularity": plan.granularity, "order": plan.order}
    if a.base_lora:
        owner |= {BASE_LORA_KEY: [lora_note(one) for one in setup.adapter_of(a, base.expert).base_lora]}
    return owner | {"ss_network_args": told, "ss_scale_weight_norms": a.scale_weight_norms or None} | {
        "ss_learning_rate": c.optim.lr, "ss_lr_scheduler": c.optim.schedule, "ss_optimizer": c.optim.name,
        "ss_lr_warmup_steps": c.optim.warmup_steps, "ss_max_grad_norm": c.optim.max_grad_norm,
        "ss_max_train_steps": ready.steps, "ss_num_train_items": ready.n_samples, "ss_seed": c.run.seed,
        "ss_gradient_accumulation_steps": c.run.grad_accum,
        "ss_gradient_checkpointing": c.run.recompute != "none",
        "ss_mixed_precision": c.run.precision, "ss_network_dropout": c.adapter.dropout,
        "ss_timestep_sampling": flow.timestep_sampling, "ss_discrete_flow_shift": flow.shift,
        "ss_sigmoid_scale": flow.sigmoid_scale, "ss_logit_mean": flow.logit_mean,
        "ss_logit_std": flow.logit_std, "ss_mode_scale": flow.mode_scale,
        "ss_weighting_scheme": flow.weighting, "ss_guidance_scale": flow.guidance,
        "ss_sd_model_name": Path(base.path or "scratch").name,
        "ss_datasets": [shown(entry.path) for entry in c.data.sets],
        "ss_fp8_base": c.model.quantize != "none", "ss_min_timestep": round(1000 * flow.min_sigma),
        "ss_max_timestep": round(1000 * flow.max_sigma), **of_flavor(base.flavor),
        "hvtrain.base": base.fingerprint, EXPERT_KEY: base.expert and base.expert.name,
        SPARSE_KEY: c.sparse.trained or None,
    }
