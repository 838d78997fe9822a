"""Runs, read from their directories: while they train, too."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvtrain.errors import ConfigError
from hvtrain.train import runlock
from hvtrain.train.status import RUNNING, read_status

Curve = list[tuple[int, float]]  # (step, value), in order
LAST = 20  # steps that a number in the table is the mean of


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    state: str  # running, finished, stopped, failed, killed, or "?" of an older version
    step: int = 0
    steps: int | None = None
    error: str = ""
    seen: float = 0.0  # wall time of its last sign of life
    curves: dict[str, Curve] = field(default_factory=dict)

    def recent(self, name: str) -> float | None:
        """Mean of the last values of a curve."""
        values = [value for _, value in self.curves.get(name, [])[-LAST:]]
        return sum(values) / len(values) if values else None


def find_runs(folders: Sequence[str]) -> list[Run]:
    """Every run in and below the folders, by path. Raises ConfigError where there is none."""
    found: dict[Path, None] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder} is not a directory")
        found |= dict.fromkeys(_directories(folder))
    if not found:
        raise ConfigError(
            f"{', '.join(folders)}: no run of `hvtrain train` in there (a directory with run.json)"
        )
    named = {path: _name(path, [Path(folder) for folder in folders]) for path in sorted(found)}
    return [_read(path, name) for path, name in named.items()]


def _directories(folder: str) -> Iterator[Path]:
    for here, below, files in os.walk(folder):
        if "run.json" in files:
            below.clear()  # its checkpoints hold no runs
            yield Path(here)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _name(path: Path, folders: Sequence[Path]) -> str:
    root = next((f for f in folders if f in path.parents), path.parent)
    return str(path.relative_to(root)) if path != root else path.resolve().name


def _read(path: Path, name: str) -> Run:
    status, curves, seen, step = read_status(path), _curves(path), 0.0, 0
    for values in curves.values():
        step = max(step, values[-1][0])
    for file in (path / "metrics.jsonl", path / "status.json", path / "run.json"):
        seen = max(seen, file.stat().st_mtime if file.exists() else 0.0)
    state = status.state or "?"
    if state == RUNNING and not is_held(path):
        state = "killed"
    return Run(path, name, state, step, status.steps, status.error, seen, curves)


def _curves(path: Path) -> dict[str, Curve]:
    """Of metrics.jsonl; a row that a kill cut off is left out."""
    points: dict[str, dict[int, float]] = {}
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, (int, float)):
                points.setdefault(name, {})[step] = float(value)  # a step that was trained again counts once
    return {name: sorted(values.items()) for name, values in points.items()}


def is_held(path: Path) -> bool:
    """Whether a process trains in it: its lock's time moves every few seconds, on whatever machine it is."""
    lock = path / runlock.NAME
    return lock.exists() and time.time() - lock.stat().st_mtime < runlock.WATCH_S
