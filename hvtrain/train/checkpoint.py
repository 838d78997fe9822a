"""Training state on disk, in a layout that shows neither the number of ranks nor the ZeRO stage.

`checkpoints/step-00000010/` holds params.safetensors (trainable weights, fp32), optimizer.safetensors, perhaps
ema.safetensors, state.json (step, cursor, ...) and, written last, COMPLETE. The directory gets its name only when it is
whole, so the newest name is always a state to continue from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.train.engine import OptimizerState
from shards.atomic import write_text

RUN_FILE = "run.json"
_SEPARATOR = "::"  # parameter name :: state name


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    step: int = 0
    cursor: int = 0  # samples consumed by all ranks
    epoch: int = 0
    bad_steps: int = 0  # skipped for a gradient that was not finite, over the whole run


@dataclass(frozen=True)
class Snapshot:
    progress: Progress
    params: Mapping[str, Tensor]
    optimizer: OptimizerState
    ema: Mapping[str, Tensor] = field(default_factory=dict)


def save(root: Path, snapshot: Snapshot, *, keep_last: int) -> Path:
    """Write a checkpoint and drop the oldest beyond `keep_last` (0 keeps all). For one rank only.

    `check_room` first.
    """
    final = root / f"step-{snapshot.progress.step:08d}"
    temporary = root / f".writing-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    flat = {
        f"{name}{_SEPARATOR}{key}": value if value.ndim else value.clone()  # a scalar may be one tensor for all
        for name, state in snapshot.optimizer.items()
        for key, value in state.items()
    }
    files: dict[str, Mapping[str, Tensor]] = {"params": snapshot.params, "optimizer": flat, "ema": snapshot.ema}
    for name, tensors in files.items():
        if tensors or name != "ema":
            save_file({k: v.contiguous() for k, v in tensors.items()}, str(temporary / f"{name}.safetensors"))
    (temporary / "state.json").write_text(json.dumps(asdict(snapshot.progress), indent=1) + "\n")
    (temporary / "COMPLETE").touch()
    for path in [*temporary.iterdir(), temporary]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _fsync(root)
    if keep_last:
        for old in _complete(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def check_room(root: Path, snapshot: Snapshot) -> None:
    """Raises CheckpointError if the disk has no room for it."""
    tensors = [*snapshot.params.values(), *snapshot.ema.values()]
    tensors += [t for state in snapshot.optimizer.values() for t in state.values()]
    needed = sum(t.numel() * t.element_size() for t in tensors)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root}: {free / 2**30:.2f} GiB free, the checkpoint of step {snapshot.progress.step} needs {needed / 2**30:.2f}; "
            "make room and start again: the run continues from the checkpoint before"
        )


def newest(root: Path) -> Path | None:
    """The latest complete checkpoint."""
    found = _complete(root)
    return found[-1] if found else None


def load(path: Path) -> Snapshot:
    try:
        progress = Progress(**json.loads((path / "state.json").read_text()))
        flat = load_file(str(path / "optimizer.safetensors"))
        ema = path / "ema.safetensors"
        optimizer: OptimizerState = {}
        for key, value in flat.items():
            name, _, state = key.rpartition(_SEPARATOR)
            optimizer.setdefault(name, {})[state] = value
        return Snapshot(
            progress, load_file(str(path / "params.safetensors")), optimizer, load_file(str(ema)) if ema.exists() else {}
        )
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); remove it to continue from the one before"
        ) from None


def claim(output: Path, identity: Mapping[str, object], resolved: str, *, resume: bool) -> Path | None:
    """Make `output` this run's directory and return the checkpoint to continue from, if any.

    Raises ConfigError where it holds another run or files that no run wrote. For one rank only.
    """
    marker = output / RUN_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output_dir: {output} cannot be made a directory ({error.strerror})") from None
    if marker.exists():
        _same_run(marker, identity, resume=resume)
    elif any(not p.name.startswith(f".{RUN_FILE}") for p in output.iterdir()):  # that one: killed while writing
        raise ConfigError(
            f"run.output_dir: {output} holds files but no run of hvtrain; choose an empty or new directory"
        )
    write_text(marker, json.dumps(identity, indent=1) + "\n")
    write_text(output / "config.yaml", resolved)
    return newest(output / "checkpoints")


def _same_run(marker: Path, identity: Mapping[str, object], *, resume: bool) -> None:
    where = marker.parent
    if not resume:
        raise ConfigError(
            f"run.output_dir: {where} holds a run already and run.resume is 'never'; "
            "choose another directory, or run.resume=auto to continue it"
        )
    try:
        before = json.loads(marker.read_text())
    except ValueError:
        raise ConfigError(f"run.output_dir: {marker} is damaged; choose another directory") from None
    for key, value in identity.items():
        if before.get(key) != json.loads(json.dumps(value)):
            raise ConfigError(
                f"run.output_dir: {where} holds another run: there {key} is {before.get(key)!r}, here {value!r}; "
                "choose another directory, or give the same value to continue that run"
            )


def _complete(root: Path) -> list[Path]:
    return sorted(p.parent for p in root.glob("step-*/COMPLETE"))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
