"""A run that hangs says so: which rank stands where, in which step, and who keeps the others waiting.

Each rank's main thread notes what it is at; a thread beside it publishes that through the job's key-value store and, when
nothing has moved for too long, prints what all ranks last said and ends the process. Collectives have no time-out of
their own that comes earlier (parallel/context.py), because theirs name neither the rank nor the step.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from hvtrain.parallel.context import ParallelContext

EXIT = 1
_KEY = "hvtrain/at/{}/{}"


@dataclass(frozen=True)
class Place:
    """What a rank is at, since when, and when it last gave a sign of life (wall time of that machine)."""

    step: int
    phase: str
    since: float  # wall time
    seen: float


class Watchdog:
    """Enter it around the loop and call `at` when the work changes. timeout_s 0: notes, but never ends anything."""

    def __init__(self, ctx: ParallelContext, timeout_s: float) -> None:
        self.ctx, self.timeout_s = ctx, timeout_s
        self.place = Place(0, "starting", time.time(), time.time())
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None

    def at(self, step: int, phase: str) -> None:
        now = time.time()
        self.place = Place(step, phase, now, now)

    def __enter__(self) -> Watchdog:
        if self.timeout_s > 0:
            self.at(self.place.step, self.place.phase)
            self._thread = threading.Thread(target=self._watch, name="hvtrain-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        interval = min(self.timeout_s / 5, 10.0)
        self._store = _own_connection() if self.ctx.world > 1 else None  # here: rank 0 may be gone, and nothing waits for it
        while True:
            try:
                self._publish()
                if time.time() - self.place.since > self.timeout_s:
                    self._give_up(interval)
            except RuntimeError:  # the store went with rank 0: the launcher ends this process too
                self._store = None
            if self._end.wait(interval):
                return

    def _publish(self) -> None:
        if self._store is not None:
            place = Place(self.place.step, self.place.phase, self.place.since, time.time())
            self._store.set(_KEY.format(self.ctx.restarts, self.ctx.rank), json.dumps(asdict(place)))

    def _give_up(self, interval: float) -> None:
        places = self._read()
        print(report(places, stale_s=3 * interval + 1, timeout_s=self.timeout_s), file=sys.stderr)
        print(f"Where rank {self.ctx.rank} stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True, file=sys.stderr)
        os._exit(EXIT)  # the main thread cannot be woken from a collective

    def _read(self) -> dict[int, Place | None]:
        found: dict[int, Place | None] = {self.ctx.rank: self.place if self._store is None else None}
        if self._store is None:
            return {self.ctx.rank: Place(self.place.step, self.place.phase, self.place.since, time.time())}
        for rank in range(self.ctx.world):
            key = _KEY.format(self.ctx.restarts, rank)
            found[rank] = Place(**json.loads(self._store.get(key))) if self._store.check([key]) else None
        return found


def _own_connection() -> dist.Store | None:
    """To the job's store; the main thread's own may be busy waiting."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    try:
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    except RuntimeError:
        return None


def report(places: dict[int, Place | None], *, stale_s: float, timeout_s: float) -> str:
    """Names the ranks that keep the others waiting: the silent ones, else those that are behind or at something else."""
    now = time.time()
    silent = [r for r, p in places.items() if p is None or now - p.seen > stale_s]
    heard = {r: p for r, p in places.items() if p is not None and r not in silent}
    guilty = silent
    if not guilty and heard:
        first = min(p.step for p in heard.values())
        behind = [r for r, p in heard.items() if p.step == first]
        if len(behind) == len(heard):  # all in one step: the odd one out, and of equals the one that got there last
            phases = [p.phase for p in heard.values()]
            common = max(phases, key=phases.count)
            odd = [r for r, p in heard.items() if p.phase != common]
            behind = odd or []
        guilty = behind
    lines = [f"error: no step has ended for {timeout_s:g} s (run.hang_timeout_s): the run hangs"]
    for rank, p in sorted(places.items()):
        if p is None:
            where = "never heard of"
        else:
            where = f"step {p.step}, {p.phase} for {now - p.since:.0f} s"
            where += f", silent for {now - p.seen:.0f} s (dead, stopped, or its machine lost)" if rank in silent else ""
        mark = "  <- the others wait for it" if rank in guilty and len(guilty) < len(places) else ""
        lines.append(f"  rank {rank}: {where}{mark}")
    return "\n".join(lines)
