"""`hvtrain train`: from a config to a trained adapter or model. Below this file nothing sees the whole
config."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hvtrain.adapters.table import kind_of
from hvtrain.config import TrainConfig, dump
from hvtrain.config.rules import check_train
from hvtrain.flow.timesteps import quantile_function
from hvtrain.lorafiles.metadata import EXPERT_KEY, of_flavor
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, check_heads, shutdown, start
from hvtrain.slices.plan import SlicePlan
from hvtrain.stopping import REQUEUE
from hvtrain.train import data, setup
from hvtrain.train.calibration import leave_calibration
from hvtrain.train.checkpoint import step_of
from hvtrain.train.engine import Step, build_engine
from hvtrain.train.evaluate import HeldOut
from hvtrain.train.files import RunFiles, is_finished, results_of
from hvtrain.train.gradients import parts_of
from hvtrain.train.loop import Cadence
from hvtrain.train.mfu import Work, peak_of, work_of
from hvtrain.train.mixture import Curriculum, plan_data
from hvtrain.train.objective import Objective
from hvtrain.train.optim import build_optimizer
from hvtrain.train.prepare import (
    check_adapter,
    check_machinery,
    check_weights,
    on_all,
    say,
    take,
)
from hvtrain.train.preview import Preview, Previews, plan_previews
from hvtrain.train.rundir import claim
from hvtrain.train.runlock import Busy, RunLock
from hvtrain.train.schedules import build_schedule
from hvtrain.train.session import Session, restore
from hvtrain.train.setup import Origin, Subject
from hvtrain.train.status import FINISHED, STOPPED, told
from shards import ShardSet
from shards.loader import BatchLoader
from shards.remote import shown

SAVE_EVERY = 250  # steps, of an adapter: tens of MB


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against."""

    cfg: TrainConfig  # with what the config leaves to the flavor filled in
    base: Origin
    plan: SlicePlan | None  # of a LORAID slice
    sets: list[ShardSet]
    curriculum: Curriculum
    held_out: list[ShardSet]
    steps: int  # of the whole run
    previews: list[Preview]

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
        ready.base, cfg.adapter, ready.plan, cfg.flow, ready.sets, data=cfg.data,
        optimizer=cfg.optim.name, seed=cfg.run.seed, name=cfg.run.name,
    )
    output, results = Path(cfg.run.output_dir), results_of(cfg.run)
    try:
        lock, found = take(output, lambda: claim(cfg.run, shown(dump(cfg)), identity, ctx, say), ctx)
    except Busy as error:
        if not ctx.requeues:
            raise
        # Slurm started this job again while its first life goes on (on a lost node): it ends, and then we
        # may.
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
            leave_calibration(output, ready.sets, cfg.data.calibration)
        tell(FINISHED if finished else STOPPED)
    if own:
        shutdown()
    return 0 if finished else REQUEUE


