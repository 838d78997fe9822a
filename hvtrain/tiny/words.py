"""Words that the base model has never seen in a caption, each something that only the word tells: what slices
learn and a merge must keep. Used by `hvtrain demo --slices` and by forgetting.py.

The first six are circles of a colour. Of the other 34, which follow one another in turn, a word tells a
colour and a direction ("a disc on a dark background": red, to the left) or a colour and a background ("a
ball moves left": red on gray).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from hvtrain.errors import ConfigError
from hvtrain.tiny.clips import BACKGROUNDS, COLORS, MOTIONS, Drawing, combinations, render, training_clips
from hvtrain.tiny.score import look, read_video


@dataclass(frozen=True)
class Concept:
    """What a word tells; its captions tell the rest."""

    color: str
    motion: str = ""
    background: str = ""

    @property
    def told(self) -> str:
        """Beside the colour."""
        return "motion" if self.motion else "background" if self.background else ""


_SIX = {
    "star": "red", "cross": "green", "diamond": "blue", "heart": "yellow", "hexagon": "magenta",
    "oval": "cyan"
}
CONCEPTS = {word: Concept(color) for word, color in _SIX.items()}
_MORE = (
    "disc ball box dot line rabbit forest grass tree cloud flower butterfly squirrel bird cat dog man woman "
    "person face hand river sea fire sun moon meadow sky camera photo picture water zigzag film"
).split()


def _concept(number: int) -> Concept:
    """Even ones tell the direction, odd ones the background; every six of a kind have every colour."""
    turn, color = divmod(number // 2, len(COLORS))
    name = list(COLORS)[color]
    if number % 2 == 0:
        return Concept(name, motion=list(MOTIONS)[(color + turn) % len(MOTIONS)])
    return Concept(name, background=list(BACKGROUNDS)[(color + turn) % len(BACKGROUNDS)])


WORDS = {**CONCEPTS, **{word: _concept(number) for number, word in enumerate(_MORE)}}
OLD = "old words"
PLACES = tuple(product(MOTIONS, BACKGROUNDS))  # 12: of a word's clips, and of its prompts


def first(n: int) -> tuple[str, ...]:
    """The first `n` words."""
    if not 2 <= n <= len(WORDS):
        raise ConfigError(f"words: {n}: expected 2 to {len(WORDS)}, there are so many")
    return tuple(WORDS)[:n]


def _places(word: str) -> list[Drawing]:
    """12: each combination of what the word leaves open, as often as goes into it."""
    c = WORDS[word]
    every = [(m, b) for m, b in PLACES if c.motion in ("", m) and c.background in ("", b)]
    return [
        Drawing(c.color, "circle", m, b, word=word, told=c.told) for m,
        b in every * (len(PLACES) // len(every))
    ]


def clips_of(word: str, n: int, *, seed: int) -> list[Drawing]:
    """`n` clips of the word, a multiple of 12, and as many of old ones."""
    made = [replace(place, seed=seed * 1000 + i) for i, place in enumerate(_places(word) * (n // 12))]
    return made + training_clips(n, seed=seed * 100 + list(WORDS).index(word))


def old_clips(n: int, *, seed: int) -> list[Drawing]:
    """`n` clips of what the base knows, others than are among the words'."""
    return training_clips(n, seed=seed * 100 + 50)


def write_pairs(folder: Path, made: Sequence[Drawing], stem: str) -> None:
    """STEM_000.mp4 and its caption, STEM_000.txt, and so on."""
    from hvtrain.generate.video import write_mp4  # torch

    folder.mkdir(parents=True, exist_ok=True)
    for i, clip in enumerate(made):
        write_mp4(folder / f"{stem}_{i:03d}.mp4", render(clip), fps=8, metadata={"caption": clip.caption})
        (folder / f"{stem}_{i:03d}.txt").write_text(clip.caption)


def dataset_of(folders: Iterable[Path], path: Path) -> Path:
    """The dataset file of such folders."""
    parts = (
        f"[[datasets]]\nvideo_directory = '{f.resolve()}'\nresolution = [64, 64]\ntarget_frames = [9]\n"
        for f in folders
    )
    path.write_text("\n".join(parts))
    return path


def asked(words: Iterable[str], *, old: bool = True) -> list[Drawing]:
    """What a model is asked for: each word at 12 places, and the 24 combinations of old
    words that were never trained."""
    wanted = [place for w in words for place in _places(w)]
    _, held = combinations()
    return wanted + [Drawing(*c, list(BACKGROUNDS)[i % 3]) for i, c in enumerate(held) if old]


def prompt_lines(wanted: Sequence[Drawing]) -> str:
    """Of a prompt file. A word's prompts have the same noise whichever others are asked for: a LoRA alone and
    a merge of many differ in nothing else."""
    lines, asked_of = [], Counter[str]()
    for clip in wanted:
        noise = asked_of[clip.word] + (0 if clip.word else len(PLACES))
        lines.append(f"{clip.caption} --d {noise}\n")
        asked_of[clip.word] += 1
    return "".join(lines)


def shares(wanted: Sequence[Drawing], videos: Sequence[Path]) -> dict[str, float]:
    """Of each word, the share of its videos that show all that it tells; of old words,
    colour and direction as asked."""
    hits: dict[str, list[bool]] = {}
    for clip, path in zip(wanted, videos, strict=True):
        seen = look(read_video(path))
        right = seen.color == clip.color
        for name in [clip.told] if clip.told else [] if clip.word else ["motion"]:
            right = right and getattr(seen, name) == getattr(clip, name)
        hits.setdefault(clip.word or OLD, []).append(right)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def mean(scores: Mapping[str, float]) -> float:
    """Over the words among `scores`."""
    words = [word for word in WORDS if word in scores]
    return sum(scores[word] for word in words) / len(words)
