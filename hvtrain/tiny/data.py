"""Captioned clip folders as a user would bring them: `python -m hvtrain.tiny.data
configs/tiny/clips.yaml [key=value ...]`."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvtrain.tiny import clips

REAL_CAPTION = "big buck bunny, an animated cartoon clip"


@dataclass(frozen=True)
class ClipsRecipe:
    """Which clips to write, and where."""

    output: str = ""
    """Folder for NAME.mp4 + NAME.txt pairs and dataset.toml"""
    n: int = 1440
    """Synthetic clips, spread evenly over the training combinations and backgrounds"""
    n_real: int = 0
    """Crops of the real clip"""
    real_clip: str = "tests/data/bigbuckbunny.mp4"
    """The real clip"""
    concept: bool = False
    """Draw the demo's concept instead of the base vocabulary"""
    frames: int = 9
    """Frames a clip: 4n + 1"""
    size: int = 64
    """Height and width in pixels"""
    fps: int = 8
    """Frames a second"""
    seed: int = 0
    """Seed of starts, sizes and shades"""


def write_clips(recipe: ClipsRecipe) -> Path:
    """Write the folder and return the path of its dataset.toml."""
    from hvtrain.generate.video import write_mp4

    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    make = clips.concept_clips if recipe.concept else clips.training_clips
    made: list[tuple[str, np.ndarray]] = [
        (c.caption, clips.render(c, frames=recipe.frames, height=recipe.size, width=recipe.size))
        for c in make(recipe.n, seed=recipe.seed)
    ]
    made += [(REAL_CAPTION, video) for video in _real_crops(recipe)]
    for i, (caption, video) in enumerate(made):
        write_mp4(folder / f"clip_{i:05d}.mp4", video, fps=recipe.fps, metadata={"caption": caption})
        (folder / f"clip_{i:05d}.txt").write_text(caption + "\n")
    dataset = folder / "dataset.toml"
    dataset.write_text(
        f"[general]\nresolution = [{recipe.size}, {recipe.size}]\ncaption_extension = \".txt\"\n\n"
        f"[[datasets]]\nvideo_directory = \"{folder.resolve()}\"\n"
        f"target_frames = [{recipe.frames}]\nframe_extraction = \"head\"\n"
    )
    return dataset


def _real_crops(recipe: ClipsRecipe) -> list[np.ndarray]:
    if not recipe.n_real:
        return []
    from hvtrain.tiny.train_vae import read_real

    real = read_real(recipe.real_clip)
    count, height, width, _ = real.shape
    rng, size, made = random.Random(recipe.seed), recipe.size, []
    for _ in range(recipe.n_real):
        f, y, x = (rng.randrange(n) for n in (count - recipe.frames + 1, height - size + 1, width - size + 1))
        made.append(real[f : f + recipe.frames, y : y + size, x : x + size])
    return made


def main(argv: list[str]) -> None:
    from hvtrain.config import load

    print(write_clips(load(ClipsRecipe, argv[0], argv[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
