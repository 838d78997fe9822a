"""The rows of forgetting.py's table: what a way keeps, of every seed that it was
run with, as mean and range."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvtrain.tiny.words import OLD
from shards.atomic import write_text

HEAD = ("", "", "seeds", "mean", "worst word", "mean of alone", "worst of alone", "old words", "CPU s")


@dataclass(frozen=True)
class Row:
    """One way with one seed."""

    way: str
    how: str
    scores: dict[str, float]  # share of right videos of each word, and of old ones
    # CPU time of what makes it: a merge, or a LoRA's training; without scoring. None: not known
    seconds: float | None
    # of each word, what its own LoRA shows: the measure of the merges of this way and seed
    alone: bool = False

    @property
    def words(self) -> list[str]:
        return [word for word in self.scores if word != OLD]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def read_row(path: Path) -> Row | None:
    """None: not made yet."""
    return Row(**json.loads(path.read_text())) if path.exists() else None


def kept(row: Row, alone: Mapping[str, float]) -> list[float]:
    """Of each word, the share of what its LoRA shows alone. More than alone counts as alone, so
    no word makes up for another."""
    return [min(1.0, row.scores[word] / alone[word]) if alone[word] else 1.0 for word in row.words]


def markdown(seeds: Sequence[Sequence[Row]]) -> str:
    """`seeds`: the rows of each seed. A line for each way in the order of the first that has it."""
    alone = [_alone(rows) for rows in seeds]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for way, how in dict.fromkeys((row.way, row.how) for rows in seeds for row in rows):
        found = [
            (row, own.get(way, {})) for rows,
            own in zip(seeds, alone) for row in rows if (row.way, row.how) == (way, how)
        ]
        of_alone = [kept(row, own) for row, own in found if not row.alone and set(row.words) <= set(own)]
        cells = [
            _spread([_mean([row.scores[word] for word in row.words]) for row, _ in found]),
            _spread([min(row.scores[word] for word in row.words) for row, _ in found]),
            _spread([_mean(shares) for shares in of_alone]),
            _spread([min(shares) for shares in of_alone]),
            _spread([row.scores[OLD] for row, _ in found if OLD in row.scores]),
        ]
        seconds = [row.seconds for row, _ in found if row.seconds is not None]
        cells.append(f"{_mean(seconds):.0f}" if seconds else "")
        lines.append("| " + " | ".join([way, how, str(len(found)), *cells]) + " |")
    return "\n".join(lines)


def _alone(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By way and word."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.alone:
            found.setdefault(row.way, {}).update((word, row.scores[word]) for word in row.words)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(shares: Sequence[float]) -> str:
    """Mean over the seeds and, where they differ, [least-most], in per cent."""
    if not shares:
        return ""
    show: Callable[[float], str] = lambda share: f"{100 * share:.0f}"  # noqa: E731
    least, most = show(min(shares)), show(max(shares))
    return show(_mean(shares)) + (f" [{least}-{most}]" if least != most else "")
