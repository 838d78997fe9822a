"""A run that hangs says so: which rank stands where, in which step, and who keeps the others waiting.

Each rank's main thread notes what it is at. Of two threads beside it, one exchanges these notes through the
job's key-value store, and one watches: when nothing has moved for too long, it prints what all ranks last
said and ends the process. The watching thread asks nobody, because the store's keeper (rank 0) may be the
very process that has stopped, and then whoever asks it waits for ever. Collectives have no time-out of their
own that comes earlier (parallel/context.py), because theirs name neither the rank nor the step.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from hvtrain.parallel.context import ParallelContext

EXIT = 1
SHOWN = 24  # ranks in a report
_KEY = "hvtrain/at/{}/{}"


@dataclass(frozen=True)
class Place:
    """What a rank is at, since when, and when it last gave a sign of life (wall time of that machine)."""

    step: int
    phase: str
    since: float  # wall time
    seen: float
    writing: bool = False  # for as long as it takes: a disk has no deadline


class Watchdog:
    """Enter it around the loop and call `at` when the work changes. timeout_s 0:
    notes, but never ends anything."""

    def __init__(self, ctx: ParallelContext, timeout_s: float) -> None:
        self.ctx, self.timeout_s, self.interval = ctx, timeout_s, min(timeout_s / 5, 10.0)
        self.at(0, "starting")
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        self._heard: dict[int, Place | None] = {}
        self._answered = time.monotonic()  # when the store last did

    def at(self, step: int, phase: str, *, writing: bool = False) -> None:
        now = time.time()
        self.place, self._moved = Place(step, phase, now, now, writing), time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.timeout_s > 0:
            self.at(self.place.step, self.place.phase)
            work = [self._watch, self._exchange] if self.ctx.world > 1 else [self._watch]
            self._threads = [
                threading.Thread(target=w, name=f"hvtrain{w.__name__}", daemon=True) for w in work
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        for thread in self._threads:
            # the exchanging one may wait for a store that does not answer
            thread.join(timeout=2 * self.interval)

    def _exchange(self) -> None:
        try:
            store = _own_connection()  # here: rank 0 may be gone, and nothing waits for this thread
            while store is not None:
                place = replace(self.place, seen=time.time())
                store.set(_KEY.format(self.ctx.restarts, self.ctx.rank), json.dumps(asdict(place)))
                self._heard = {rank: self._ask(store, rank) for rank in range(self.ctx.world)}
                self._answered = time.monotonic()
                if self._end.wait(self.interval if None not in self._heard.values() else self.interval / 10):
                    return
        except RuntimeError:
            return  # the store went with rank 0: the launcher ends this process too

    def _ask(self, store: dist.Store, rank: int) -> Place | None:
        key = _KEY.format(self.ctx.restarts, rank)
        return Place(**json.loads(store.get(key))) if store.check([key]) else None

    def _watch(self) -> None:
        warned = self._moved
        while not self._end.wait(self.interval):
            now = time.monotonic()
            if now - self._moved <= self.timeout_s:
                continue
            if not self._somebody_writes():
                self._give_up()
            elif self.place.writing and now - max(warned, self._moved) > self.timeout_s:
                warned = now
                print(
                    f"warning: step {self.place.step}: {self.place.phase} for {now - self._moved:.0f} s; is "
                    "the disk " "slow, or its server away?",
                    file=sys.stderr, flush=True
                )

    def _somebody_writes(self) -> bool:
        """Then the others may have to wait for it; but not for one that is silent."""
        if self.place.writing:
            return True
        fresh = time.monotonic() - self._answered < self._stale_s
        now = time.time()
        return (
            fresh and any(
                p is not None and p.writing and now - p.seen < self._stale_s for p in self._heard.values()
            )
        )

    @property
    def _stale_s(self) -> float:
        return 3 * self.interval + 1

    def _give_up(self) -> None:
        deaf_s = time.monotonic() - self._answered if self.ctx.world > 1 else 0.0
        places = {**self._heard, self.ctx.rank: replace(self.place, seen=time.time())}
        print(f"Where rank {self.ctx.rank} stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True, file=sys.stderr)
        # Last: of a rank without a terminal, a launcher shows the end of what it said.
        text = report(places, stale_s=self._stale_s, timeout_s=self.timeout_s, deaf_s=deaf_s)
        print(text, file=sys.stderr, flush=True)
        os._exit(EXIT)  # the main thread cannot be woken from a collective


def _own_connection() -> dist.Store | None:
    """To the job's store; the main thread's own may be busy waiting."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return None
    try:
        return dist.TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
    except RuntimeError:
        return None


def report(places: dict[int, Place | None], *, stale_s: float, timeout_s: float, deaf_s: float = 0.0) -> str:
    """Names the ranks that keep the others waiting: the silent ones, else those that
    are behind or at something else.

    `deaf_s`: for how long the store has told nothing of the others. Its keeper is then the one.
    """
    now, deaf = time.time(), deaf_s > stale_s
    heard_at = now - deaf_s if deaf else now
    silent = [0] if deaf else [r for r, p in places.items() if p is None or heard_at - p.seen > stale_s]
    heard = {r: p for r, p in places.items() if p is not None and r not in silent}
    guilty = silent or _odd_ones(heard)
    lines = [f"error: nothing has moved for {timeout_s:g} s (run.hang_timeout_s): the run hangs"]
    if deaf:
        lines.append(
            "  rank 0, through which the ranks tell each other where they are, has not answered for "
            f"{deaf_s:.0f} s; what follows was true before"
        )
    everyone = sorted(
        {**dict.fromkeys(silent), **places}.items(), key=lambda item: (item[0] not in guilty, item[0])
    )
    for rank, p in everyone[:SHOWN]:
        if p is None:
            where = "never heard of"
        else:
            where = f"step {p.step}, {p.phase} for {now - p.since:.0f} s"
            where += (
                f", silent for {now - p.seen:.0f} s (dead, stopped, or its machine lost)"
                if rank in silent else ""
            )
        mark = "  <- the others wait for it" if rank in guilty and len(guilty) < max(2, len(places)) else ""
        lines.append(f"  rank {rank}: {where}{mark}")
    if len(everyone) > SHOWN:
        lines.append(f"  and {len(everyone) - SHOWN} more")
    return "\n".join(lines)


def _odd_ones(heard: dict[int, Place]) -> list[int]:
    """Those behind; if all are in one step, those that are at something else than most."""
    if not heard:
        return []
    first = min(p.step for p in heard.values())
    behind = [r for r, p in heard.items() if p.step == first]
    if len(behind) < len(heard):
        return behind
    phases = [p.phase for p in heard.values()]
    common = max(phases, key=phases.count)
    return [r for r, p in heard.items() if p.phase != common]
