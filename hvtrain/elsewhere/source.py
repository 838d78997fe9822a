"""What a user of another tool has: a command line, a config file, a dataset file. Read
here, understood elsewhere."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.config.load import parse_yaml
from hvtrain.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LAUNCHERS = ("launch", "deepspeed", "torchrun")  # `accelerate launch`
PRIVATE = re.compile(r"(^|[._])token$|api_key|password", re.IGNORECASE)


@dataclass(frozen=True)
class Foreign:
    """One config of another tool, taken apart."""

    options: Mapping[str, Any]
    called: Sequence[str]  # what may say which model it is, the surest first
    dash: str = ""  # before an option's name, as the user wrote it
    gpus: int = 1
    # options of each, where our encode does not read the tool's own file
    datasets: Sequence[Mapping[str, Any]] | None = None

    def spelled(self, option: str) -> str:
        """As the user wrote it."""
        name = option.removeprefix("accelerate.")
        return (
            f"{self.dash}{option.replace('_args.', '_args ')}" if name == option else f"accelerate --{name}"
        )


def read_file(path: str | Path) -> dict[str, Any]:
    """TOML, YAML or JSON, by its ending. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_bytes()
        raw = tomllib.loads(text.decode("utf-8-sig")) if path.suffix.lower() == ".toml" else parse_yaml(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # of TOML, YAML and UTF-8
        raise ConfigError(
            f"{path}: not {path.suffix[1:].upper() or 'YAML'}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(raw).__name__}")
    return raw


def tables(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of sections, as it has to be; nothing is none."""
    if not isinstance(value or [], list) or not all(isinstance(one, dict) for one in value or []):
        raise ConfigError(f"{where}: expected a list of sections with keys and values")
    return list(value or [])


def number(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where} is {value!r}, expected a whole number")
    return value


def is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # a whole command line is no name of a file
        return False


def words_of(text: str) -> list[str]:
    """A command line as it stands in a shell, a script or a README: with comments, and lines that go on."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        return shlex.split(re.sub(r"[\\^`]\s*\n", " ", "\n".join(lines)))
    except ValueError as error:
        raise ConfigError(f"'{text[:60]}': not a command line ({error})") from None


@dataclass
class Words:
    """A command line in parts."""

    launcher: dict[str, Any] = field(default_factory=dict)  # options before the program
    program: str = ""  # without folder and ending
    options: dict[str, Any] = field(default_factory=dict)


def command_line(words: Sequence[str]) -> Words:
    """`accelerate launch --num_processes 8 train.py --lr 1e-4`. Raises ConfigError for a
    word that belongs to no option."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None and "-m" in words[:-1]:
        at = list(words).index("-m") + 1
    if at is None:
        return Words(options=_options(words))
    program = Path(words[at]).stem if words[at].endswith(".py") else words[at].rpartition(".")[2]
    before = [word for word in words[:at] if word != "-m"]
    # after `uv run --extra X`
    starter = next((i for i, word in enumerate(before) if word in LAUNCHERS), len(before))
    return Words(_options(before[starter + 1 :]), program, _options(words[at + 1 :]))


def _options(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, sign, text = word.lstrip("-").partition("=")
            found[name] = scalar(text) if sign else True
        elif name is None:
            raise ConfigError(
                f"'{word}' belongs to no option; give the command line as it is, in one pair of quotes"
            )
        else:
            before = found[name]
            value = scalar(word)
            found[name] = (
                value if before is True else [*before, value] if isinstance(before, list) else [before, value]
            )
    return found


def scalar(text: str) -> Any:
    """A number if it is one; true and false; else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
