"""Training state on disk, in a layout that shows neither the number of ranks nor the ZeRO stage.

`checkpoints/step-00000010/` holds params.safetensors (trainable weights, fp32), optimizer.safetensors,
perhaps ema.safetensors, state.json (step, cursor, ...) and, written last, COMPLETE with size and checksum of
each of them and of the result that was written before. What ZeRO-3 trains whole lies in parts instead, one of
each rank (parts.py). The directory gets its name only when it is whole, so the newest name is always a state
to continue from; if the disk has damaged it since, the one before is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hvtrain.errors import CheckpointError
from hvtrain.train.optstate import OptimizerState
from hvtrain.train.parts import SEPARATOR, SealedFile, has_parts, open_parts
from shards.atomic import sync, write_text

COMPLETE = "COMPLETE"


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
    optimizer: Mapping[str, Mapping[str, Tensor]]
    ema: Mapping[str, Tensor] = field(default_factory=dict)


def save(root: Path, snapshot: Snapshot, *, keep_last: int, results: Iterable[Path] = ()) -> Path:
    """Write a checkpoint and drop the oldest beyond `keep_last` (0 keeps all). For one rank only.

    `results`: the finished run's files for the user, sealed with it. `check_room` first.
    """
    temporary = begin(root, snapshot.progress.step)
    try:
        _write(temporary, snapshot)
        written = [SealedFile(p.name, seal(p)) for p in sorted(temporary.iterdir())]
        return finish(temporary, snapshot.progress, written, keep_last=keep_last, results=results)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(root: Path, step: int) -> Path:
    """An empty directory to write the files of a checkpoint in."""
    temporary = root / f".writing-step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def finish(
    temporary: Path, progress: Progress, files: Sequence[SealedFile], *, keep_last: int,
    results: Iterable[Path] = ()
) -> Path:
    """Seal what is written and give the directory its name. For one rank only."""
    root, final = temporary.parent, temporary.with_name(temporary.name.removeprefix(".writing-"))
    state = temporary / "state.json"
    state.write_text(json.dumps(asdict(progress), indent=1) + "\n")
    _seal_all(temporary, {**dict(files), state.name: seal(state)}, results)
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync(root)
    if keep_last:
        for old in _complete(root)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, snapshot: Snapshot) -> None:
    flat = {
        # a scalar may be one tensor for all
        f"{name}{SEPARATOR}{key}": value if value.ndim else value.clone()
        for name, state in snapshot.optimizer.items()
        for key, value in state.items()
    }
    files: dict[str, Mapping[str, Tensor]] = {
        "params": snapshot.params, "optimizer": flat, "ema": snapshot.ema
    }
    for name, tensors in files.items():
        if tensors or name != "ema":
            save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / f"{name}.safetensors"))


# --- seals --------------------------------------------------------------------------------------------------


def seal(path: Path) -> list:
    """[size in bytes, xxh3-64] of a file."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
            size += len(piece)
    return [size, digest.hexdigest()]


def _seal_all(folder: Path, files: Mapping[str, list], results: Iterable[Path]) -> None:
    seals = {"files": files, "results": {p.name: seal(p) for p in results}}
    write_text(folder / COMPLETE, json.dumps(seals, indent=1) + "\n")


def seal_results(path: Path, results: Iterable[Path]) -> None:
    """Of results that were made again from the checkpoint `path`."""
    _seal_all(path, _seals(path).get("files", {}), results)


def result_is_whole(path: Path, result: Path) -> bool:
    """Whether a file of the finished run is what was written with the checkpoint `path`;
    without a seal, whether it opens."""
    if not result.is_file():
        return False
    wanted = _seals(path).get("results", {}).get(result.name)
    if wanted is None:
        return _opens(result) is None
    return _broken(result, wanted) is None


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its seal. Raises CheckpointError. Those of older versions have
    none: their files are opened, which shows that they are whole, not that they are right."""
    seals = _seals(path).get("files") or {}
    required = (
        {"state.json"} if has_parts(seals) else {"params.safetensors", "optimizer.safetensors", "state.json"}
    )
    for name in sorted(required | set(seals)):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        reason = _broken(file, seals[name]) if name in seals else _opens(file)
        if reason:
            raise CheckpointError(f"{file} is damaged: {reason}")


def _broken(file: Path, wanted: list) -> str | None:
    size = file.stat().st_size
    if size != wanted[0]:
        return f"{size} bytes, {wanted[0]} were written"
    return None if seal(file) == wanted else "its checksum is not the one it was written with"


def _opens(file: Path) -> str | None:
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), "pt"):
                return None
        Progress(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        return str(error).splitlines()[0]
    return None


def _seals(path: Path) -> dict[str, dict[str, list]]:
    try:
        text = (path / COMPLETE).read_text()
        return json.loads(text) if text else {}  # older versions left it empty
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / COMPLETE} is damaged: {error}") from None


def check_room(root: Path, snapshot: Snapshot, *, results: int = 0) -> None:
    """Raises CheckpointError if the disk has no room for it, and for `results`
    bytes that are written before."""
    tensors = [*snapshot.params.values(), *snapshot.ema.values()]
    tensors += [t for state in snapshot.optimizer.values() for t in state.values()]
    check_free(root, snapshot.progress.step, sum(t.numel() * t.element_size() for t in tensors) + results)


def check_free(root: Path, step: int, needed: int) -> None:
    """Raises CheckpointError if the disk has no room for `needed` bytes of a checkpoint and its result."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise CheckpointError(
            f"{root} cannot be written ({error.strerror}); mend that and start again"
        ) from None
    if free < needed:
        raise CheckpointError(
            f"{root}: {_size(free)} free, step {step} needs {_size(needed)} for its checkpoint and its "
            "result; make room and start again: the run continues from the checkpoint before"
        )


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 1 << 30 else f"{n / 2**20:.2f} MiB"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest(root: Path) -> Path | None:
    """The latest complete checkpoint, damaged or not."""
    found = _complete(root)
    return found[-1] if found else None


def newest_sound(root: Path, say: Callable[[str], None]) -> Path | None:
    """The latest whose files are what was written. Damaged ones are set aside under another name, and said.

    Raises CheckpointError if there are only damaged ones. For one rank only: it reads them whole.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_complete(root)):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
            continue
        for bad, reason in damaged:
            aside = _free_name(bad.with_name(f"damaged-{bad.name}"))
            os.replace(bad, aside)
            say(f"warning: {reason}; set aside as {aside.name}, the run goes on from {path.name}")
        return path
    if damaged:
        raise CheckpointError(
            f"{damaged[0][1]}, and no sound checkpoint is left in {root}; remove that directory to begin "
            "this run anew"
        )
    return None


def _free_name(path: Path) -> Path:
    return next(
        p for n in range(1, 1000)
        if not (p := path if n == 1 else path.with_name(f"{path.name}-{n}")).exists()
    )


def load(path: Path) -> Snapshot:
    try:
        progress = Progress(**json.loads((path / "state.json").read_text()))
        if has_parts(p.name for p in path.iterdir()):
            return Snapshot(progress, *open_parts(path))
        flat = load_file(str(path / "optimizer.safetensors"))
        ema = path / "ema.safetensors"
        optimizer: OptimizerState = {}
        for key, value in flat.items():
            name, _, state = key.rpartition(SEPARATOR)
            optimizer.setdefault(name, {})[state] = value
        return Snapshot(
            progress, load_file(str(path / "params.safetensors")), optimizer,
            load_file(str(ema)) if ema.exists() else {}
        )
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _complete(root: Path) -> list[Path]:
    return sorted(p.parent for p in root.glob("step-*/COMPLETE"))