def prepare(cfg: TrainConfig, ctx: ParallelContext) -> Prepared:
    """All of a run that can be known, and refused, before weights are read: from headers, names and
    manifests."""
    dtype = torch.bfloat16 if cfg.run.precision == "bf16" else torch.float32
    check_machinery(cfg.zero, cfg.optim, cfg.parallel, ctx, recompute=cfg.run.recompute, dtype=dtype)
    whole = cfg.adapter.type == "none"
    base = setup.find_base(cfg.model, scratch=whole and cfg.model.dit is None)
    flavor, name = base.flavor, setup.named_after(cfg.run.name, base.expert)
    cfg = replace(cfg, flow=setup.flow_of(cfg.flow, flavor, base.expert), run=replace(cfg.run, name=name))
    quantile_function(cfg.flow.timestep_sampling, cfg.flow)
    check_heads(flavor.n_heads, ctx.ulysses)
    plan = setup.open_plan(base, cfg.adapter) if cfg.adapter.type == "loraid" else None
    n_bytes = 4 if whole else 1 if cfg.model.quantize != "none" else getattr(torch, cfg.model.dtype).itemsize
    check_weights(base, cfg.zero, ctx, whole=whole, n_bytes=n_bytes, blocks_to_swap=cfg.run.blocks_to_swap)
    if not whole:
        check_adapter(base, cfg.adapter, plan)
    sets = data.open_shards([entry.path for entry in cfg.data.sets], flavor, key="data.shards")
    curriculum = plan_data(cfg.data, sets, flavor.latent, seed=cfg.run.seed)
    held_out = data.open_shards(cfg.eval.shards, flavor, key="eval.shards")
    previews = plan_previews(
        cfg.preview, cfg.model, base.spec, flavor, guidance=cfg.flow.guidance, sets=[*held_out, *sets]
    )
    if not cfg.data.allow_foreign:
        groups = {"data.shards": sets, "eval.shards": held_out}
        data.check_encoders(groups, flavor.columns, cfg.model, base.spec)
    if data.drops_captions(sets, cfg.data.caption_dropout):
        data.check_empty_text(sets, flavor)
    per_step = ctx.dp * curriculum.per_batch * cfg.run.grad_accum
    steps = setup.n_steps(cfg.run.steps, cfg.run.epochs, curriculum.n_samples, per_step=per_step)
    build_schedule(cfg.optim, total_steps=steps)
    return Prepared(cfg, base, plan, sets, curriculum, held_out, steps, previews)


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
    cfg, base, sets, steps = ready.cfg, ready.base, ready.sets, ready.steps
    stage3 = cfg.zero.engine == "deepspeed" and cfg.zero.stage == 3
    subject = setup.open_subject(
        base, cfg.model, cfg.adapter, ready.plan, ctx, seed=cfg.run.seed,
        blocks_to_swap=cfg.run.blocks_to_swap, move=not stage3,
    )
    autocast = cfg.run.precision == "bf16"
    kernel = parallelize(
        subject.model, ctx, kernel=cfg.parallel.kernel, recompute=cfg.run.recompute,
        dtype=torch.bfloat16 if autocast else torch.float32, swap=subject.swap,
    )
    quantile = quantile_function(cfg.flow.timestep_sampling, cfg.flow)
    objective = Objective(base.spec, base.flavor.tasks[0], cfg.flow.guidance, quantile, ctx.device, autocast)
    previews = Previews(  # encodes its prompts before the engine takes memory
        ready.previews, cfg.model, base.spec, base.flavor, ctx, folder=Path(cfg.run.output_dir) / "previews",
        precision=cfg.run.precision,
    )
    engine = build_engine(
        subject.model, subject.trainable, cfg.zero, ctx, optimizer=build_optimizer(subject.trainable, cfg.optim),
        schedule=build_schedule(cfg.optim, total_steps=steps),
        step=Step(cfg.run.grad_accum, cfg.optim.max_grad_norm, parts_of(subject.trainable)),
    )
    start, ema, note = restore(engine, subject.trainable, found, averaged=cfg.run.ema_decay > 0)
    loader = BatchLoader(
        sets, batch_size=cfg.data.batch_size, dp_rank=ctx.dp_rank, dp_size=ctx.dp, seed=cfg.run.seed,
        cursor=start.cursor, workers=cfg.data.workers, worker_type=cfg.data.worker_type,
        on_bad_sample=cfg.data.on_bad_sample, pin=ctx.device.type == "cuda", columns=base.flavor.columns,
        phases=ready.curriculum.phases, step=start.step, per_step=cfg.run.grad_accum,
    )
    held = HeldOut(
        ready.held_out, cfg.data.batch_size, cfg.eval.quantiles, cfg.eval.max_batches, base.flavor.columns
    )
    return Session(
        run=cfg.run, ctx=ctx, subject=subject, objective=objective, engine=engine, loader=loader,
        previews=previews, held=held,
        files=RunFiles(cfg.run, cfg.adapter, subject, _metadata(ready), steps, lock, saved=start.step),
        cadence=_cadence(ready), start=start, ema=ema, caption_dropout=cfg.data.caption_dropout,
        config=shown(dump(cfg)), found=found, work=_work(ready, ctx),
        about=note + _about(ready, ctx, subject, kernel.name, start.step),
    )


def _work(ready: Prepared, ctx: ParallelContext) -> Work | None:
    """What the MFU is counted by. Collective: one rank finds it out."""
    c, base, peak = ready.cfg, ready.base, peak_of(ctx.device_name, ready.cfg.run.peak_tflops)
    mine = peak and ctx.is_main and work_of(base.spec, base.flavor, c.model, c.adapter, c.run, peak=peak)
    return ctx.gather_objects(mine or None)[0]


