"""Progress over all ranks: each leaves its count in a file, rank 0 adds them up. No
collective, so no rank waits."""

from __future__ import annotations

import json
import time
from pathlib import Path

from hvtrain.encode.places import shown
from hvtrain.encode.samples import PlannedSample
from hvtrain.progress import Bar
from shards.atomic import write_text

PROGRESS = ".progress"
EVERY_S = 2.0


class Meter:
    """Samples and cost (frames x area) over all columns: a live bar on a terminal,
    else a line every five seconds."""

    def __init__(self, root: Path, *, rank: int, world: int, samples: int, cost: float) -> None:
        """`samples` and `cost`: of all ranks and columns together."""
        self.root, self.rank, self.world = root, rank, world
        self.samples, self.cost = samples, cost
        self.column = ""
        # samples that are done, cost of those that were encoded, cost of the others
        self.mine = [0, 0.0, 0.0]
        self.bar = Bar("encoding", max(cost, 1.0), show=rank == 0)
        self.last = time.monotonic()

    def advance(self, sample: PlannedSample, encoded: bool) -> None:
        self.mine[0] += 1
        self.mine[1 if encoded else 2] += sample.cost
        now = time.monotonic()
        if now - self.last < EVERY_S:
            return
        self.last = now
        if self.rank:
            write_text(self._file(self.rank), json.dumps(self.mine))
        else:
            self._show(sample)

    def close(self) -> None:
        self.bar.close()
        if self.rank:
            self._file(self.rank).unlink(missing_ok=True)

    def _show(self, sample: PlannedSample) -> None:
        n, encoded, others = self.mine
        for rank in range(1, self.world):
            try:
                its = json.loads(self._file(rank).read_text())
                n, encoded, others = n + its[0], encoded + its[1], others + its[2]
            except (OSError, ValueError):
                continue  # not begun, or done: shown a little low

        def log(since_s: float) -> str:
            # What was there already took no time, and says nothing about the rest.
            left = since_s * (self.cost - encoded - others) / encoded
            who = f" by {self.world} processes" if self.world > 1 else ""
            at = f"{self.column}, {shown(sample.clip.path.name)}"
            return f"{n} of {self.samples} (samples x columns) done{who}, at {at}, about {left:.0f} s left"

        self.bar.update(encoded + others, f"{n}/{self.samples}", log if encoded else None)

    def _file(self, rank: int) -> Path:
        return self.root / f"{PROGRESS}.{rank}"
