"""What to make: one record per video, complete and checked, from the config and the lines of a prompt file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvtrain.config import GenerateConfig
from hvtrain.errors import ConfigError, DataError, suggest
from hvtrain.models.base import Flavor

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
    guidance: float  # embedded
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
        latent = flavor.latent
        for name, value, unit in (
            ("width", self.width, latent.stride_w * latent.patch[2]),
            ("height", self.height, latent.stride_h * latent.patch[1]),
        ):
            if value <= 0 or value % unit:
                near = max(unit, round(value / unit) * unit)
                raise ConfigError(f"{name} is {value}, expected a multiple of {unit}, for example {near}")
        n = latent.stride_t
        if self.frames < 1 or (self.frames - 1) % n:
            near = max(self.frames - 1, 0) // n * n + 1
            raise ConfigError(f"frames is {self.frames}, expected {n}n + 1, for example {near} or {near + n}")
        for name, number in (("steps", self.steps), ("fps", self.fps), ("shift", self.shift)):
            if number <= 0:
                raise ConfigError(f"{name} is {number}, expected more than 0")

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
        output = Path(cfg.output)
        if output.suffix != ".mp4":
            raise ConfigError(f"output is {cfg.output}, expected a name that ends with .mp4")
        return [Job(Request.of(flavor, prompt=cfg.prompt or "", seed=cfg.seed, **common), output)]
    jobs = []
    for i, (where, values) in enumerate(read_prompts(Path(cfg.prompt_file))):
        try:
            request = Request.of(flavor, **{**common, "seed": cfg.seed + i, **values})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        jobs.append(Job(request, Path(cfg.output) / f"{i:04d}.mp4"))
    return jobs


def read_prompts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, values) of each prompt; empty lines and those that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
