"""How a video is sampled. Each parameter is declared here, once: the keys of a config, the options
of a prompt line, a preview's keys, a flavor's own values, a request and what is written into a file
all derive from this record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from hvtrain.errors import ConfigError


def option(
    letter: str = "", *, above: float | None = None, most: float | None = None, alike: bool = True
) -> Any:
    """None until it is given. `letter`: of its option in a prompt line; `alike`: of all
    videos that are sampled together."""
    return field(default=None, metadata={"letter": letter, "above": above, "most": most, "alike": alike})


@dataclass(frozen=True)
class Sampling:
    """Where nothing is given there is None, in a config null: the flavor's own value."""

    width: int = option("w")
    """Pixels, a multiple of the flavor's unit (16 or 32 for most)"""
    height: int = option("h")
    """Pixels, as width"""
    frames: int = option("f")
    """One more than a multiple of the latents' step in time, 4 for most flavors"""
    fps: int = option(above=0, most=1000, alike=False)
    """Frames a second of the file"""
    steps: int = option("s", above=0, most=10_000)
    """Sampling steps"""
    seed: int = option("d", alike=False)
    """Seed of the noise; null: 0, and in a prompt file line i takes seed + i"""
    image: str | None = option("i", alike=False)
    """The picture that an image-to-video flavor begins with (of a video its first frame),
    scaled and cropped to the size"""
    end_image: str | None = option("ei", alike=False)
    """The picture that it ends with, for a flavor of first and last frame to video"""
    video: str | None = option("v", alike=False)
    """The smaller video that a super-resolution flavor enlarges: a file of as many frames, or
    NAME.latents.safetensors, which save_latents keeps"""
    solver: str = option("ss")
    """euler, unipc or dpm++"""
    shift: float = option("fs", above=0)
    """Shift of the sigma schedule"""
    guidance: float | None = option("g")
    """Embedded guidance"""
    cfg_scale: float = option("l")
    """True classifier-free guidance: 1 is off, above costs a second forward pass"""
    expert_cfg_scale: Mapping[str, float] = option()
    """The same for single experts by name, where a flavor has several; null: cfg_scale if
    that is given, else their own"""
    negative_prompt: str = option("n", alike=False)
    """What not to show, for cfg_scale above 1"""


def given(values: Sampling) -> dict[str, Any]:
    """What a config says of it."""
    return {f.name: value for f in fields(Sampling) if (value := getattr(values, f.name)) is not None}


def line_options() -> dict[str, tuple[str, type]]:
    """letter -> name and type, as the sd-scripts family writes them: "a cat --w 640 --h 368 --d 7"."""
    kinds = get_type_hints(Sampling)
    named = {f.metadata["letter"]: f.name for f in fields(Sampling) if f.metadata["letter"]}
    return {letter: (name, _plain(kinds[name])) for letter, name in named.items()}


def check_limits(values: Sampling, *, prefix: str = "") -> None:
    """What no model could do. Raises ConfigError."""
    for f in fields(Sampling):
        value = getattr(values, f.name)
        if isinstance(value, Mapping):
            value = next((number for number in value.values() if not math.isfinite(number)), 0.0)
        if not isinstance(value, (int, float)):
            continue
        above, most = f.metadata["above"], f.metadata["most"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{f.name} is {value}, expected a finite number")
        if above is not None and value <= above:
            raise ConfigError(f"{prefix}{f.name} is {value}, expected more than {above}")
        if most is not None and value > most:
            raise ConfigError(f"{prefix}{f.name} is {value}, expected at most {most}")


def _plain(kind: Any) -> type:
    """Of `float | None`, float."""
    return next((a for a in getattr(kind, "__args__", ()) if a is not type(None)), kind)
