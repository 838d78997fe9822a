"""The files of a run: what is for the user, the checkpoints, and writing them behind the training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hvtrain.adapters.attach import whole_rows
from hvtrain.config import AdapterConfig, RunSettings
from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.write import save_lora
from hvtrain.models.load import save_dit
from hvtrain.train import checkpoint
from hvtrain.train.checkpoint import Progress, Snapshot
from hvtrain.train.parts import SealedFile, open_parts
from hvtrain.train.runlock import RunLock
from hvtrain.train.setup import Subject
from hvtrain.weights.containers import open_weights

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


@dataclass(frozen=True)
class Product:
    """What a run leaves of one DiT."""

    name: str  # of the file
    subject: Subject
    about: Mapping[str, object]  # metadata of the file, what stays the same through the run
    prefix: str = ""  # of its parameters' names in the run


def results_of(run: RunSettings, names: Sequence[str]) -> list[Path]:
    """What a finished run leaves for the user, `names`: of its products."""
    endings = ("", "-ema") if run.ema_decay else ("",)
    return [Path(run.output_dir, f"{name}{ending}.safetensors") for ending in endings for name in names]


def is_finished(results: Sequence[Path], found: Path, *, steps: int) -> bool:
    """Whether the checkpoint `found` is the run's end, and the results that were
    written with it are still whole."""
    over = checkpoint.step_of(found) >= steps
    return over and all(checkpoint.result_is_whole(found, path) for path in results)


@dataclass
class RunFiles:
    """Knows the names and what is in them. For rank 0; tensors that it is given must be copies."""

    run: RunSettings
    adapter: AdapterConfig
    products: Sequence[Product]
    steps: int
    lock: RunLock
    started: float = field(default_factory=time.time)
    background: Background = field(default_factory=Background)
    saved: int = 0  # the step that a next start goes on from

    @property
    def output(self) -> Path:
        return Path(self.run.output_dir)

    def save(self, snapshot: Snapshot, note: Callable[[str], None]) -> None:
        """The user's files, then the checkpoint: a run that dies in between comes back to before this step
        and writes them again. Raises CheckpointError at once where the disk has no room."""
        self.background.wait()
        self.lock.check()
        results = self._result_bytes(snapshot, last=snapshot.progress.step >= self.steps)
        checkpoint.check_room(self.checkpoints, snapshot, results=results)
        self._save(snapshot, note, partial(checkpoint.save, self.checkpoints, snapshot))

    def begin_parts(self, step: int) -> Path:
        """Before every rank writes its part (session.py): three fp32 values of each parameter,
        and then the result in bf16."""
        self.background.wait()
        self.lock.check()
        n_parameters = sum(p.subject.n_parameters for p in self.products)
        checkpoint.check_free(self.checkpoints, step, n_parameters * (3 * 4 + 2) + (1 << 20))
        return checkpoint.begin(self.checkpoints, step)

    def save_parts(
        self, folder: Path, progress: Progress, parts: Sequence[SealedFile], note: Callable[[str], None], *,
        best: float | None = None,
    ) -> None:
        """As `save`, of what all ranks have written in `folder`: the user's file is made of that, tensor by
        tensor. `best`: as `save_best`, of this loss."""
        params, optimizer = open_parts(folder)
        if best is not None:
            self.save_best(params, progress, best, then=partial(shutil.rmtree, folder))
            return
        self._save(
            Snapshot(progress, params, optimizer), note, partial(checkpoint.finish, folder, progress, parts)
        )

    def _save(self, snapshot: Snapshot, note: Callable[[str], None], keep: Callable[..., Path]) -> None:
        progress = snapshot.progress
        last = progress.step >= self.steps
        ending = "" if last else f"-step{progress.step:08d}"

        def write() -> None:
            try:
                self.export(ending, snapshot.params, progress)
                if snapshot.ema and last:
                    self.export("-ema", snapshot.ema, progress)
                keep(keep_last=self.run.keep_last, results=self.results if last else ())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.output}: step {progress.step} could not be saved ({error}); mend that and start "
                    "again: the run continues from the checkpoint before"
                ) from error
            self.saved = progress.step
            note(
                f"step {progress.step}: saved "
                f"{', '.join(f'{p.name}{ending}.safetensors' for p in self.products)}"
            )

        self.background.start(write)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def results(self) -> list[Path]:
        return results_of(self.run, [product.name for product in self.products])

    def mend_results(self, found: Path) -> list[str]:
        """Write those results of the finished run again, from its last checkpoint, that are gone or not
        what was written; their names."""
        lost = [path for path in self.results if not checkpoint.result_is_whole(found, path)]
        if not lost:
            return []
        self.lock.check()
        snapshot = checkpoint.load(found)
        for path in lost:
            averaged = path in self.results[len(self.products) :]
            if averaged and not snapshot.ema:
                raise CheckpointError(
                    f"{path} is lost, and {found} holds no moving average to make it from; set "
                    "run.ema_decay=0"
                )
            product = self.products[self.results.index(path) % len(self.products)]
            self._write(path, product, snapshot.ema if averaged else snapshot.params, snapshot.progress)
        checkpoint.seal_results(found, self.results)
        return [path.name for path in lost]

    def _result_bytes(self, snapshot: Snapshot, *, last: bool) -> int:
        lora = self.adapter.type != "none"
        size = 0
        for product in self.products:
            own = _own(product, snapshot.params)
            params = whole_rows(product.subject.model, dict(own)) if lora else own
            size += sum(t.numel() for t in params.values()) * (4 if lora else 2) + (1 << 20)
        return size * (2 if snapshot.ema and last else 1)

    @property
    def best(self) -> list[Path]:
        return [self.output / f"{product.name}-best.safetensors" for product in self.products]

    def best_loss(self) -> float:
        """Of the best weights so far, which their files themselves tell; infinite if there are none."""
        if not all(path.exists() for path in self.best):
            return float("inf")
        return max(float(open_weights(path).metadata.get(BEST_LOSS, "inf")) for path in self.best)

    def save_best(
        self, params: Mapping[str, Tensor], progress: Progress, loss: float,
        then: Callable[[], object] = lambda: None
    ) -> None:
        def write() -> None:
            self.export("-best", params, progress, {BEST_LOSS: loss})
            then()

        self.lock.check()
        self.background.start(write)

    def export(
        self, ending: str, params: Mapping[str, Tensor], progress: Progress,
        extra: Mapping[str, object] | None = None
    ) -> None:
        """One file of each product, which ends so."""
        for product in self.products:
            self._write(self.output / f"{product.name}{ending}.safetensors", product, params, progress, extra)

    def _write(
        self, path: Path, product: Product, params: Mapping[str, Tensor], progress: Progress,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        a, subject, params = self.adapter, product.subject, _own(product, params)
        if a.type != "none":
            save_lora(
                path, whole_rows(subject.model, dict(params)), rank=a.rank, alpha=a.alpha,
                architecture=subject.spec.name,
                metadata={**product.about, **self._now(progress), **(extra or {})},
            )
            return
        with torch.device("meta"):
            whole = subject.spec.build(subject.flavor.arch)
        about = {key: str(value) for key, value in (extra or {}).items()}
        save_dit(
            whole, path, flavor=subject.flavor, spec=subject.spec, dtype=torch.bfloat16, extra=about,
            value=lambda name: params[name] if name in params else subject.base_weight(name),
        )

    def _now(self, progress: Progress) -> dict[str, object]:
        now = time.time()
        return {
            "ss_steps": progress.step, "ss_epoch": progress.epoch,
            "ss_training_started_at": self.started, "ss_training_finished_at": now,
            "modelspec.date": datetime.fromtimestamp(now).isoformat(timespec="seconds"),
        }


def _own(product: Product, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A product's parameters among those of the run."""
    start = product.prefix
    if not start:
        return params
    return {name.removeprefix(start): t for name, t in params.items() if name.startswith(start)}
