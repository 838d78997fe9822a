"""Latents on the disk between sampling and decoding: what a run that is killed need not sample again.

A hidden safetensors file beside the video: the solver's state of one video (x [C T H W] float32) after `step`
of the request's steps, and whose latents they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hvtrain.errors import DataError
from hvtrain.flow.solvers import State
from shards.atomic import atomic_path

_KEY = "hvtrain.latents"  # of the file's metadata


def hidden(output: Path) -> Path:
    """Where a video's latents wait."""
    return output.with_name(f".{output.name}.safetensors")


def visible(output: Path) -> Path:
    """Where they stay with save_latents."""
    return output.with_name(f"{output.stem}.latents.safetensors")


def keep(output: Path, kept: State, *, identity: str, parameters: Mapping[str, Any]) -> None:
    """Raises DataError where the disk takes no more."""
    path = hidden(output)
    note = {"identity": identity, "step": kept.step, "parameters": dict(parameters)}
    tensors = {"latents": kept.x, **{f"history.{i}": h for i, h in enumerate(kept.history)}}
    try:
        with atomic_path(path) as temporary:
            save_file(
                {n: t.contiguous() for n, t in tensors.items()}, str(temporary),
                metadata={_KEY: json.dumps(note)}
            )
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: the latents cannot be written ({error}); make room and start again"
        ) from None


def find(output: Path, identity: str) -> State | None:
    """A video's latents, whole or on their way. A file that is damaged, or of other
    parameters, counts as none."""
    for path in (hidden(output), visible(output)):
        try:
            with safe_open(str(path), framework="pt") as file:
                note = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                if note.get("identity") == identity:
                    history = tuple(file.get_tensor(f"history.{i}") for i in range(len(file.keys()) - 1))
                    return State(file.get_tensor("latents"), int(note["step"]), history)
        except (OSError, SafetensorError, ValueError, KeyError):
            continue
    return None


def read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Finished latents [C T H W] from such a file, and the parameters that they were
    made with. Raises DataError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            note = json.loads((file.metadata() or {})[_KEY])
            made: dict[str, Any] = note["parameters"]
            if note["step"] < made["steps"]:
                raise DataError(
                    f"{path}: its latents are those after step {note['step']} of {made['steps']}: not "
                    "finished"
                )
            return file.get_tensor("latents"), made
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: not a file of latents that save_latents kept ({type(error).__name__}: {error})"
        ) from None


def forget(output: Path, *, save: bool) -> None:
    """The video is there: its latents go, or stay under a name that is not hidden; so does what
    killed runs left half-written."""
    waiting = hidden(output)
    left = [p for path in (output, waiting) for p in output.parent.glob(f".{escape(path.name)}.*.tmp")]
    if waiting.exists():
        if save:
            waiting.replace(visible(output))
        else:
            left.append(waiting)
    for path in left:
        path.unlink(missing_ok=True)
