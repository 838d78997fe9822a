"""diffusion-pipe: its config TOML, or the command line that names it, with the dataset
TOML that the config names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvtrain.elsewhere.source import Foreign, command_line, is_file, number, read_file, tables, words_of
from hvtrain.elsewhere.table import flat
from hvtrain.errors import ConfigError


def read(given: Sequence[str]) -> Foreign:
    if len(given) != 1:
        raise ConfigError("diffusion-pipe: give its config, as in `hvtrain import diffusion-pipe FILE.toml`")
    path, line, gpus = given[0], {}, 1
    if not is_file(path) and " " in path:
        words = command_line(words_of(path))
        if "config" not in words.options:
            raise ConfigError("diffusion-pipe: the command line names no --config FILE.toml")
        path, gpus = str(words.options.pop("config")), number(words.launcher.get("num_gpus", 1), "--num_gpus")
        line = {f"command_line.{key}": value for key, value in words.options.items()}
    options = dict(flat(read_file(path)))
    options.setdefault("adapter.type", "none")  # all weights
    merged = options.pop("adapter.fuse_adapters", None) or options.pop("model.merge_adapters", None)
    if merged:
        options["model.merge_adapters"] = merged
    encoders = tables(options.pop("model.text_encoders", None), "model.text_encoders")
    files = [file for one in encoders for file in one.get("paths") or [one.get("path")]]
    options |= {f"model.text_encoders.{i}": file for i, file in enumerate(files)}
    named = options.get("dataset")
    file = (
        next((p for p in (Path(str(named)), Path(path).parent / str(named)) if is_file(str(p))), None)
        if named else None
    )
    if named and file is None:
        options["dataset.missing"] = options.pop("dataset")
    datasets = _datasets(read_file(file)) if file else None
    return Foreign(options | line, [str(options.get("model.type", ""))], gpus=gpus, datasets=datasets)


def _datasets(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of every [[directory]], with those of the file where it has none."""
    common = {key: value for key, value in raw.items() if key != "directory"}
    return [common | one for one in tables(raw.get("directory"), "dataset: directory")]
