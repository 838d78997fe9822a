"""What README.md and docs/ show works: every command of a shell block runs, at tiny size and in its order;
every command, option, key and file that the prose names exists.

A command may be written for eight GPUs and 13B parameters: `tiny` says what stands in for what. Not run are
the lines of NOT_RUN, each with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from hvtrain import config
from hvtrain.config import parts
from hvtrain.encode.dataset import read_dataset_file
from hvtrain.models import find
from hvtrain.tiny.data import ClipsRecipe, write_clips
from launcher import cli
from launcher.program import HVTRAIN
from launcher.site import load_site
from launcher.table import COMMANDS, GROUPS
from shards import open_set

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]
WITH_CONFIG = {
    "encode": "encode", "train": "train", "generate": "generate", "fit": "train", "slices run": "train"
}

NOT_RUN = {
    r"make (demo|test|env)\b": "this very suite, and the demo's minutes",
    r"(python -m venv|pip|\.) ": "installs",
    r"tensorboard ": "serves until it is stopped",
    r"hvtrain shards import-musubi ": "needs caches of another program; tests/encode makes them",
}

# What a page writes for a user's own files, and the tiny file that stands for it.
# {n}: new with every command.
NAMES = {
    "docs/shards.md": {
        "SET": "data/shards", "A": "parts/01", "B": "parts/02", "AB": "merged-{n}", "PARTS": "split-{n}",
        "export DIR": "exported-{n}", "index DIR": "tars", "--keep 64": "1",
    },
    "docs/slurm.md": {
        "data.shards=/data/shards": "data.shards=data/shards",
        "run.output_dir=/data/runs/a": "run.output_dir=runs/b",
    },
    "docs/loraid.md": {
        "FILE": "a.safetensors", "OUT": "out-{n}.safetensors", "TUNED": "tuned.safetensors",
        "BASE": "model.safetensors", "A": "a.safetensors", "B": "b.safetensors",
        "runs/a/lora-step00000100.safetensors": "runs/a/my_lora-step00000001.safetensors", "runs/b": "runs/a",
        "data/general": "data/shards", "--device cuda": "cpu", "--plan ...": "plan/plan.json",
        "--slices ...": "runs/sliced", "[--rank": "--rank", "64]": "4", "64": "4", "1 3": "2",
    },
}
VALUES = {"--nproc": "2", "--gpus": "2", "--size": "64x64x9", "--n": "2", "parallel.ulysses": "2"}
MERGE = ["reconcile.steps=2", "reconcile.states=4", "reconcile.held_out=1", "reconcile.allow_lost=true"]
ADDED = {
    "encode": ["samples_per_tar=2"],
    "train": [
        "run.steps=2", "run.save_every_steps=1", "run.name=my_lora", "optim.warmup_steps=0",
        "preview.every_steps=0", "data.batch_size=1"
    ],
    "generate": ["steps=1"],
    "slices run": [
        "run.steps=1", "optim.warmup_steps=0", "preview.every_steps=0", "data.batch_size=1",
        "zero.engine=torch", "zero.offload_optimizer=none", *MERGE
    ],
    "merge": MERGE,
    "doctor": ["--nproc", "1"],
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def split_page(page: Path) -> tuple[list[tuple[str, str]], str]:
    """The fenced blocks with their languages, and the prose around them."""
    parts = re.split(r"^```(\w*)\n(.*?)^```\n", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return list(zip(parts[1::3], parts[2::3])), "".join(parts[0::3])


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block: continued lines joined, comments gone, `a && b` as two."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def shown(page: Path) -> list[list[str]]:
    return [
        words for language, text in split_page(page)[0] if language == "sh" for words in commands_of(text)
    ]


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """("shards info", its arguments) of `hvtrain shards info ...`."""
    assert words[0] == "hvtrain", words
    n = 2 if words[1] in GROUPS else 1
    return " ".join(words[1 : 1 + n]), words[1 + n :]


# --- at tiny size -------------------------------------------------------------------------------------------


def tiny(words: list[str], page: Path, n: int) -> list[str]:
    """The arguments of the same command for the models that ship, two processes and this machine."""
    command, rest = command_of(words)
    if command == "launch":
        at = next(i for i, word in enumerate(rest) if word in COMMANDS)
        own = [*small(rest[:at], command, page, n), *(["--dry-run"] if "--slurm" in rest else [])]
        return ["launch", *own, *tiny(["hvtrain", *rest[at:]], page, n)]
    rest = small(rest, command, page, n)
    if command == "slices run" and "slurm" in rest:
        rest = [word for word in rest if word not in ("--site", "site.yaml")] + ["--dry-run"]
    if rest[:1] == ["..."]:
        rest[:1] = [str(TINY / f"{command}.yaml"), "prompt=a red circle", f"output=video-{n}.mp4"]
    return [*command.split(), *rest, *ADDED.get(command, [])]


def small(words: list[str], command: str, page: Path, n: int) -> list[str]:
    names, done = NAMES.get(name_of(page), {}), []
    for before, word in zip(["", *words], words):
        key = word.partition("=")[0]
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{name_of(page)}: {word} does not exist"
            word = str(TINY / Path(word).name)
        elif before in VALUES:
            word = VALUES[before]
        elif key in VALUES and "=" in word:
            word = f"{key}={VALUES[key]}"
        for known in (f"{before} {word}", f"{command.split()[-1]} {word}", word):
            if known in names:
                word = names[known].format(n=n)
                break
        done.append(word)
    return done


def run(arguments: list[str]) -> None:
    """In this process where that is possible: loading torch takes longer than most of these commands."""
    if arguments[0] in ("launch", "doctor") or arguments[:2] == ["slices", "run"]:
        done = subprocess.run(
            [*HVTRAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
        )
        assert done.returncode == 0, f"hvtrain {shlex.join(arguments)}\n{done.stdout}"
    else:
        here = Path.cwd()  # which a command of a sliced run leaves for where that run was begun
        assert cli.main(arguments) == 0, f"hvtrain {shlex.join(arguments)}"
        os.chdir(here)


def walk(page: Path) -> list[str]:
    """Run what the page shows, here; the commands that were run."""
    ran = []
    for n, words in enumerate(shown(page)):
        if any(re.match(pattern, shlex.join(words)) for pattern in NOT_RUN):
            continue
        if "..." in words and words[1] == "launch":
            continue  # `hvtrain launch --slurm --dry-run ...`: looked at by the test of the prose
        arguments = tiny(words, page, n)
        run(arguments)
        ran.append(" ".join(arguments[:2]))
    return ran


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """README's commands, run in a directory that holds nothing but the clips and the
    model that they start from."""
    here = tmp_path_factory.mktemp("road")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        write_clips(ClipsRecipe(output="clips", n=6, seed=1))
        entry = '[[datasets]]\nvideo_directory = "clips"\ntarget_frames = [9]\n'
        Path("clips.toml").write_text("[general]\nresolution = [64, 64]\n" + entry)
        Path("model.safetensors").symlink_to(config.asset("tiny:dit.safetensors"))
        ran = walk(ROOT / "README.md")
        assert len(ran) >= 10, ran
        # README submits its slices to Slurm; the pages after it ask for their results.
        run(
            [
                "slices", "run", str(TINY / "lora.yaml"), "--plan", "plan/plan.json", "--data", "parts",
                "--output", "runs/sliced", *ADDED["slices run"]
            ]
        )
        yield here


def test_the_readmes_road_leaves_what_it_promises(road: Path) -> None:
    for made in (
        "preview.html", "data/shards/manifest.json", "runs/a/my_lora.safetensors", "runs/a/tensorboard",
        "cat.mp4", "merged.safetensors", "plan/plan.png", "parts/02/manifest.json",
        "runs/sliced/merge/merged-lora.safetensors"
    ):
        assert (road / made).exists(), made


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if shown(page)], ids=name_of)
def test_the_commands_of_a_page_run(
    page: Path, road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ["clips", "clips.toml", "model.safetensors", "data", "runs"]
    if page.stem == "shards":
        made.append("parts")
        # named in order, as webdataset names them
        for i, chunk in enumerate(open_set(road / "data/shards").manifest.chunks):
            for column, tar in chunk.tars.items():
                Path("tars", column).mkdir(parents=True, exist_ok=True)
                shutil.copy(road / "data/shards" / tar.path, f"tars/{column}/{i:06d}.tar")
    for name in made:
        Path(name).symlink_to(road / name)
    for name, file in {"a": "runs/a/my_lora-step00000001", "b": "runs/a/my_lora", "tuned": "merged"}.items():
        Path(f"{name}.safetensors").symlink_to(road / f"{file}.safetensors")
    walk(page)


def test_the_example_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("clips", "poses", "images"):
        (tmp_path / folder).mkdir()
    (_, text), = (block for block in split_page(ROOT / "docs/encode.md")[0] if block[0] == "toml")
    file = tmp_path / "dataset.toml"
    file.write_text(text)
    (entry,) = read_dataset_file(file, find("hunyuan-video").flavor("t2v"))
    assert (entry.source, entry.source_fps, entry.caption_dropout) == ("video_directory", 30, 0.1)
    (_, text), = (block for block in split_page(ROOT / "docs/slurm.md")[0] if block[0] == "yaml")
    site = tmp_path / "site.yaml"
    site.write_text(text)
    assert load_site(str(site)).cpus_per_process == 12


# --- what the prose names -----------------------------------------------------------------------------------


@cache
def options_of(command: str) -> frozenset[str]:
    parser = argparse.ArgumentParser()
    COMMANDS[command].options(parser)
    return frozenset(parser._option_string_actions)


def keys_of(root: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], f"{prefix}{field.name}.")
    if hasattr(root, "REST"):
        yield from (prefix + part for folder in parts.folders() for path in folder.glob(f"*/{parts.FILE}")
                    for part in parts.parts_of(yaml.safe_load(path.read_text())["name"]))  # fmt: skip


KEYS = {name: frozenset(keys_of(root)) for name, root in config.ROOTS.items()}
SECTIONS = {key.partition(".")[0] for keys in KEYS.values() for key in keys if "." in key}


def mistakes(words: list[str]) -> Iterator[str]:
    """What of a command as it is written does not exist. Placeholders (FILE, N, ...)
    and brackets are passed over."""
    words = [word for word in (word.strip("[]|") for word in words) if word not in ("", "...")]
    if words[1:] and words[1].startswith("--"):
        return  # hvtrain --help
    if words[1] in GROUPS and len(words) == 2:
        return
    command, rest = command_of(words)
    if command not in COMMANDS:
        yield f"no command {command}"
        return
    if command == "launch":
        at = next((i for i, word in enumerate(rest) if word in COMMANDS), len(rest))
        rest, inner = rest[:at], rest[at:]
        yield from mistakes(["hvtrain", *inner]) if inner else ()
    asked = next((kind for kind in ("generate", "merge") if command == "fit" and f"--{kind}" in rest), None)
    root = asked or WITH_CONFIG.get(command)
    for word in rest:
        key, sign, _ = word.partition("=")
        if word.startswith("--") and key not in options_of(command):
            yield f"hvtrain {command} has no option {word}"
        elif (
            sign and root and re.fullmatch(r"[a-z_.]+", key)
            and key not in ("key", "section.key", *KEYS[root])
        ):
            yield f"hvtrain {command} has no key {key}"
        elif word.startswith("configs/") and not (ROOT / word).is_file():
            yield f"no file {word}"


def mistakes_of_others(words: list[str]) -> Iterator[str]:
    """`python -m MODULE`, `make TARGET`, and a launcher of others before hvtrain."""
    if words[:2] == ["python", "-m"] and words[2] != "venv" and importlib.util.find_spec(words[2]) is None:
        yield f"no module {words[2]}"
    if words[0] == "make" and not re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M):
        yield f"no target {words[1]}"
    if words[0] == "torchrun":
        yield from mistakes(words[words.index("hvtrain") :])
    for word in words:
        if word.startswith("configs/") and not (ROOT / word).is_file():
            yield f"no file {word}"


def written(text: str) -> Iterator[list[str]]:
    for code in re.findall(r"`([^`]+)`", text):
        words = (
            shlex.split(code.replace("\n", " "))
            if code.count('"') % 2 == 0 and code.count("'") % 2 == 0 else code.split()
        )
        if words and words[0] in ("hvtrain", "python", "make", "torchrun") and len(words) > 1:
            yield words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_options_keys_and_files_that_a_page_names_exist(page: Path) -> None:
    prose = split_page(page)[1]
    wrong = []
    for words in [*written(prose), *shown(page)]:
        wrong += list(mistakes(words) if words[0] == "hvtrain" else mistakes_of_others(words))
    for code in re.findall(r"`([^`\n]+)`", prose):
        key = re.match(r"[a-z_]+\.(?!yaml|py)[a-z_.]+(?=$|[=: ])", code)
        if key and key[0].partition(".")[0] in SECTIONS and not any(key[0] in keys for keys in KEYS.values()):
            wrong.append(f"no key {key[0]}")
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in link and not (page.parent / link).exists():
            wrong.append(f"no file {link}")
    assert not wrong, f"{name_of(page)}: " + "; ".join(wrong)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_commands_in_a_configs_comments_exist(path: Path) -> None:
    wrong = []
    for line in re.findall(r"^#.*?((?:hvtrain|python -m) .*)$", path.read_text(), flags=re.M):
        words = shlex.split(re.sub(r"\s+\(about.*|`.*", "", line))
        wrong += list(mistakes(words) if words[0] == "hvtrain" else mistakes_of_others(words))
    assert not wrong, wrong


def test_what_is_not_run_is_there() -> None:
    """A reason whose command is gone goes, too."""
    lines = [shlex.join(words) for page in PAGES for words in shown(page)]
    assert [pattern for pattern in NOT_RUN if not any(re.match(pattern, line) for line in lines)] == []