def _cadence(ready: Prepared) -> Cadence:
    cfg, run, every = ready.cfg, ready.cfg.run, ready.cfg.run.save_every_steps
    if every is None:
        every = 0 if run.save_every_epochs or cfg.adapter.type == "none" else SAVE_EVERY
    return Cadence(
        steps=ready.steps, grad_accum=run.grad_accum, save=every,
        save_samples=math.ceil(run.save_every_epochs * ready.n_samples),
        evaluate=cfg.eval.every_steps if ready.held_out else 0, preview=cfg.preview.every_steps,
        max_bad_steps=run.max_bad_steps,
    )


def _about(ready: Prepared, ctx: ParallelContext, subject: Subject, kernel: str, step: int) -> str:
    """What the run says of itself at its start."""
    c, base, cadence = ready.cfg, ready.base, _cadence(ready)
    what = "all weights"
    if c.adapter.type != "none":
        kind = kind_of(c.adapter.type).LABEL if ready.plan is None else f"LORAID {c.adapter.loraid}"
        what = f"{kind} rank {c.adapter.rank}"
    expert = "" if base.expert is None else f", expert {base.expert.name}"
    zero = f"ZeRO-{c.zero.stage}" if c.zero.engine == "deepspeed" else "plain PyTorch"
    offload = f", optimizer on the {c.zero.offload_optimizer}" if c.zero.offload_optimizer != "none" else ""
    saves = "" if cadence.save or cadence.save_samples else (
        "; no checkpoint before the last step (run.save_every_steps): what breaks the run costs all of it"
    )
    return (
        f"{base.spec.name} {base.flavor.name}{expert}: training {what} ({subject.n_parameters:,} parameters) "
        f"on {ready.n_samples} samples\n"
        f"{ctx.world} process(es) on {ctx.device_name}: data {ctx.dp} x Ulysses {ctx.ulysses} x ring "
        f"{ctx.ring}, {zero}{offload}, {kernel} attention, {c.run.precision}; {c.flow.timestep_sampling} noise "
        f"levels, shift {c.flow.shift:g}, guidance {'none' if c.flow.guidance is None else f'{c.flow.guidance:g}'}\n"
        f"steps {step + 1} to {ready.steps}, {ctx.dp * ready.curriculum.per_batch * c.run.grad_accum:g} samples each "
        f"({'on average' if c.data.batch_tokens else 'fewer where a bucket ends'}){saves}; TensorBoard: tensorboard --logdir "
        f"{Path(c.run.output_dir, 'tensorboard')}"
    )


def _metadata(ready: Prepared) -> dict[str, object]:
    """The `ss_*` entries that LoRA managers show, and what hvtrain's own verbs read."""
    c, plan, base = ready.cfg, ready.plan, ready.base
    owner = {} if plan is None else {
        "ss_loraid": c.adapter.loraid, "hvtrain.plan": plan.hash, "hvtrain.slices": plan.n,
        "ss_network_args": {"loraid": c.adapter.loraid, "granularity": plan.granularity, "order": plan.order},
    }
    return owner | {
        "ss_learning_rate": c.optim.lr, "ss_lr_scheduler": c.optim.schedule, "ss_optimizer": c.optim.name,
        "ss_lr_warmup_steps": c.optim.warmup_steps, "ss_max_grad_norm": c.optim.max_grad_norm,
        "ss_max_train_steps": ready.steps, "ss_num_train_items": ready.n_samples, "ss_seed": c.run.seed,
        "ss_gradient_accumulation_steps": c.run.grad_accum,
        "ss_gradient_checkpointing": c.run.recompute != "none",
        "ss_mixed_precision": c.run.precision, "ss_network_dropout": c.adapter.dropout,
        "ss_timestep_sampling": c.flow.timestep_sampling, "ss_discrete_flow_shift": c.flow.shift,
        "ss_sigmoid_scale": c.flow.sigmoid_scale, "ss_logit_mean": c.flow.logit_mean,
        "ss_guidance_scale": c.flow.guidance, "ss_sd_model_name": Path(base.path or "scratch").name,
        "ss_datasets": [shown(entry.path) for entry in c.data.sets], "ss_fp8_base": c.model.quantize != "none",
        "ss_min_timestep": round(1000 * c.flow.min_sigma), "ss_max_timestep": round(1000 * c.flow.max_sigma),
        **of_flavor(base.flavor), "hvtrain.base": base.fingerprint,
        EXPERT_KEY: base.expert and base.expert.name,
    }
