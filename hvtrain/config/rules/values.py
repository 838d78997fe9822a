"""What several verbs ask of their values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hvtrain.config import ModelConfig, Sampling, asset
from hvtrain.config.parts import parts_of
from hvtrain.config.sampling import check_limits
from hvtrain.errors import ConfigError

SAMPLED = ("latents", "text")  # columns whose encoders make a video of a prompt


def check_sampling(values: Sampling, prefix: str = "") -> None:
    check_limits(values, prefix=prefix)
    for key, path in {"image": values.image, "end_image": values.end_image, "video": values.video}.items():
        if path is not None:
            check_exists(path, prefix + key)


def check_files(
    model: ModelConfig, *, columns: Iterable[str] = (), dit: bool = False, needed_for: str = ""
) -> None:
    """What is given exists, and what makes these columns is given."""
    for name, part in parts_of(model.name).items():
        value = model.file(name)
        if value is not None:
            check_exists(value, f"model.{name}")
        elif (name == "dit" and dit) or (set(part.makes) & set(columns) and not part.optional):
            raise ConfigError(f"model.{name} is not set; {needed_for} needs it ({part.about})")


def check_given(value: str, key: str, what: str) -> None:
    if not value:
        raise ConfigError(f"{key} is not set; give {what}")


def check_exists(path: str, key: str) -> None:
    try:
        there = Path(asset(path)).exists()
    except OSError as error:
        raise ConfigError(f"{key}: {path[:100]} cannot be looked at ({error.strerror})") from None
    if not there:
        raise ConfigError(f"{key}: {path} does not exist")


def check_share(value: float, key: str) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key} is {value}, expected at least 0 and below 1")
