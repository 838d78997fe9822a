"""Does a DiT draw what it is told? `python -m hvtrain.tiny.evaluate DIRECTORY [key=value ...]`.

Renders the 24 colour x shape x motion combinations that training never shows and looks at the pixels. Keys are those of
`hvtrain generate` (configs/tiny/generate.yaml), for example model.dit=... or seed=100.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvtrain.config import GenerateConfig, load
from hvtrain.tiny.clips import BACKGROUNDS, Drawing, combinations
from hvtrain.tiny.score import CONFIGS, look, read_video


def evaluate(folder: Path, keys: Sequence[str]) -> dict[str, float]:
    """{"color": share right, "motion": share right} over the held-out combinations; videos stay in `folder`."""
    from hvtrain.generate.run import run

    _, held = combinations()
    wanted = [Drawing(*c, list(BACKGROUNDS)[i % 3]) for i, c in enumerate(held)]
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(clip.caption for clip in wanted) + "\n")
    cfg = load(GenerateConfig, CONFIGS / "generate.yaml", keys)
    files = run(replace(cfg, prompt=None, prompt_file=str(prompts), output=str(folder)))
    right = {"color": 0, "motion": 0}
    for clip, path in zip(wanted, files):
        seen = look(read_video(path))
        right["color"] += seen.color == clip.color
        right["motion"] += seen.motion == clip.motion
        verdict = "" if (seen.color, seen.motion) == (clip.color, clip.motion) else f"   looks {seen.color} {seen.motion}"
        print(f"{path.name}  {clip.caption}{verdict}")
    return {name: n / len(wanted) for name, n in right.items()}


def main(argv: list[str]) -> None:
    shares = evaluate(Path(argv[0]), argv[1:])
    print("  ".join(f"{name} right {share:.0%}" for name, share in shares.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
