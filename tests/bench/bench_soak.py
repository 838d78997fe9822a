"""A thousand steps with everything that is logged: does memory grow, and what does the logging cost?

    python -m tests.bench.bench_soak [STEPS]

Prints a table. Every second step of one run of the tiny model is logged, so that what else the machine does
falls on both kinds alike; times are the processor's, of this process, for the same reason.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hvtrain.train import loop
from hvtrain.train import run as train
from tests.train.shardset import config, make_shards

PART = 100  # steps between looks at the memory, and evaluations


@dataclass(frozen=True)
class Soak:
    on_s: float  # of a step that is logged: the median
    off_s: float
    memory_mib: list[float]  # of the process, after each part

    @property
    def overhead(self) -> float:
        return self.on_s / self.off_s - 1

    @property
    def growth_mib(self) -> float:
        """From the second part, when all is warm, to the last."""
        return self.memory_mib[-1] - self.memory_mib[1]


def soak(folder: Path, steps: int) -> Soak:
    a, b = (make_shards(folder / name, n=8, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    cfg = config(
        a, folder / "run", f"data.shards=[{a}, {b}]", f"run.steps={steps}", "data.workers=0",
        "data.calibration=0", "run.log_every=2", "run.peak_tflops=1", f"eval.shards={a}",
        f"eval.every_steps={PART}", "eval.max_batches=1",
    )
    begun: list[float] = []
    memory: list[float] = []
    before = loop._step

    def timed(*args, **options):
        begun.append(time.process_time())
        if len(begun) % PART == 0:
            memory.append(_memory_mib())
        return before(*args, **options)

    loop._step = timed
    try:
        assert train.run(cfg) == 0
    finally:
        loop._step = before
    taken = [end - begin for begin, end in itertools.pairwise(begun)]  # of steps 1, 2, ..., logging included
    return Soak(statistics.median(taken[1::2]), statistics.median(taken[::2]), memory)


def _memory_mib() -> float:
    """Resident now, not at the most."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), steps)
        n = len((Path(folder) / "run/metrics.jsonl").read_text().splitlines())
        names = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[0])
    print(f"\n{'':<24}{'everything on':>16}{'everything off':>16}")
    print(
        f"{'CPU ms of a step':<24}{1000 * found.on_s:>16.2f}{1000 * found.off_s:>16.2f}   "
        f"{found.overhead:+.1%}"
    )
    print(f"{'rows, values in one':<24}{n:>10}, {len(names):>4}")
    print(
        f"{'MiB after part 2, last':<24}{found.memory_mib[1]:>8.0f}{found.memory_mib[-1]:>8.0f}   "
        f"{found.growth_mib:+.1f}"
    )


if __name__ == "__main__":
    main()
