"""`hvtrain demo`: the whole road on the tiny model, through the same commands that a user types.

The base model has never seen a "zorb" (an orange ring). From clips of it, a LoRA is trained on two ranks,
then merged; pixels tell whether the videos show it. Where the model also makes videos of images, it is given
some, and pixels tell whether it keeps them and moves what they show.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvtrain.config import GenerateConfig, asset, load
from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.tiny.clips import BACKGROUNDS, CONCEPT, MOTIONS, concept_clips
from hvtrain.tiny.data import ClipsRecipe, write_clips
from hvtrain.tiny.score import CONFIGS, draw_first, kept, look, read_video
from hvtrain.tiny.sheet import contact_sheet
from launcher.program import HVTRAIN

N_PROMPTS = len(MOTIONS) * len(BACKGROUNDS)
MARKER = ".hvtrain-demo"
# config of a model that makes videos of images; where they go
PICTURED, PICTURES = "generate_image.yaml", "from_pictures"


def run(output: str, model: str | None = None) -> int:
    """Make everything below `output`, which is emptied if an earlier demo made it. `model`: whose
    tiny copy, else the default."""
    configs, n_clips = _given(model)
    folder = emptied(output)
    started = time.monotonic()
    prompts = [f"a {CONCEPT} moves {m} on a {b} background" for m in MOTIONS for b in BACKGROUNDS]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    merged = _road(folder, configs, n_clips)
    pictured = _from_pictures(folder, configs, merged) if (configs / PICTURED).exists() else None
    say("look at the pixels")
    scores = {name: score(folder / name) for name in ("before", "after", "merged")}
    _sheet(folder, prompts, ["before", "after", "merged", *([PICTURES] if pictured else [])])
    _close(folder, scores, pictured, time.monotonic() - started)
    good = scores["before"] <= 0.2 and scores["after"] >= 0.8 and scores["merged"] >= 0.8
    return 0 if good and (pictured is None or (pictured[0] >= 22 and pictured[1] >= 0.8)) else 1


def emptied(output: str) -> Path:
    """The folder of a demo, which holds nothing but a sign that it is one."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file; give a directory")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"--output: {folder} holds files that no demo wrote; choose another directory")
    if not CONFIGS.is_dir():
        raise ConfigError(
            f"{CONFIGS} is missing: the demo runs from a checkout of the repository (`make demo`)"
        )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--output: {folder} cannot be made ({error.strerror}); choose another directory"
        ) from None
    (folder / MARKER).touch()
    return folder


def _given(model: str | None) -> tuple[Path, int]:
    """Where a model's configs lie, and how many clips its LoRA learns from."""
    from hvtrain.tiny.parts import DEFAULT, embedded_parts  # torch

    tiny = embedded_parts(model or DEFAULT, key="--model")
    return CONFIGS / tiny.folder, tiny.n_clips


def _road(folder: Path, configs: Path, n_clips: int) -> list[str]:
    """From clips to a merged model, whose keys it returns."""
    dataset = write_clips(ClipsRecipe(output=str(folder / "clips"), n=n_clips, concept=True, seed=1))
    shards, loras, prompts = folder / "shards", folder / "lora", folder / "prompts.txt"
    generate = ["generate", f"{configs}/generate.yaml", f"prompt_file={prompts}"]
    say(f"1 encode {n_clips} captioned clips of a '{CONCEPT}' on 2 ranks")
    hvtrain(
        "launch", "--nproc", "2", "encode", f"{configs}/encode.yaml", f"dataset={dataset}", f"output={shards}"
    )
    say("2 before: the base model, which does not know the word")
    hvtrain(*generate, f"output={folder / 'before'}")
    say("3 train a LoRA on 2 ranks: data parallel 2, ZeRO-2, optimizer offloaded to the CPU")
    train = ["launch", "--nproc", "2", "train", f"{configs}/lora.yaml", f"data.shards={shards}"]
    hvtrain(*train, f"run.output_dir={loras}")
    say("4 a short run with sequence parallelism: Ulysses 2")
    hvtrain(
        *train, f"run.output_dir={folder / 'lora_ulysses'}", "parallel.ulysses=2", "run.steps=10",
        "optim.warmup_steps=0", "preview.every_steps=0",
    )
    made = _loras(loras, configs)
    say("5 after: the base model with the LoRA")
    hvtrain(
        *generate, f"output={folder / 'after'}",
        f"lora=[{', '.join(f'{{path: {lora}}}' for lora, _ in made.values())}]"
    )
    say("6 merge the LoRA into the model")
    merged = {part: folder / f"{lora.name.replace(CONCEPT, 'merged')}" for part, (lora, _) in made.items()}
    for part, (lora, base) in made.items():
        hvtrain("merge", "--dit", base, "--lora", str(lora), "--output", str(merged[part]))
    say("7 generate from the merged model")
    keys = [f"model.{part}={path}" for part, path in merged.items()]
    hvtrain(*generate, f"output={folder / 'merged'}", *keys)
    return keys


