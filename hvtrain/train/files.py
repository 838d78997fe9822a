"""The files of a run: what is for the user, the checkpoints, and writing them behind the training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hvtrain.adapters.lora import whole_rows
from hvtrain.config import TrainConfig
from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.files import save_lora
from hvtrain.lorafiles.metadata import of_flavor
from hvtrain.models.load import save_dit
from hvtrain.train import checkpoint
from hvtrain.train.checkpoint import Progress, Snapshot
from hvtrain.train.runlock import RunLock
from hvtrain.train.setup import Subject
from hvtrain.weights.containers import open_weights
from shards.remote import shown

BEST_LOSS = "hvtrain.held_out_loss"


class Background:
    """One write at a time, in a thread. What goes wrong in it is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hvtrain-save")
        self._last: Future | None = None

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def start(self, work: Callable[[], None]) -> None:
        """Returns at once, unless the write before is not done yet."""
        self.wait()
        self._last = self._pool.submit(work)

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def results_of(cfg: TrainConfig) -> list[Path]:
    """What a finished run leaves for the user."""
    endings = ("", "-ema") if cfg.run.ema_decay else ("",)
    return [Path(cfg.run.output_dir, f"{cfg.run.name}{ending}.safetensors") for ending in endings]


def is_finished(cfg: TrainConfig, found: Path, *, steps: int) -> bool:
    """Whether the checkpoint `found` is the run's end, and the results that were written with it are still there and whole."""
    return checkpoint.step_of(found) >= steps and all(checkpoint.result_is_whole(found, path) for path in results_of(cfg))


