"""`hvtrain demo --slices N`: N words, each a slice of the data that a job of its own trains, and
one merge that keeps them all.

The base model has never seen the words; only their captions tell the colour of the circle that they stand
for. The LoRAs are looked at alone, added up, and reconciled; pixels tell what is left of each word.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvtrain.errors import ConfigError
from hvtrain.tiny.clips import Drawing
from hvtrain.tiny.score import CONFIGS, read_video
from hvtrain.tiny.sheet import contact_sheet
from hvtrain.tiny.words import (
    CONCEPTS,
    OLD,
    asked,
    clips_of,
    dataset_of,
    mean,
    old_clips,
    shares,
    write_pairs,
)
from launcher.demo import emptied, hvtrain, say

DIT, SEED = "tiny:dit.safetensors", 1
CLIPS, KEEP = 36, 48  # of each word (and as many old ones); of old words, for the merger alone
COLUMNS = ("alone", "summed", "reconciled")
TRAINING = (
    "run.steps=400", f"run.seed={SEED}", "run.log_every=50", "adapter.rank=8", "adapter.alpha=8",
    "zero.engine=torch", "zero.offload_optimizer=none", "preview.every_steps=0",
)
MEAN, WORST = 0.98, 0.91  # of what a LoRA has alone: all words together; each (11 of 12 videos)
OLD_LESS = 0.05  # old words: one of 24 videos less than the base


def run(output: str, n: int) -> int:
    """Make everything below `output`, which is emptied if an earlier demo made it. 0: the
    merge keeps what it should."""
    if not 2 <= n <= len(CONCEPTS):
        raise ConfigError(f"--slices {n}: expected 2 to {len(CONCEPTS)}, there are words for so many")
    folder, words, started = emptied(output), list(CONCEPTS)[:n], time.monotonic()
    _encode(folder, words)
    sliced = folder / "run"
    say(f"3 train {n} slices as independent jobs, two at a time, and reconcile them")
    hvtrain(
        "slices", "run", f"{CONFIGS}/lora.yaml", *TRAINING, "--data", f"{folder}/parts", "--keep",
        f"{folder}/keep", "--output", str(sliced), "--at-once", "2",
    )
    runs = {word: sliced / f"{i:02d}" for i, word in enumerate(words, start=1)}
    say("4 the same LoRAs, added up")
    each = (item for path in runs.values() for item in ("--lora", str(path)))
    hvtrain(
        "merge", "--dit", DIT, *each, "--on-overlap", "sum", "--as", "lora", "--output",
        f"{folder}/summed.safetensors"
    )
    say(
        "5 generate: from each LoRA its own word, from the merges all of them and old words, from the base "
        "the old words"
    )
    every = asked(words)
    scores = {"base": _generate(folder / "base", every, "", None), "alone": {}}
    for word, path in runs.items():
        scores["alone"] |= _generate(
            folder / "alone" / word, every, word, path / f"slice-{path.name}.safetensors"
        )
    scores["summed"] = _generate(folder / "summed", every, None, folder / "summed.safetensors")
    scores["reconciled"] = _generate(
        folder / "reconciled", every, None, sliced / "merge" / "merged-lora.safetensors"
    )
    _sheet(folder, words)
    amiss = forgotten(scores["alone"], scores["reconciled"], scores["base"][OLD])
    _close(folder, scores, amiss, time.monotonic() - started)
    return 1 if amiss else 0


def _encode(folder: Path, words: Sequence[str]) -> None:
    places = [folder / "clips" / f"{i:02d}-{word}" for i, word in enumerate(words, start=1)]
    for word, place in zip(words, places):
        write_pairs(place, clips_of(word, CLIPS, seed=SEED), word)
    write_pairs(folder / "clips" / "old", old_clips(KEEP, seed=SEED), "old")
    say(
        f"1 encode {CLIPS} captioned clips of each of {', '.join(words)}, as many of old words with each, "
        f"and {KEEP} to keep"
    )
    encode = ["launch", "--nproc", "2", "encode", f"{CONFIGS}/encode.yaml"]
    hvtrain(*encode, f"dataset={dataset_of(places, folder / 'clips.toml')}", f"output={folder}/shards")
    hvtrain(
        *encode, f"dataset={dataset_of([folder / 'clips' / 'old'], folder / 'keep.toml')}",
        f"output={folder}/keep"
    )
    say("2 split the set: a slice of the data for each word")
    hvtrain("shards", "split", f"{folder}/shards", "--folder", "--output", f"{folder}/parts")


def _generate(
    folder: Path, every: Sequence[Drawing], word: str | None, lora: Path | None
) -> dict[str, float]:
    """The share of right videos of each word, or of this one alone ("": old words).
    Every column has the same noise."""
    wanted = {seed: clip for seed, clip in enumerate(every) if word is None or clip.word == word}
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text(
        "".join(f"{clip.caption} --d {seed}\n" for seed, clip in wanted.items())
    )
    hvtrain(
        "launch", "--nproc", "2", "generate", f"{CONFIGS}/generate.yaml", f"prompt_file={folder}/prompts.txt",
        f"output={folder}", *(["--lora", str(lora)] if lora else []),
    )
    return shares(list(wanted.values()), sorted(folder.glob("*.mp4")))


def forgotten(alone: Mapping[str, float], merged: Mapping[str, float], base: float) -> list[str]:
    """What the merge should keep and does not, in words. `base`: the share of old words that
    the model without LoRAs has."""
    said = []
    if mean(merged) < MEAN * mean(alone):
        said.append(
            f"the words' mean is {mean(merged):.0%}, expected {MEAN:.0%} of the {mean(alone):.0%} that they "
            "have alone"
        )
    for word in (w for w in CONCEPTS if w in alone and merged[w] < WORST * alone[w]):
        said.append(
            f"{word} is {merged[word]:.0%}, expected {WORST:.0%} of the {alone[word]:.0%} that it has alone"
        )
    if merged[OLD] < base - OLD_LESS:
        said.append(
            f"old words are {merged[OLD]:.0%}, expected no more than one video less than the base's "
            f"{base:.0%}"
        )
    return said


def _sheet(folder: Path, words: Sequence[str]) -> None:
    """Two prompts of each word."""
    videos = {name: [read_video(p) for p in sorted((folder / name).glob("*.mp4"))] for name in COLUMNS[1:]}
    alone = [read_video(p) for word in words for p in sorted((folder / "alone" / word).glob("*.mp4"))]
    prompts = [clip.caption for clip in asked(words, old=False)]
    rows = [
        (prompts[i], [alone[i], *(videos[name][i] for name in COLUMNS[1:])])
        for i in range(0, len(prompts), 6)
    ]
    contact_sheet(folder / "contact_sheet.png", rows, columns=list(COLUMNS))


def _close(
    folder: Path, scores: Mapping[str, Mapping[str, float]], amiss: Sequence[str], seconds: float
) -> None:
    print(f"\nDone in {seconds / 60:.1f} minutes. Videos that show a word's colour, by pixels:")
    print("  " + "".join(f"{title:>12}" for title in ("", *COLUMNS)))
    for word in scores["alone"]:
        print(f"  {word:>12}" + "".join(f"{scores[name][word]:12.0%}" for name in COLUMNS))
    print(f"  {'mean':>12}" + "".join(f"{mean(scores[name]):12.0%}" for name in COLUMNS))
    print(
        f"  {OLD:>12}{'':>12}{scores['summed'][OLD]:12.0%}{scores['reconciled'][OLD]:12.0%}   (base "
        f"{scores['base'][OLD]:.0%})"
    )
    for line in amiss or ("The merge keeps what each slice learnt.",):
        print(f"NOT KEPT: {line}" if amiss else line)
    print(
        f"Contact sheet: {folder}/contact_sheet.png ({' | '.join(COLUMNS)})\n"
        f"Report:        {folder}/run/merge/merged-lora-merge.html\n"
        f"LoRA:          {folder}/run/merge/merged-lora.safetensors\n"
        f"TensorBoard:   tensorboard --logdir {folder}"
    )