def _from_pictures(folder: Path, configs: Path, merged: Sequence[str]) -> tuple[float, float]:
    """(PSNR in dB of the worst first frame against the picture that was given, share of the
    videos that then move as told)"""
    say("8 generate from the merged model and a picture each")
    wanted, made = concept_clips(N_PROMPTS, seed=2), folder.resolve() / PICTURES
    made.mkdir()
    pictures = draw_first(wanted, made)
    lines = (f"{clip.caption} --i {picture}\n" for clip, picture in zip(wanted, pictures))
    (made / "prompts.txt").write_text("".join(lines))
    hvtrain("generate", f"{configs}/{PICTURED}", f"prompt_file={made}/prompts.txt", f"output={made}", *merged)
    videos = sorted(made.glob("*.mp4"))
    moved = [look(read_video(video)).motion == clip.motion for video, clip in zip(videos, wanted)]
    return min(map(kept, videos, pictures)), sum(moved) / len(moved)


def _loras(folder: Path, configs: Path) -> Mapping[str, tuple[Path, str]]:
    """Part of the model -> the LoRA that was trained for it, and the part's file:
    one, or one for each expert."""
    from hvtrain.models import find  # torch

    model = load(GenerateConfig, configs / "generate.yaml").model
    experts = find(model.name).flavor(model.flavor).experts
    names = {expert.part: f"{CONCEPT}-{expert.name}" for expert in experts} or {"dit": CONCEPT}
    return {
        part: (folder / f"{name}.safetensors", asset(model.file(part) or "")) for part, name in names.items()
    }


def score(folder: Path) -> float:
    """Share of a folder's videos that show the concept."""
    seen = [look(read_video(path)).is_concept for path in sorted(folder.glob("*.mp4"))]
    return sum(seen) / len(seen)


def _sheet(folder: Path, prompts: list[str], names: list[str]) -> None:
    videos = {name: [read_video(p) for p in sorted((folder / name).glob("*.mp4"))] for name in names}
    rows = [(prompt, [videos[name][i] for name in names]) for i, prompt in enumerate(prompts)]
    contact_sheet(folder / "contact_sheet.png", rows[::2], columns=names)


def hvtrain(*arguments: str) -> None:
    print(f"$ hvtrain {shlex.join(arguments)}", flush=True)
    if code := subprocess.run([*HVTRAIN, *arguments]).returncode:
        raise HvtrainError(f"the demo stopped: 'hvtrain {arguments[0]}' ended with exit code {code}")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _close(
    folder: Path, scores: dict[str, float], pictured: tuple[float, float] | None, seconds: float
) -> None:
    wanted = {"before": "<= 20 %", "after": ">= 80 %", "merged": ">= 80 %"}
    print(f"\nDone in {seconds / 60:.1f} minutes. Videos that show the concept (orange, hollow), by pixels:")
    for name, value in scores.items():
        print(f"  {name:8}{value:6.0%}   (expected {wanted[name]})")
    if pictured:
        print(
            f"From pictures: the first frame is kept with {pictured[0]:.1f} dB or more (expected >= 22), "
            f"{pictured[1]:.0%} move as told (expected >= 80 %)"
        )
    loras = [
        str(path) for path in sorted((folder / "lora").glob("*.safetensors")) if "-step" not in path.name
    ]
    print(
        f"Videos:        {folder}/before, {folder}/after, {folder}/merged\n"
        f"Contact sheet: {folder}/contact_sheet.png (before | after | merged)\n"
        f"LoRA:          {', '.join(loras)}\n"
        f"TensorBoard:   tensorboard --logdir {folder}"
    )
