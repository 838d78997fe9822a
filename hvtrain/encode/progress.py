"""Progress over all ranks: each leaves its count in a file, rank 0 adds them up. No collective, so no rank waits."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from hvtrain.encode.plan import PlannedSample
from shards.atomic import write_text

PROGRESS = ".progress"
EVERY_S = 2.0


class Meter:
    """Samples and cost (frames x area) over all columns: a live bar on a terminal, else a line every five seconds."""

    def __init__(self, root: Path, *, rank: int, world: int, samples: int, cost: float) -> None:
        """`samples` and `cost`: of all ranks together."""
        self.root, self.rank, self.world = root, rank, world
        self.samples, self.cost = samples, max(cost, 1.0)
        self.mine = [0, 0.0]
        self.begun = self.last = time.monotonic()
        self.shown = self.begun
        self.bar = None
        if rank == 0 and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("encoding"), BarColumn(), TextColumn("{task.fields[n]}"), TimeRemainingColumn())
            self.task = self.bar.add_task("encoding", total=self.cost, n=f"0/{samples}")
            self.bar.start()

    def advance(self, sample: PlannedSample) -> None:
        self.mine[0] += 1
        self.mine[1] += sample.cost
        now = time.monotonic()
        if now - self.last < EVERY_S:
            return
        self.last = now
        if self.rank:
            write_text(self._file(self.rank), json.dumps(self.mine))
        else:
            self._show(now)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.rank:
            self._file(self.rank).unlink(missing_ok=True)

    def _show(self, now: float) -> None:
        n, cost = self.mine
        for rank in range(1, self.world):
            try:
                its = json.loads(self._file(rank).read_text())
                n, cost = n + its[0], cost + its[1]
            except (OSError, ValueError):
                continue  # not begun, or done: shown a little low
        if self.bar is not None:
            self.bar.update(self.task, completed=cost, n=f"{n}/{self.samples}")
        elif now - self.shown > 5:
            self.shown = now
            left = (now - self.begun) * (self.cost / max(cost, 1.0) - 1)
            who = f" by {self.world} processes" if self.world > 1 else ""
            print(f"encoded {n}/{self.samples}{who}, about {left:.0f} s left", flush=True)

    def _file(self, rank: int) -> Path:
        return self.root / f"{PROGRESS}.{rank}"
