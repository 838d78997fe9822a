"""Does a DiT draw what it is told? `python -m hvtrain.tiny.evaluate DIRECTORY [CONFIG] [key=value ...]`.

Renders the 24 colour x shape x motion combinations that training never shows and looks at the pixels. CONFIG
and keys are those of `hvtrain generate` (configs/tiny/generate.yaml), for example model.dit=... or seed=100.
A model of image to video is given the first frame of such a clip, and says how well it keeps it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvtrain.config import GenerateConfig, ModelConfig, load
from hvtrain.models import find
from hvtrain.tiny.clips import BACKGROUNDS, Drawing, combinations
from hvtrain.tiny.score import CONFIGS, draw_first, kept, look, read_video


def evaluate(folder: Path, config: str | Path, keys: Sequence[str]) -> dict[str, float]:
    """{"color": share right, "motion": share right} over the held-out combinations; videos stay in `folder`.
    With pictures also "kept", the PSNR in dB of the worst first frame against the one that was given."""
    from hvtrain.generate.run import run

    _, held = combinations()
    wanted = [Drawing(*c, list(BACKGROUNDS)[i % 3], seed=i) for i, c in enumerate(held)]
    folder.mkdir(parents=True, exist_ok=True)
    cfg = load(GenerateConfig, config, keys)
    pictures = draw_first(wanted, folder.resolve()) if takes_picture(cfg.model) else []
    prompts = folder / "prompts.txt"
    given = [f" --i {picture}" for picture in pictures] or [""] * len(wanted)
    prompts.write_text("".join(f"{clip.caption}{more}\n" for clip, more in zip(wanted, given)))
    files = run(replace(cfg, prompt=None, prompt_file=str(prompts), output=str(folder)))
    right = {"color": 0, "motion": 0}
    for clip, path in zip(wanted, files):
        seen = look(read_video(path))
        right["color"] += seen.color == clip.color
        right["motion"] += seen.motion == clip.motion
        verdict = (
            "" if (seen.color, seen.motion) == (clip.color, clip.motion)
            else f"   looks {seen.color} {seen.motion}"
        )
        print(f"{path.name}  {clip.caption}{verdict}")
    shares = {name: n / len(wanted) for name, n in right.items()}
    return {**shares, "kept": min(map(kept, files, pictures))} if pictures else shares


def takes_picture(model: ModelConfig) -> bool:
    flavor = find(model.name).flavor(model.flavor)
    return bool(flavor.beyond_text) and not flavor.image_optional


def main(argv: list[str]) -> None:
    config, keys = (
        (argv[1], argv[2:])
        if argv[1:2] and argv[1].endswith(".yaml") else (CONFIGS / "generate.yaml", argv[1:])
    )
    shares = evaluate(Path(argv[0]), config, keys)
    worst = shares.pop("kept", None)
    shown = [f"{name} right {share:.0%}" for name, share in shares.items()]
    print("  ".join(shown if worst is None else [*shown, f"first frame kept with {worst:.1f} dB or more"]))


if __name__ == "__main__":
    main(sys.argv[1:])
