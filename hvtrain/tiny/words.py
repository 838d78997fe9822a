"""Six words that the base model has never seen in a caption, each a circle of a colour that only the word tells: what slices
learn and a merge must keep. Used by `hvtrain demo --slices` and by forgetting.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from hvtrain.tiny.clips import BACKGROUNDS, MOTIONS, Drawing, combinations, render, training_clips
from hvtrain.tiny.score import look, read_video

CONCEPTS = {"star": "red", "cross": "green", "diamond": "blue", "heart": "yellow", "hexagon": "magenta", "oval": "cyan"}
OLD = "old words"
PLACES = tuple(product(MOTIONS, BACKGROUNDS))  # 12: of a word's clips, and of its prompts


def clips_of(word: str, n: int, *, seed: int) -> list[Drawing]:
    """`n` clips of the word, a multiple of 12, and as many of old ones."""
    made = [Drawing(CONCEPTS[word], "circle", m, b, seed * 1000 + i, word) for i, (m, b) in enumerate(PLACES * (n // 12))]
    return made + training_clips(n, seed=seed * 100 + list(CONCEPTS).index(word))


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
    parts = (f"[[datasets]]\nvideo_directory = '{f.resolve()}'\nresolution = [64, 64]\ntarget_frames = [9]\n" for f in folders)
    path.write_text("\n".join(parts))
    return path


def asked(words: Iterable[str], *, old: bool = True) -> list[Drawing]:
    """What a model is asked for: each word at 12 places, and the 24 combinations of old words that were never trained."""
    wanted = [Drawing(CONCEPTS[w], "circle", m, b, 0, w) for w in words for m, b in PLACES]
    _, held = combinations()
    return wanted + [Drawing(*c, list(BACKGROUNDS)[i % 3]) for i, c in enumerate(held) if old]


def shares(wanted: Sequence[Drawing], videos: Sequence[Path]) -> dict[str, float]:
    """Of each word, the share of its videos that show its colour; of old words, that show colour and direction as asked."""
    hits: dict[str, list[bool]] = {}
    for clip, path in zip(wanted, videos, strict=True):
        seen = look(read_video(path))
        right = seen.color == clip.color and (bool(clip.word) or seen.motion == clip.motion)
        hits.setdefault(clip.word or OLD, []).append(right)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def mean(scores: Mapping[str, float]) -> float:
    """Over the words among `scores`."""
    words = [word for word in CONCEPTS if word in scores]
    return sum(scores[word] for word in words) / len(words)
