"""A thousand steps with everything that is logged, and the same with nothing: does memory grow, and what does the logging cost?

    python -m tests.bench.bench_soak [STEPS]

Prints a table. Both runs are one process of the tiny model; their steps are taken in turn, a hundred at a time, so that what
else the machine does meanwhile falls on both.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvtrain.train import run as train
from tests.train.shardset import config, make_shards

PART = 100  # steps in a row


@dataclass(frozen=True)
class Soak:
    on_s: float  # per step: the median of the parts
    off_s: float
    memory_mib: list[float]  # of the process, after each part with everything on

    @property
    def overhead(self) -> float:
        return self.on_s / self.off_s - 1

    @property
    def growth_mib(self) -> float:
        """From the second part, when all is warm, to the last."""
        return self.memory_mib[-1] - self.memory_mib[1]


def soak(folder: Path, steps: int) -> Soak:
    shards = [make_shards(folder / name, n=8, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    both = f"data.shards=[{shards[0]}, {shards[1]}]"
    every = {
        "on": ("run.log_every=1", "run.peak_tflops=1", f"eval.shards={shards[0]}", f"eval.every_steps={PART}",
               "eval.max_batches=1"),
        "off": ("run.log_every=1000000",),
    }
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    memory = []
    for until in range(PART, steps + 1, PART):
        for name, options in every.items():
            cfg = config(
                shards[0], folder / name, both, f"run.steps={until}", "data.workers=0", "data.calibration=0", "run.keep_last=1",
                *options,
            )
            taken = _steps_of(cfg)
            seconds[name].append(statistics.median(taken))
            if name == "on":
                memory.append(_memory_mib())
    return Soak(statistics.median(seconds["on"]), statistics.median(seconds["off"]), memory)


def _steps_of(cfg) -> Sequence[float]:
    """From the end of a step to the end of the next, logging included."""
    from hvtrain.train import loop

    ends: list[float] = []
    before = loop._step

    def timed(*args, **options):
        ends.append(time.perf_counter())
        return before(*args, **options)

    loop._step = timed
    try:
        assert train.run(cfg) == 0
    finally:
        loop._step = before
    return [b - a for a, b in itertools.pairwise(ends)]


def _memory_mib() -> float:
    """Resident now, not at the most."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), steps)
        n = len((Path(folder) / "on/metrics.jsonl").read_text().splitlines())
        names = json.loads((Path(folder) / "on/metrics.jsonl").read_text().splitlines()[0])
    print(f"\n{'':<24}{'everything on':>16}{'everything off':>16}")
    print(f"{'ms a step':<24}{1000 * found.on_s:>16.2f}{1000 * found.off_s:>16.2f}   {found.overhead:+.1%}")
    print(f"{'rows, values in one':<24}{n:>10}, {len(names):>4}")
    print(f"{'MiB after part 2, last':<24}{found.memory_mib[1]:>8.0f}{found.memory_mib[-1]:>8.0f}   {found.growth_mib:+.1f}")


if __name__ == "__main__":
    main()
