"""What to make: one record per video, complete and checked, from the config and the lines of a prompt file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvtrain.config import GenerateConfig
from hvtrain.errors import ConfigError, DataError, suggest
from hvtrain.models.spec import Flavor

# Options inside a line of a prompt file, as the sd-scripts family writes them: "a cat --w 640 --h 368 --d 7".
LINE_OPTIONS: dict[str, tuple[str, type]] = {
    "w": ("width", int),
    "h": ("height", int),
    "f": ("frames", int),
    "s": ("steps", int),
    "d": ("seed", int),
    "g": ("guidance", float),
    "l": ("cfg_scale", float),
    "fs": ("shift", float),
    "n": ("negative_prompt", str),
}
MAX_SIDE = 16384  # of the H.264 encoder
MAX_STEPS = 10_000
MAX_FPS = 1000
VIDEO, PICTURE = ".mp4", ".png"


@dataclass(frozen=True)
class Request:
    """One video."""

    prompt: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    seed: int
    shift: float
    guidance: float | None  # embedded; None: the flavor embeds none
    cfg_scale: float  # classifier-free; 1 is off
    negative_prompt: str

    @classmethod
    def of(
        cls,
        flavor: Flavor,
        *,
        prompt: str,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: int | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Request:
        """None is the flavor's own value. Refuses what the flavor's latents cannot hold."""
        given = {
            "width": width,
            "height": height,
            "frames": frames,
            "fps": fps,
            "steps": steps,
            "shift": shift,
            "guidance": guidance,
            "cfg_scale": cfg_scale,
            "negative_prompt": negative_prompt,
        }
        own = {name: getattr(flavor.defaults, name) for name in given}
        chosen: dict[str, Any] = {name: own[name] if value is None else value for name, value in given.items()}
        request = cls(prompt=prompt, seed=seed, **chosen)
        request.check(flavor)
        return request

    def check(self, flavor: Flavor) -> None:
        flavor.latent.check_size(width=self.width, height=self.height, frames=self.frames)
        for name in ("shift", "guidance", "cfg_scale"):
            if (number := getattr(self, name)) is not None and not math.isfinite(number):
                raise ConfigError(f"{name} is {number}, expected a finite number")
        if self.guidance is not None and flavor.defaults.guidance is None:
            raise ConfigError(f"guidance is {self.guidance:g}, but this '{flavor.name}' embeds no guidance: leave guidance null")
        for name, number in (("steps", self.steps), ("fps", self.fps), ("shift", self.shift)):
            if number <= 0:
                raise ConfigError(f"{name} is {number}, expected more than 0")
        for name, number, most in (("steps", self.steps, MAX_STEPS), ("fps", self.fps, MAX_FPS)):
            if number > most:
                raise ConfigError(f"{name} is {number}, expected at most {most}")
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{name} holds what is no text ({error.reason} at letter {error.start})") from None

    @property
    def layout(self) -> tuple:
        """Requests of one layout can be sampled together."""
        return (self.width, self.height, self.frames, self.steps, self.shift, self.guidance, self.cfg_scale)


@dataclass(frozen=True)
class Job:
    """A request and the file it becomes."""

    request: Request
    output: Path


def plan_jobs(cfg: GenerateConfig, flavor: Flavor) -> list[Job]:
    """The videos that a config asks for, in order."""
    common: dict[str, Any] = {
        "width": cfg.width,
        "height": cfg.height,
        "frames": cfg.frames,
        "fps": cfg.fps,
        "steps": cfg.steps,
        "shift": cfg.shift,
        "guidance": cfg.guidance,
        "cfg_scale": cfg.cfg_scale,
        "negative_prompt": cfg.negative_prompt,
    }
    if cfg.prompt_file is None:
        request = Request.of(flavor, prompt=cfg.prompt or "", seed=cfg.seed, **common)
        return [Job(request, _single_output(cfg, request))]
    jobs = []
    for i, (where, values) in enumerate(read_prompts(Path(cfg.prompt_file))):
        try:
            request = Request.of(flavor, **{**common, "seed": cfg.seed + i, **values})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        jobs.append(Job(request, Path(cfg.output) / f"{i:04d}{_ending(request)}"))
    return jobs


def _single_output(cfg: GenerateConfig, request: Request) -> Path:
    """The file that the config names; in a directory, one named after the prompt and all else that makes the video."""
    output = Path(cfg.output)
    if output.is_dir() or cfg.output.endswith("/"):
        words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-") or "video"
        makes = (asdict(request), asdict(cfg.model), cfg.precision, [asdict(lora) for lora in cfg.lora])
        slices = (cfg.slices, cfg.loraid, cfg.lora_multiplier)
        digest = hashlib.sha256(json.dumps([makes, slices]).encode()).hexdigest()
        return output / f"{words}-{digest[:8]}{_ending(request)}"
    if output.suffix not in (VIDEO, PICTURE):
        raise ConfigError(
            f"output is {cfg.output}, expected a name that ends with {VIDEO} (or {PICTURE} for frames=1), or a directory: "
            f"one that exists, or {cfg.output}/"
        )
    if output.suffix == PICTURE and request.frames != 1:
        raise ConfigError(f"output is {cfg.output}, one picture, but frames is {request.frames}: give frames=1, or NAME{VIDEO}")
    return output


def _ending(request: Request) -> str:
    return PICTURE if request.frames == 1 else VIDEO


def read_prompts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, values) of each prompt; empty lines and those that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file: {path} cannot be read: {error}") from None
    found = [(f"{path}:{n}", line.strip()) for n, line in enumerate(lines, start=1)]
    found = [(where, line) for where, line in found if line and not line.startswith("#")]
    if not found:
        raise DataError(f"prompt_file: {path} holds no prompt; write one on each line")
    for where, line in found:
        yield where, parse_line(line, where=where)


def parse_line(line: str, *, where: str) -> dict[str, Any]:
    prompt, *options = re.split(r"\s+--(?=\w)", line)
    values: dict[str, Any] = {"prompt": prompt}
    for option in options:
        letter, _, text = option.partition(" ")
        if letter not in LINE_OPTIONS:
            raise DataError(f"{where}: no option '--{letter}'; {suggest(letter, LINE_OPTIONS)}")
        name, kind = LINE_OPTIONS[letter]
        try:
            values[name] = kind(text.strip())
        except ValueError:
            raise DataError(f"{where}: --{letter} is '{text.strip()}', expected a number ({name})") from None
    return values


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Neighbours of one layout, at most `size` together."""
    groups: list[list[Job]] = []
    for job in jobs:
        if groups and len(groups[-1]) < size and groups[-1][0].request.layout == job.request.layout:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups
