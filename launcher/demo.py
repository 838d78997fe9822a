"""`hvtrain demo`: the whole road on the tiny model, through the same commands that a user types.

The base model has never seen a "zorb" (an orange ring). From 48 clips of it, a LoRA is trained on two ranks, then
merged; pixels tell whether the videos show it.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from pathlib import Path

from hvtrain.errors import ConfigError, HvtrainError
from hvtrain.tiny.clips import BACKGROUNDS, CONCEPT, MOTIONS
from hvtrain.tiny.data import ClipsRecipe, write_clips
from hvtrain.tiny.score import CONFIGS, look, read_video
from hvtrain.tiny.sheet import contact_sheet
from launcher.program import HVTRAIN

N_CLIPS = 48
MARKER = ".hvtrain-demo"


def run(output: str) -> int:
    """Make everything below `output`, which is emptied if an earlier demo made it."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output: {folder} is a file; give a directory")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"--output: {folder} holds files that no demo wrote; choose another directory")
    if not CONFIGS.is_dir():
        raise ConfigError(f"{CONFIGS} is missing: the demo runs from a checkout of the repository (`make demo`)")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be made ({error.strerror}); choose another directory") from None
    (folder / MARKER).touch()
    started = time.monotonic()
    prompts = [f"a {CONCEPT} moves {m} on a {b} background" for m in MOTIONS for b in BACKGROUNDS]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    _road(folder)
    scores = {name: score(folder / name) for name in ("before", "after", "merged")}
    _sheet(folder, prompts)
    _close(folder, scores, time.monotonic() - started)
    good = scores["before"] <= 0.2 and scores["after"] >= 0.8 and scores["merged"] >= 0.8
    return 0 if good else 1


def _road(folder: Path) -> None:
    dataset = write_clips(ClipsRecipe(output=str(folder / "clips"), n=N_CLIPS, concept=True, seed=1))
    shards, lora = folder / "shards", folder / "lora" / "zorb.safetensors"
    merged, prompts = folder / "merged.safetensors", folder / "prompts.txt"
    generate = ["generate", f"{CONFIGS}/generate.yaml", f"prompt_file={prompts}"]
    _say(f"1/8 encode {N_CLIPS} captioned clips of a '{CONCEPT}' on 2 ranks")
    _hvtrain("launch", "--nproc", "2", "encode", f"{CONFIGS}/encode.yaml", f"dataset={dataset}", f"output={shards}")
    _say("2/8 before: the base model, which does not know the word")
    _hvtrain(*generate, f"output={folder / 'before'}")
    _say("3/8 train a LoRA on 2 ranks: data parallel 2, ZeRO-2, optimizer offloaded to the CPU")
    train = ["launch", "--nproc", "2", "train", f"{CONFIGS}/lora.yaml", f"data.shards={shards}"]
    _hvtrain(*train, f"run.output_dir={lora.parent}")
    _say("4/8 a short run with sequence parallelism: Ulysses 2")
    _hvtrain(
        *train, f"run.output_dir={folder / 'lora_ulysses'}", "parallel.ulysses=2", "run.steps=10", "optim.warmup_steps=0",
        "preview.every_steps=0",
    )
    _say("5/8 after: the base model with the LoRA")
    _hvtrain(*generate, f"output={folder / 'after'}", f"lora=[{{path: {lora}}}]")
    _say("6/8 merge the LoRA into the model")
    _hvtrain("merge", "--dit", asset_dit(), "--lora", str(lora), "--output", str(merged))
    _say("7/8 generate from the merged model")
    _hvtrain(*generate, f"output={folder / 'merged'}", f"model.dit={merged}")
    _say("8/8 look at the pixels")


def asset_dit() -> str:
    from hvtrain.config import asset

    return asset("tiny:dit.safetensors")


def score(folder: Path) -> float:
    """Share of a folder's videos that show the concept."""
    seen = [look(read_video(path)).is_concept for path in sorted(folder.glob("*.mp4"))]
    return sum(seen) / len(seen)


def _sheet(folder: Path, prompts: list[str]) -> None:
    names = ["before", "after", "merged"]
    videos = {name: [read_video(p) for p in sorted((folder / name).glob("*.mp4"))] for name in names}
    rows = [(prompt, [videos[name][i] for name in names]) for i, prompt in enumerate(prompts)]
    contact_sheet(folder / "contact_sheet.png", rows[::2], columns=names)


def _hvtrain(*arguments: str) -> None:
    print(f"$ hvtrain {shlex.join(arguments)}", flush=True)
    if code := subprocess.run([*HVTRAIN, *arguments]).returncode:
        raise HvtrainError(f"the demo stopped: 'hvtrain {arguments[0]}' ended with exit code {code}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _close(folder: Path, scores: dict[str, float], seconds: float) -> None:
    wanted = {"before": "<= 20 %", "after": ">= 80 %", "merged": ">= 80 %"}
    print(f"\nDone in {seconds / 60:.1f} minutes. Videos that show the concept (orange, hollow), by pixels:")
    for name, value in scores.items():
        print(f"  {name:8}{value:6.0%}   (expected {wanted[name]})")
    print(
        f"Videos:        {folder}/before, {folder}/after, {folder}/merged\n"
        f"Contact sheet: {folder}/contact_sheet.png (before | after | merged)\n"
        f"LoRA:          {folder}/lora/zorb.safetensors\n"
        f"TensorBoard:   tensorboard --logdir {folder}"
    )
