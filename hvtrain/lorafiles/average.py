"""Averages of LoRA files: along one run's checkpoints (post-hoc EMA), over several LoRAs, over slices.

Post-hoc EMA: Karras et al. 2024 (arXiv 2312.02696), the power-function profile given
by its relative width sigma_rel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import check_sum, split_ending
from hvtrain.lorafiles.write import check_output, kept, write_tensors
from hvtrain.weights.containers import Weights, open_weights

_NUMBERED = re.compile(r"(?:.*\D)?(\d+)(?:-ema)?")  # the number at the end of a name


@dataclass(frozen=True)
class Averaged:
    """What was made of which files, oldest first, with the weight that each has in the result."""

    files: tuple[Path, ...]
    weights: tuple[float, ...]


def checkpoints(paths: Sequence[str], *, output: str | Path | None = None) -> list[Path]:
    """The files of a run, oldest first. One file stands for its siblings NAME-step00000010 ..., a directory
    for the LoRA files in it and in its sub-folders (epoch_1/, epoch_2/, ...); several are taken as they are,
    in their order. The `output` of an earlier average is not one of them.

    Raises ConfigError if there are fewer than two.
    """
    given = [Path(p) for p in paths]
    for path in given:
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
    if len(given) > 1:
        return given
    (path,) = given
    if path.is_dir():
        found = [
            p for p in path.rglob("*.safetensors")
            if not p.name.startswith(".") and "checkpoints" not in p.parts
        ]
    else:
        stem = re.sub(r"[-_]?(step|epoch)?[-_]?\d+$", "", path.stem)
        sibling = re.compile(re.escape(stem) + r"([-_]?(step|epoch)?[-_]?\d+)?")
        found = [p for p in path.parent.glob("*.safetensors") if sibling.fullmatch(p.stem)]
    found = [p for p in found if output is None or p.absolute() != Path(output).absolute()]
    if len(found) < 2:
        raise ConfigError(
            f"{path}: {len(found)} LoRA file(s) found, an average needs two or more; name them all"
        )
    folders = len({p.parent for p in found}) > 1
    return sorted(found, key=lambda p: _age(p, folders=folders))


def _age(path: Path, *, folders: bool) -> tuple[bool, int, int, str]:
    """By the number at the end of the folder's name, where they differ, or of the
    file's; one without is the last."""
    names = (path.parent.name, path.stem) if folders else (path.stem,)
    number = next((m for name in names if (m := _NUMBERED.fullmatch(name))), None)
    return number is None, int(number[1]) if number else 0, path.stat().st_mtime_ns, path.name


# --- profiles -----------------------------------------------------------------------------------------------


def constant(beta: float) -> Callable[[int, int], float]:
    return lambda t, n: beta


def linear(first: float, last: float) -> Callable[[int, int], float]:
    """beta from `first` at the first merge to `last` at the last."""
    return lambda t, n: first + (last - first) * ((t - 2) / (n - 2) if n > 2 else 0.0)


def power(sigma_rel: float) -> Callable[[int, int], float]:
    """beta_t = (1 - 1/t)^(gamma + 1), t = 1, 2, ... counting the first file (its own
    beta is 0: it is the start)."""
    if not 0 < sigma_rel < 0.2886:  # a flat profile has 1 / sqrt(12)
        raise ConfigError(
            f"--sigma-rel {sigma_rel}: expected more than 0 and less than 0.2886 (a flat average)"
        )
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    gamma = max(float(r.real) for r in roots if abs(r.imag) < 1e-9)
    return lambda t, n: (1 - 1 / t) ** (gamma + 1)


def weights_of(beta: Callable[[int, int], float], n: int) -> list[float]:
    """What each of n files counts for in the end. The first is the start, so it is never dropped."""
    shares = [1.0]
    for t in range(2, n + 1):
        b = beta(t, n)
        shares = [share * b for share in shares] + [1 - b]
    return shares


# --- averages -----------------------------------------------------------------------------------------------


def average(
    files: Sequence[Path], shares: Sequence[float], output: str | Path, *, democratic: bool = False
) -> Averaged:
    """Tensor by tensor, in float32, each in its own dtype again; metadata of the last file, all LORAIDs kept.

    `democratic`: a layer that only some files hold is averaged over those;
    otherwise all files must hold the same.
    """
    check_output(str(output), *files)
    opened = [open_weights(path) for path in files]
    for w in opened:
        check_sum(w)
    names = list(dict.fromkeys(name for w in opened for name in w))
    if not democratic:
        _same_layers(files, opened, names)
    _same_alphas(files, opened)
    tensors = {name: _mean(name, opened, shares) for name in names}
    metadata = kept(opened[-1].metadata)
    loraids = list(dict.fromkeys(i for w in opened for i in w.metadata.get("ss_loraid", "").split(",") if i))
    if loraids:
        metadata["ss_loraid"] = ",".join(loraids)
    write_tensors(output, tensors, metadata=metadata)
    return Averaged(tuple(files), tuple(shares))


def _mean(name: str, opened: Sequence[Weights], shares: Sequence[float]) -> Tensor:
    holders = [(w, s) for w, s in zip(opened, shares, strict=True) if name in w]
    first = holders[0][0].get(name)
    if split_ending(name)[1] == "alpha" or not first.is_floating_point():
        return first.clone()
    whole = sum(s for _, s in holders)
    total = torch.zeros(first.shape, dtype=torch.float64)
    for w, share in holders:
        value = w.get(name)
        if value.shape != first.shape:
            shapes = f"{list(value.shape)}, elsewhere {list(first.shape)}"
            raise CheckpointError(
                f"{w.path}: '{name}' is {shapes}: other ranks do not average, `hvtrain lora resize` first"
            )
        total += value.double() * (share / whole)
    return total.to(first.dtype)


def _same_layers(files: Sequence[Path], opened: Sequence[Weights], names: Sequence[str]) -> None:
    for path, w in zip(files, opened, strict=True):
        missing = [name for name in names if name not in w]
        if missing:
            raise CheckpointError(
                f"{path}: lacks '{missing[0]}' that other files hold: not the same LoRA. Different slices "
                "are combined by `hvtrain merge`, or averaged where both hold a layer with --democratic"
            )


def _same_alphas(files: Sequence[Path], opened: Sequence[Weights]) -> None:
    seen: dict[str, tuple[float, Path]] = {}
    for path, w in zip(files, opened, strict=True):
        for name in w:
            if split_ending(name)[1] != "alpha":
                continue
            alpha = float(w.get(name))
            before, where = seen.setdefault(name, (alpha, path))
            if before != alpha:
                raise CheckpointError(
                    f"{path}: '{name}' is {alpha:g}, in {where.name} {before:g}: convert one of them first"
                )

