"""What to make: one record per video, complete and checked, from the config and
the lines of a prompt file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hvtrain.config import SamplePrompt, build
from hvtrain.config.load import parse_yaml
from hvtrain.config.sampling import Sampling, check_limits, given, line_options
from hvtrain.errors import ConfigError, DataError, suggest
from hvtrain.flow.solvers import SOLVERS
from hvtrain.models.spec import Expert, Flavor

VIDEO, PICTURE = ".mp4", ".png"


@dataclass(frozen=True)
class Request(Sampling):
    """One video: nothing of it is left open but an image, and the guidance of a flavor that embeds none."""

    prompt: str = ""

    @classmethod
    def of(cls, flavor: Flavor, *, prompt: str = "", **given: Any) -> Request:
        """None is the flavor's own value. Refuses what the flavor's latents cannot
        hold, and what it does not take."""
        chosen = {name: value for name, value in given.items() if value is not None}
        own = {f.name: getattr(flavor.defaults, f.name) for f in fields(Sampling)}
        request = cls(prompt=prompt, **own | chosen)
        request.check(flavor)
        request = replace(request, expert_cfg_scale=_expert_scales(flavor, chosen))
        if flavor.unguided and request.guided:
            raise ConfigError(
                f"cfg_scale is {request.cfg_scale:g}, but '{flavor.name}' is distilled to be sampled without "
                "it: leave it out"
            )
        return request

    def check(self, flavor: Flavor) -> None:
        flavor.latent.check_size(width=self.width, height=self.height, frames=self.frames)
        check_limits(self)
        SOLVERS.find(self.solver, key="solver")
        if self.guidance is not None and flavor.defaults.guidance is None:
            raise ConfigError(
                f"guidance is {self.guidance:g}, but this '{flavor.name}' embeds no guidance: leave guidance "
                "null"
            )
        if self.video is not None and not flavor.enlarges:
            raise ConfigError(
                f"video is {self.video}, but '{flavor.name}' enlarges none: leave it out, or take a flavor "
                "of super-resolution (`hvtrain models`)"
            )
        for name, path in self.images.items():
            if name not in _images_of(flavor):
                raise ConfigError(
                    f"{name} is {path}, but '{flavor.name}' takes none: leave it out, or take a flavor of "
                    "image to video (`hvtrain models`)"
                )
        for name in ("prompt", "negative_prompt"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{name} holds what is no text ({error.reason} at letter {error.start})"
                ) from None

    @property
    def images(self) -> dict[str, str]:
        """key -> path of those that are given."""
        return {
            name: path for name,
            path in (("image", self.image), ("end_image", self.end_image)) if path is not None
        }

    @property
    def files(self) -> dict[str, str]:
        """key -> path of all that it is made from."""
        return self.images if self.video is None else {**self.images, "video": self.video}

    @property
    def layout(self) -> tuple:
        """Requests of one layout can be sampled together: they have the same conditions, too."""
        return (*(getattr(self, f.name) for f in fields(Sampling) if f.metadata["alike"]), *self.files)

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is looked at."""
        return any(scale != 1 for scale in self.expert_cfg_scale.values() or [self.cfg_scale])

    def scale(self, expert: Expert | None) -> float:
        """Of classifier-free guidance."""
        return self.cfg_scale if expert is None else self.expert_cfg_scale[expert.name]

    @property
    def values(self) -> dict[str, Any]:
        """What is given or chosen, as plain values."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def _expert_scales(flavor: Flavor, given: Mapping[str, Any]) -> dict[str, float]:
    """Name by name; what is given for all experts comes before what each of them would have."""
    wanted = given.get("expert_cfg_scale", {})
    names = [expert.name for expert in flavor.experts]
    for name in wanted:
        if name not in names:
            hint = suggest(name, names) if names else "it has one model for all noise levels: give cfg_scale"
            raise ConfigError(f"expert_cfg_scale: '{flavor.name}' has no expert '{name}'; {hint}")
    common = given.get("cfg_scale")
    own = {e.name: flavor.defaults.cfg_scale if e.cfg_scale is None else e.cfg_scale for e in flavor.experts}
    return {name: wanted.get(name, own[name] if common is None else common) for name in names}


@dataclass(frozen=True)
class Job:
    """A request and the file it becomes."""

    request: Request
    output: Path


def _images_of(flavor: Flavor) -> tuple[str, ...]:
    """The keys of the images that it is conditioned on."""
    return ("image", "end_image")[: len(flavor.given)] if flavor.beyond_text else ()


def lacks(request: Request, flavor: Flavor) -> list[str]:
    """Images, or the video, without which it cannot be made."""
    needed = [
        *(() if flavor.image_optional else _images_of(flavor)), *(("video",) if flavor.enlarges else ())
    ]
    return [name for name in needed if name not in request.files]


def single_job(
    flavor: Flavor, given: Mapping[str, Any], *, prompt: str, output: str, also: object = None
) -> Job:
    """One video. In a directory its file is named after the prompt and all else that makes it:
    `also` is what is not in it."""
    request = _complete(flavor, **given, prompt=prompt)
    return Job(request, _single_output(output, request, also))


def prompt_jobs(flavor: Flavor, given: Mapping[str, Any], *, prompt_file: str, output: str) -> list[Job]:
    """One for each line, in order."""
    jobs = []
    for i, (where, values) in enumerate(read_prompts(Path(prompt_file))):
        try:
            request = _complete(flavor, **{**given, "seed": given.get("seed", 0) + i, **values})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        jobs.append(Job(request, Path(output) / f"{i:04d}{ending(request)}"))
    return jobs


def _complete(flavor: Flavor, **given: Any) -> Request:
    request = Request.of(flavor, **given)
    for name in lacks(request, flavor):
        letter = next(letter for letter, (key, _) in line_options().items() if key == name)
        what = "enlarges a video" if name == "video" else "is told by an image"
        raise ConfigError(
            f"{name}: '{flavor.name}' {what}; give {name}=FILE, or --{letter} FILE in a line of a prompt file"
        )
    for name, path in request.files.items():
        if not Path(path).exists():
            raise ConfigError(f"{name}: {path} does not exist")
    return request


def _single_output(where: str, request: Request, also: object) -> Path:
    """The file that is named; in a directory, one named after what makes the video."""
    output = Path(where)
    if output.is_dir() or where.endswith("/"):
        words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-") or "video"
        digest = hashlib.sha256(json.dumps([asdict(request), also]).encode()).hexdigest()
        return output / f"{words}-{digest[:8]}{ending(request)}"
    if output.suffix not in (VIDEO, PICTURE):
        raise ConfigError(
            f"output is {where}, expected a name that ends with {VIDEO} (or {PICTURE} for frames=1), or a "
            f"directory: one that exists, or {where}/"
        )
    if output.suffix == PICTURE and request.frames != 1:
        raise ConfigError(
            f"output is {where}, one picture, but frames is {request.frames}: give frames=1, or NAME{VIDEO}"
        )
    return output


def ending(request: Request) -> str:
    return PICTURE if request.frames == 1 else VIDEO


def read_prompts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values) of each prompt: of text one a line, where empty lines and those that begin with # are
    comments; of YAML and JSON a list with the keys of a prompt."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file: {path} cannot be read: {error}") from None
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        yield from _listed(path, text)
        return
    lines = text.splitlines()
    found = [(f"{path}:{n}", line.strip()) for n, line in enumerate(lines, start=1)]
    found = [(where, line) for where, line in found if line and not line.startswith("#")]
    if not found:
        raise DataError(f"prompt_file: {path} holds no prompt; write one on each line")
    for where, line in found:
        yield where, parse_line(line, where=where)


def _listed(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise DataError(f"prompt_file: {path}: not YAML: {error}") from None
    if not isinstance(raw, list) or not raw:
        raise DataError(
            f"prompt_file: {path}: expected a list of prompts, as in `- {{prompt: a cat, seed: 7}}`"
        )
    for n, item in enumerate(raw, start=1):
        where = f"{path}, prompt {n}"
        one = build(SamplePrompt, item if isinstance(item, Mapping) else {"prompt": item}, where=where)
        yield where, {"prompt": one.prompt, **given(one)}


def parse_line(line: str, *, where: str) -> dict[str, Any]:
    legal = line_options()
    prompt, *options = re.split(r"\s+--(?=\w)", line)
    values: dict[str, Any] = {"prompt": prompt}
    for option in options:
        letter, _, text = option.partition(" ")
        if letter not in legal:
            raise DataError(f"{where}: no option '--{letter}'; {suggest(letter, legal)}")
        name, kind = legal[letter]
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
