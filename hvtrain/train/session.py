"""One training run: what it holds, and what the loop's events do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hvtrain.adapters.attach import seed_dropout
from hvtrain.config import RunSettings
from hvtrain.models.spec import Flavor
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from hvtrain.train import checkpoint
from hvtrain.train.checkpoint import Progress, Snapshot
from hvtrain.train.engine import Engine
from hvtrain.train.evaluate import HeldOut, held_out_loss
from hvtrain.train.experts import Models, Team
from hvtrain.train.files import RunFiles
from hvtrain.train.loop import Cadence, Hooks, train
from hvtrain.train.metrics import Metrics, names_of
from hvtrain.train.mfu import Work
from hvtrain.train.monitor import Monitor
from hvtrain.train.objective import MicroResult, Objective, Where, drop_captions
from hvtrain.train.parts import SEPARATOR, Piece, write_part
from hvtrain.train.prepare import on_all
from hvtrain.train.preview import Previews
from hvtrain.train.progress import ProgressLine
from hvtrain.train.rundir import cut_metrics
from hvtrain.train.watchdog import Watchdog
from shards.loader import Batch, BatchLoader

Averages = dict[str, Tensor]  # of weights, by the parameter's name


def restore(
    engine: Engine, trainable: Mapping[str, nn.Parameter], found: Path | None, *, averaged: bool
) -> tuple[Progress, Averages, str]:
    """Put the checkpoint `found` into the engine; where it stands, the moving averages if the run keeps them
    (`averaged`), and what the user should know of it. Collective. Raises CheckpointError."""
    start, ema, note = Progress(), {}, ""
    if found is not None:
        snapshot = checkpoint.load(found)
        if missing := sorted(set(trainable) ^ set(snapshot.params)):
            raise checkpoint.CheckpointError(
                f"{found}: holds other weights than this run trains, first '{missing[0]}'"
            )
        engine.load_state(snapshot.params, snapshot.optimizer, n_steps=snapshot.progress.step)
        start, ema = (
            snapshot.progress,
            {n: snapshot.ema[n].to(p.device) for n, p in trainable.items() if n in snapshot.ema}
        )
    if averaged and not ema:
        ema = {n: p.detach().clone() for n, p in trainable.items()}
        if start.step:
            note = f"run.ema_decay: {found} holds no moving average; it begins at step {start.step}\n"
    return start, ema, note


@dataclass
class Session:
    """Everything that a run holds. `train` is the whole of it."""

    run: RunSettings
    ctx: ParallelContext
    flavor: Flavor
    objective: Objective  # of the held-out loss: on all noise levels of the run
    team: Team
    loader: BatchLoader
    previews: Previews
    held: HeldOut
    files: RunFiles
    cadence: Cadence
    start: Progress
    ema: Averages
    caption_dropout: float
    config: str  # all of it, for TensorBoard
    about: str  # said at the start
    image_share: float | None = None
    silent: tuple[bool, ...] = ()  # of each shard set: whether the adapter shall change nothing on it
    found: Path | None = None  # the checkpoint that it goes on from
    work: Work | None = None  # of a sample, if the device's speed is known

    def __post_init__(self) -> None:
        ctx, self.output, self.steps = self.ctx, Path(self.run.output_dir), self.cadence.steps
        if ctx.is_main:
            cut_metrics(self.output, self.start.step)
        self.metrics = Metrics(
            self.output if ctx.is_main else None, purge_step=self.start.step + 1, wandb=self.run.wandb,
            name=self.run.name
        )
        self.line = ProgressLine(self.steps, start=self.start.step, show=ctx.is_main)
        self.monitor = Monitor(
            ctx, self.metrics, self.line, self.steps, self.run.log_every, names_of(self.loader.sets),
            self.work, self.run.profile_every,
        )
        self.best = ctx.gather_objects(self.files.best_loss() if ctx.is_main else None)[0]
        self.watch = Watchdog(ctx, self.run.hang_timeout_s)
        self.latents: tuple[int, ...] = ()  # shape of the batch at hand

    # --- the run --------------------------------------------------------------------------------------------

    def train(self) -> bool:
        if self.found is not None and self.start.step >= self.steps:
            self._finish(self.found)
            return True
        self._say(self.about)
        self.metrics.text("config", self.config)
        hooks = Hooks(
            self._micro_step, self._after_update, self.monitor.log, self._save, self._evaluate,
            self.previews_at, self.watch.at, self.monitor.measured,
        )
        try:
            with self.watch:
                finished = train(
                    self.team, iter(self.loader), hooks, cadence=self.cadence, start=self.start,
                    seed=self.run.seed, ctx=self.ctx, folder=self.output,
                )
                self.watch.at(self.steps, "waiting for the last files", writing=self.ctx.is_main)
                self.files.background.wait()
                self.ctx.barrier()  # no rank ends the job while rank 0 writes
        except KeyboardInterrupt:
            self.files.background.close()
            self._say(f"ended at once: start again to go on from step {self.files.saved}")
            raise
        finally:
            self.files.background.close()
            self.line.close()
            self.metrics.close()
        if self.ctx.is_main:
            made = " ".join(map(str, self.files.results[: len(self.team.trainees)]))
            end = f"done: {made}" if finished else (
                f"stopped on request; start again to continue from step {self.files.saved} of {self.steps}"
            )
            print(end, flush=True)
            if finished and self.files.adapter.type != "none":
                for key in self.team.trainees:
                    of = f" --expert {key}" if len(self.team.trainees) > 1 else ""
                    of += (
                        " --dit MODEL"
                        if "dora" in (self.files.adapter.type, self.files.adapter.slice_type) else ""
                    )
                    there = (
                        f"{shlex.quote(str(self.output))}{of} --to comfyui --output "
                        f"comfyui{key and f'-{key}'}.safetensors"
                    )
                    print(
                        f"for ComfyUI, which skips layers under these names: hvtrain lora convert {there}",
                        flush=True
                    )
        return finished

    def _finish(self, found: Path) -> None:
        """There is nothing to train, but what the run was for is not there as it was written."""
        made = on_all(self.ctx, lambda: self.files.mend_results(found) if self.ctx.is_main else [])
        self.files.background.close()
        self.metrics.close()
        self._say(
            f"{self.output} is at step {self.start.step} of {self.steps}: made again from its checkpoint: "
            f"{', '.join(made)}"
        )

    def _say(self, text: str) -> None:
        if self.ctx.is_main:
            print(text, flush=True)

    def _micro_step(self, batch: Batch, where: Where) -> tuple[MicroResult, int]:
        now, place = (
            self.team.at_step(where.step),
            {"step": where.step, "micro": where.micro, "dp_rank": where.dp_rank}
        )
        self._count_bad(batch)
        shares = [m.get("caption_dropout", self.caption_dropout) for m in batch.meta]
        tensors = drop_captions(
            batch.tensors, self.loader.sets[0].empty_text if any(shares) else {}, shares=shares,
            draw=generator(where.seed, stream="caption-dropout", **place), fields=self.flavor.cond,
        )
        if self.image_share is not None:
            draw = generator(where.seed, stream="image-share", **place)
            tensors["image_given"] = torch.rand(len(shares), generator=draw) < self.image_share
        if any(self.silent):
            tensors["silent"] = torch.tensor([self.silent[number] for number in batch.sets])
        a = self.files.adapter
        if a.dropout or a.rank_dropout or a.module_dropout:
            seed_dropout(now.subject.model, where.seed, **place)
        latents = tensors["latents"]
        self.latents = tuple(latents.shape)
        n_tokens = len(latents) * self.flavor.latent.n_tokens(latents.shape)
        result = now.objective(now.engine.model, tensors, where)
        kept = self.work.kept(self.flavor.latent.grid(latents.shape)) if self.work is not None else 1.0
        return replace(result, kept=kept), n_tokens

    def _count_bad(self, batch: Batch) -> None:
        for message in batch.bad:
            self.monitor.n_bad += 1
            if self.monitor.n_bad <= 10:  # a damaged tar holds hundreds
                print(f"warning: skipped: {message}", file=sys.stderr, flush=True)

    def _after_update(self) -> None:
        if self.ema:
            trained = self.team.trained
            averages, values = [self.ema[n] for n in trained], [p.detach() for p in trained.values()]
            torch._foreach_lerp_(averages, values, 1 - self.run.ema_decay)

    def _evaluate(self, progress: Progress) -> None:
        with self._beating(progress.step, "evaluating") as models:
            values = held_out_loss(models, self.objective, self.held, ctx=self.ctx)
        self.metrics.scalars(progress.step, values)
        self.line.note(f"step {progress.step}: held-out loss {values['eval/loss']:.4f}")
        self._save_if_best(progress, values["eval/loss"])

    def previews_at(self, step: int) -> None:
        averaged = self._averaged() if self.previews.ema else nullcontext()
        with averaged, self._beating(step, "making previews") as models:
            for name, frames, fps in self.previews.make(models, step):
                self.metrics.video(name, step, frames, fps=fps)
                self.watch.at(step, f"making previews, {name} written")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving averages in the weights' place, and these in theirs; no copy of all."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        params = self.team.trainable
        for name, average in self.ema.items():
            weight = params[name].detach()
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def _beating(self, step: int, phase: str) -> Iterator[Models]:
        """Long work of many forward passes: each is a sign of life."""
        passes = 0

        def beat() -> None:
            nonlocal passes
            passes += 1
            self.watch.at(step, f"{phase}, forward pass {passes}")

        self.watch.at(step, phase)
        with self.team.evaluating(beat) as models:
            yield models

    # --- files ----------------------------------------------------------------------------------------------

    def _save(self, progress: Progress) -> None:
        """Checkpoint, and the files that are for the user. Collective; returns when all is copied to the
        host, or, what ZeRO-3 trains whole, is on the disk."""
        with self.monitor.spending("save"):
            self.metrics.flush()  # whoever goes on from this checkpoint does not log its steps again
            if pieces := self.team.pieces():
                self._save_parts(progress, pieces)
                return
            params, optimizer = self._export(progress.step), self.team.export_optimizer()
            if self.ctx.is_main:
                ema = {n: t.detach().to("cpu", copy=True) for n, t in self.ema.items()}
                self.watch.at(progress.step, "waiting for the disk", writing=True)
                self.files.save(Snapshot(progress, params, optimizer, ema), self.line.note)
            self.ctx.barrier()

    def _save_parts(self, progress: Progress, pieces: list[Piece], best: float | None = None) -> None:
        """Every rank writes its own; rank 0 makes the user's file of them, behind the training. `best`: only
        that file, of the weights with this held-out loss."""
        step, ctx = progress.step, self.ctx
        self.watch.at(step, "waiting for the files of the save before", writing=ctx.is_main)
        folder = on_all(ctx, lambda: self.files.begin_parts(step) if ctx.is_main else None)
        folder = ctx.gather_objects(folder)[0]
        self.watch.at(step, "writing its part of a checkpoint", writing=True)
        mine = pieces if best is None else [p for p in pieces if SEPARATOR not in p.key]
        written = on_all(ctx, lambda: write_part(folder, mine, rank=ctx.rank))
        parts = ctx.gather_objects(written)
        if ctx.is_main:
            self.files.save_parts(folder, progress, parts, self.line.note, best=best)

    def _save_if_best(self, progress: Progress, loss: float) -> None:
        """Collective: the loss is the same on all ranks."""
        if not self.run.keep_best or not loss < self.best:
            return
        self.best = loss
        if pieces := self.team.pieces():
            self._save_parts(progress, pieces, best=loss)
        else:
            params = self._export(progress.step)
            if self.ctx.is_main:
                self.watch.at(progress.step, "waiting for the disk", writing=True)
                self.files.save_best(params, progress, loss)
        self.line.note(
            f"step {progress.step}: best held-out loss so far, "
            f"{', '.join(path.name for path in self.files.best)}"
        )

    def _export(self, step: int) -> dict[str, Tensor]:
        """The engine's export_params, when the save before is written: of a 13B model a
        host has room for one copy."""
        if self.ctx.is_main:
            self.watch.at(step, "waiting for the files of the save before", writing=True)
            self.files.background.wait()
        self.watch.at(step, "copying for a checkpoint")
        return self.team.export_params()
