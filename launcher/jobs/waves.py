"""Slices in waves: a later one is trained on top of the merge of all before it, which has a job of its own.

    RUN/merge/wave-1.safetensors    what wave 2 is trained on, by the job merge-1; the last merge is the run's
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.jobs.slices import Slices

MERGE = "merge"


def members(slices: Slices, wave: int) -> range:
    """LORAIDs of a wave, from 1: equally many in each, one more in the first where they do not divide."""
    each, more = divmod(slices.n, slices.waves)
    begin = 1 + (wave - 1) * each + min(wave - 1, more)
    return range(begin, begin + each + (wave <= more))


def wave_of(slices: Slices, loraid: int) -> int:
    return next(wave for wave in every(slices) if loraid in members(slices, wave))


def every(slices: Slices) -> range:
    return range(1, slices.waves + 1)


def merge_name(slices: Slices, wave: int) -> str:
    """Of a wave's merge job."""
    return MERGE if wave == slices.waves else f"{MERGE}-{wave}"


def merged(run: Path, wave: int) -> Path:
    return run / "merge" / f"wave-{wave}.safetensors"


def under(run: Path, slices: Slices, loraid: int) -> Path | None:
    """The LoRA that a slice is trained on top of."""
    wave = wave_of(slices, loraid)
    return merged(run, wave - 1) if wave > 1 else None


def loras(run: Path, slices: Slices, wave: int) -> list[str]:
    """What goes into a wave's merge: what the waves before have become, and its own slices."""
    before = [str(merged(run, wave - 1))] if wave > 1 else []
    return [
        word for one in (*before, *(str(run / slices.name(i)) for i in members(slices, wave)))
        for word in ("--lora", one)
    ]


def merge_arguments(run: Path, slices: Slices, wave: int) -> tuple[str, ...]:
    """Of `hvtrain merge` for a wave: the run's own for the last one, one LoRA for the others."""
    if wave == slices.waves:
        return slices.merge
    own = ("--lora", "--plan", "--slices", "--as", "--output")
    pairs = zip(("", *slices.merge), slices.merge)  # an option's value comes after it, a key=value alone
    kept = [word for before, word in pairs if word not in own and before not in own]
    return (*kept, *loras(run, slices, wave), "--as", "lora", "--output", str(merged(run, wave)))