@dataclass
class RunFiles:
    """Knows the names and what is in them. For rank 0; tensors that it is given must be copies."""

    cfg: TrainConfig
    subject: Subject
    n_samples: int
    steps: int
    lock: RunLock
    started: float = field(default_factory=time.time)
    background: Background = field(default_factory=Background)
    saved: int = 0  # the step that a next start goes on from

    @property
    def output(self) -> Path:
        return Path(self.cfg.run.output_dir)

    def save(self, snapshot: Snapshot, note: Callable[[str], None]) -> None:
        """The user's files, then the checkpoint: a run that dies in between comes back to before this step and writes them
        again. Raises CheckpointError at once where the disk has no room."""
        self.background.wait()
        self.lock.check()
        progress = snapshot.progress
        last = progress.step >= self.steps
        checkpoint.check_room(self.checkpoints, snapshot, results=self._result_bytes(snapshot, last=last))
        name = self.cfg.run.name if last else f"{self.cfg.run.name}-step{progress.step:08d}"

        def write() -> None:
            try:
                self.export(self.output / f"{name}.safetensors", snapshot.params, progress)
                if snapshot.ema and last:
                    self.export(self.output / f"{name}-ema.safetensors", snapshot.ema, progress)
                checkpoint.save(
                    self.checkpoints, snapshot, keep_last=self.cfg.run.keep_last, results=self.results if last else ()
                )
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.output}: step {progress.step} could not be saved ({error}); mend that and start again: the run "
                    "continues from the checkpoint before"
                ) from error
            self.saved = progress.step
            note(f"step {progress.step}: saved {name}.safetensors")

        self.background.start(write)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def results(self) -> list[Path]:
        return results_of(self.cfg)

    def mend_results(self, found: Path) -> list[str]:
        """Write those results of the finished run again, from its last checkpoint, that are gone or not what was written;
        their names."""
        lost = [path for path in self.results if not checkpoint.result_is_whole(found, path)]
        if not lost:
            return []
        self.lock.check()
        snapshot = checkpoint.load(found)
        tensors = dict(zip(self.results, (snapshot.params, snapshot.ema)))
        for path in lost:
            if not tensors[path]:
                raise CheckpointError(f"{path} is lost, and {found} holds no moving average to make it from; set run.ema_decay=0")
            self.export(path, tensors[path], snapshot.progress)
        checkpoint.seal_results(found, self.results)
        return [path.name for path in lost]

    def _result_bytes(self, snapshot: Snapshot, *, last: bool) -> int:
        lora = self.cfg.adapter.type != "none"
        params = whole_rows(self.subject.model, dict(snapshot.params)) if lora else snapshot.params
        size = sum(t.numel() for t in params.values()) * (4 if lora else 2) + (1 << 20)
        return size * (2 if snapshot.ema and last else 1)

    @property
    def best(self) -> Path:
        return self.output / f"{self.cfg.run.name}-best.safetensors"

    def best_loss(self) -> float:
        """Of the best weights so far, which their file itself tells; infinite if there is none."""
        if not self.best.exists():
            return float("inf")
        return float(open_weights(self.best).metadata.get(BEST_LOSS, "inf"))

    def save_best(self, params: Mapping[str, Tensor], progress: Progress, loss: float) -> None:
        self.lock.check()
        self.background.start(lambda: self.export(self.best, params, progress, {BEST_LOSS: loss}))

    def export(
        self, path: Path, params: Mapping[str, Tensor], progress: Progress, extra: Mapping[str, object] | None = None
    ) -> None:
        c, subject = self.cfg, self.subject
        metadata = {**self._metadata(progress), **(extra or {})}
        if c.adapter.type != "none":
            save_lora(
                path, whole_rows(subject.model, dict(params)), rank=c.adapter.rank, alpha=c.adapter.alpha,
                architecture=subject.spec.name, metadata=metadata,
            )
            return
        with torch.device("meta"):
            whole = subject.spec.build(subject.flavor.arch)
        whole.load_state_dict({n: t.to(torch.bfloat16) for n, t in params.items()}, assign=True)
        about = {key: str(value) for key, value in (extra or {}).items()}
        save_dit(whole, path, flavor=subject.flavor, spec=subject.spec, extra=about)

    def _metadata(self, progress: Progress) -> dict[str, object]:
        """The `ss_*` entries that LoRA managers show."""
        c, plan = self.cfg, self.subject.plan
        owner = {} if plan is None else {
            "ss_loraid": c.adapter.loraid, "hvtrain.plan": plan.hash, "hvtrain.slices": plan.n,
            "ss_network_args": {"loraid": c.adapter.loraid, "granularity": plan.granularity, "order": plan.order},
        }
        return owner | {
            "ss_learning_rate": c.optim.lr, "ss_lr_scheduler": c.optim.schedule, "ss_optimizer": c.optim.name,
            "ss_lr_warmup_steps": c.optim.warmup_steps, "ss_max_grad_norm": c.optim.max_grad_norm,
            "ss_max_train_steps": self.steps, "ss_steps": progress.step, "ss_epoch": progress.epoch,
            "ss_num_train_items": self.n_samples, "ss_seed": c.run.seed,
            "ss_gradient_accumulation_steps": c.run.grad_accum, "ss_gradient_checkpointing": c.run.recompute != "none",
            "ss_mixed_precision": c.run.precision, "ss_network_dropout": c.adapter.dropout,
            "ss_timestep_sampling": c.flow.timestep_sampling, "ss_discrete_flow_shift": c.flow.shift,
            "ss_sigmoid_scale": c.flow.sigmoid_scale, "ss_logit_mean": c.flow.logit_mean,
            "ss_guidance_scale": c.flow.guidance, "ss_sd_model_name": Path(c.model.dit or "scratch").name,
            "ss_training_started_at": self.started, "ss_training_finished_at": time.time(),
            "ss_datasets": list(map(shown, c.data.shards)), "ss_fp8_base": c.model.quantize != "none",
            "hvtrain.base": self.subject.fingerprint, **of_flavor(self.subject.flavor),
            "modelspec.date": datetime.fromtimestamp(time.time()).isoformat(timespec="seconds"),
        }
