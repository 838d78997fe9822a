"""The merged model, tensor by tensor: memory does not depend on its size, and a run that was
killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.dialects import Shapes, key_map, pieces
from hvtrain.lorafiles.pairs import LoraPair, add_pairs, cut_rows
from hvtrain.merge.policies import Dense, Result
from hvtrain.models.load import Identified
from hvtrain.weights.containers import Mapped, Weights
from hvtrain.weights.keymap import Rule
from hvtrain.weights.outputs import disk_bytes, free_bytes, size_text, writing
from hvtrain.weights.stream import TensorWriter, lay_out, open_resumable, partial_of
from shards.atomic import write_text
from shards.tensors import Extent

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Addition:
    """What is added to one tensor of the file: pairs cut to its rows with their
    multipliers, or a dense delta."""

    pairs: tuple[tuple[LoraPair, float], ...] = ()
    dense: Callable[[], Tensor] | None = None

    def add_to(self, weight: Tensor) -> None:
        if self.dense is not None:
            weight.copy_(weight.float() + self.dense().to(weight.device))
        if self.pairs:  # a vector has none
            add_pairs(weight, self.pairs)


@dataclass(frozen=True)
class Target:
    """Where and how the model is written."""

    output: Path
    dtype: torch.dtype | None
    max_shard_bytes: int | None
    device: str
    signature: str  # of everything that the bytes depend on


def plan_parts(found: Identified, layers: Mapping[str, Result], shapes: Shapes) -> dict[str, Addition]:
    """Which tensors of the file change, by the file's own names."""
    parts: dict[str, Addition] = {}
    key = key_map(found.spec, found.dialect)
    for module, result in layers.items():
        places, rule = pieces(key, module, shapes[module][0]), key.rule_of_official(module)
        names = [f"{found.prefix}{layer}.weight" for layer in places]
        if isinstance(result, Dense):
            cached = _Last(result.delta)
            for name, rows in zip(names, places.values(), strict=True):
                before = parts.get(name, Addition())  # of other layers that are fused in it
                parts[name] = replace(before, dense=_rows_of(cached, rows, rule, before.dense))
            continue
        for c in result:
            for name, cut in zip(names, cut_rows(c.pair, list(places.values())), strict=True):
                if cut is not None:
                    mine = _placed(cut, rule) if rule else cut
                    before = parts.get(name, Addition())
                    parts[name] = replace(before, pairs=(*before.pairs, (mine, c.multiplier)))
    return parts


def plan_whole(
    found: Identified, added: Mapping[str, Tensor], parts: Mapping[str, Addition]
) -> dict[str, Addition]:
    """`parts`, and what is added to whole parameters (`added`, by official names)."""
    more = {}
    for name, value in added.items():
        source = found.sources[name]
        if len(source.parts) > 1 or source.swap or source.share:
            raise CheckpointError(
                f"{found.path}: '{name}' is cut otherwise in this file; merge into the official one"
            )
        own = f"{found.prefix}{source.parts[0]}"
        before = parts.get(own, Addition())
        more[own] = replace(before, dense=_with(value, before.dense))
    return {**parts, **more}


def _placed(pair: LoraPair, rule: Rule) -> LoraPair:
    """With the rows of the file's tensor, where it is a fusion of several layers."""
    lengths = None if pair.magnitude is None else rule.place(pair.magnitude)
    return replace(pair, up=rule.place(pair.up), magnitude=lengths)


def _with(value: Tensor, also: Callable[[], Tensor] | None) -> Callable[[], Tensor]:
    """`also`: what is added to the same tensor as to a layer."""
    if also is None:
        return lambda: value
    return lambda: (other := also()) + value.to(other.device)


class _Last:
    """A delta is computed once for the pieces that are written one after the other, and then dropped."""

    kept: tuple[object, Tensor] | None = None
    lock = threading.Lock()

    def __init__(self, delta: Callable[[], Tensor]) -> None:
        self.delta = delta

    def __call__(self) -> Tensor:
        with _Last.lock:
            if _Last.kept is None or _Last.kept[0] is not self:
                _Last.kept = None
                _Last.kept = (self, self.delta())
            return _Last.kept[1]


def _rows_of(
    whole: Callable[[], Tensor], rows: Tensor, rule: Rule | None, also: Callable[[], Tensor] | None
) -> Callable[[], Tensor]:
    """`also`: what is added to another share of the same tensor."""
    if rule is None or rule.share is None:
        return lambda: whole()[rows]
    return lambda: rule.place(whole()[rows]) + (also() if also else 0)


def refuse_scaled(weights: Weights, parts: Mapping[str, Addition]) -> None:
    """Eight-bit weights that count times a factor kept elsewhere cannot take a sum: the
    factor is not applied here."""
    scaled = any(name.endswith((".scale_weight", "scaled_fp8")) for name in weights)
    beside = any(file.with_name(f"{file.stem}_map.pt").exists() for file in weights.files)
    name = next((name for name in parts if weights.dtype(name) in _FLOAT8), None)
    if name and (scaled or beside):
        raise CheckpointError(
            f"{weights.path}: '{name}' is scaled 8-bit: merge into the bfloat16 file and quantise the result"
        )


def write_model(
    weights: Weights, parts: Mapping[str, Addition], target: Target, *, metadata: Mapping[str, str]
) -> list[Path]:
    """One file, or a directory of shards and their index. Returns the files."""
    slots, home, contents = _layout(weights, target)
    files = list(contents)
    folder = files[0].parent
    check_room(weights, target, metadata=metadata)
    for path, own in contents.items():
        _write_file(weights, parts, path, own, metadata, target)
    if folder == target.output:
        table = {name: path.name for name, path in home.items()}
        index = {
            "metadata": {"total_size": sum(slot.n_bytes for slot in slots.values())}, "weight_map": table
        }
        with writing(place := target.output / _index_name(weights)):
            write_text(place, json.dumps(index, indent=2))
    return files


def _layout(
    weights: Weights, target: Target
) -> tuple[dict[str, Extent], dict[str, Path], dict[Path, list[Extent]]]:
    """Each tensor, its file, and the tensors of each file."""
    slots = {
        name: Extent(name, _dtype(entry.dtype, target.dtype), entry.shape) for name,
        entry in weights.entries.items()
    }
    home = _homes(weights, slots, target)
    contents = {
        path: [slot for name, slot in slots.items() if home[name] == path]
        for path in dict.fromkeys(home.values())
    }
    return slots, home, contents


_SPARE = 2**20  # bytes for the report, and for what a file system notes of its own


def check_room(
    weights: Weights, target: Target, *, metadata: Mapping[str, str], also: int = 0
) -> None:
    """Raises ConfigError if the files of `write_model` will not fit, and `also` bytes beside them."""
    contents = _layout(weights, target)[2]
    sizes = {
        path: len(lay_out(own, metadata)[0]) + sum(slot.n_bytes for slot in own) for path,
        own in contents.items()
    }
    first = next(iter(sizes))
    with writing(first):
        _check_room(first.parent, sizes, max(0, also))


def _check_room(folder: Path, sizes: Mapping[Path, int], also: int) -> None:
    """Refuse before the first byte if the files, written one after the other, will not fit. What an
    interrupted merge left under a file's temporary name is used again; an existing output goes only
    when its successor is complete."""
    room = free_bytes(folder)
    free = room - _SPARE - also
    for path, size in sizes.items():
        free += disk_bytes(partial_of(path)) - size
        if free < 0:
            raise ConfigError(
                f"output: {folder} has {size_text(room)} free, {size_text(-free)} too little for the merged "
                f"model of {size_text(sum(sizes.values()))}{_old_ones(folder, sizes)}"
            )
        free += disk_bytes(path)


def _old_ones(folder: Path, sizes: Mapping[Path, int]) -> str:
    """What lies there and could go."""
    kept = [path for path in sizes if disk_bytes(path)]
    hidden = [p for p in sorted(folder.glob(".*.partial")) if p not in {partial_of(path) for path in sizes}]
    old = [f"{path} ({size_text(disk_bytes(path))})" for path in (*kept, *hidden)]
    said = f"; in the way: {', '.join(old[:4])}" if old else ""
    return said + (" (an existing output is kept until the new one is complete)" if kept else "")


def _homes(weights: Weights, slots: Mapping[str, Extent], target: Target) -> dict[str, Path]:
    """Each tensor's file."""
    output = target.output
    single = output.suffix == ".safetensors"
    if target.max_shard_bytes is not None:
        if single:
            raise ConfigError(
                f"output: {output} must be a directory, because max_shard_gb cuts the model into several "
                "files"
            )
        groups: list[list[str]] = [[]]
        size = 0
        for name, slot in slots.items():
            if groups[-1] and size + slot.n_bytes > target.max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += slot.n_bytes
        n = len(groups)
        names = [f"diffusion_pytorch_model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        return {name: output / file for file, group in zip(names, groups, strict=True) for name in group}
    if not single and len(weights.files) == 1:
        raise ConfigError(
            f"output: {output} must end in .safetensors: {weights.path} is a single file (max_shard_gb cuts "
            "it)"
        )
    own = {file: file.with_suffix(".safetensors").name for file in weights.files}
    return {name: output if single else output / own[entry.file] for name, entry in weights.entries.items()}


def _write_file(
    weights: Weights, parts: Mapping[str, Addition], path: Path, slots: Sequence[Extent],
    metadata: Mapping[str, str], target: Target,
) -> None:
    wanted = {slot.name: slot.dtype for slot in slots}
    largest = max(slot.n_bytes for slot in slots)
    with ExitStack() as stack:
        files = {
            f: stack.enter_context(f.open("rb")).fileno()
            for f in {weights.entries[s.name].file for s in slots}
        }
        writer = stack.enter_context(
            open_resumable(path, slots, metadata=metadata, signature=target.signature)
        )
        own = threading.local()

        def write(name: str) -> None:
            entry = weights.entries[name]
            plain = entry.dtype == wanted[name] and entry.start is not None
            if plain and name not in parts:
                writer.copy(name, files[entry.file], entry.start or 0)
            elif plain and target.device == "cpu":
                if not hasattr(own, "scratch"):
                    own.scratch = torch.empty(largest, dtype=torch.uint8)
                tensor = _read_into(own.scratch, files[entry.file], entry)
                parts[name].add_to(tensor)
                writer.write(name, tensor)
            else:
                _write_converted(weights, parts.get(name), name, wanted[name], writer, target.device)

        _in_threads(write, writer.waiting)


_THREADS = 2  # one reads and writes while the other computes; more would each need memory for a tensor


def _in_threads(work: Callable[[str], None], names: Sequence[str]) -> None:
    """The first error ends it. Each thread computes with its share of the cores:
    else they wait for one another."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // _THREADS))
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            jobs = [pool.submit(work, name) for name in names]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
    finally:
        torch.set_num_threads(cores)


def _read_into(scratch: Tensor, file: int, entry: Mapped) -> Tensor:
    """The tensor's values in memory that is used again: fresh pages cost more than the copy."""
    n = math.prod(entry.shape) * entry.dtype.itemsize
    view, done = memoryview(scratch.numpy())[:n], 0  # type: ignore[arg-type]
    while done < n:
        read = os.preadv(file, [view[done:]], (entry.start or 0) + done)
        if read == 0:
            raise CheckpointError(f"{entry.file}: ends too early; it was changed while it was read")
        done += read
    return scratch[:n].view(entry.dtype).view(entry.shape)


def _write_converted(
    weights: Weights, part: Addition | None, name: str, dtype: torch.dtype, writer: TensorWriter, device: str
) -> None:
    """Another dtype is rounded to once, after the sum. The mapping itself must not be written to."""
    given = weights.get(name)
    tensor = given
    if part is not None:
        between = given.dtype if given.dtype == dtype else torch.float32
        tensor = given.to(device, between, copy=True)
        part.add_to(tensor)
    writer.write(name, tensor.to(dtype))
    weights.release(given)


def signature(files: Sequence[Path], said: str) -> str:
    """Of the inputs: a half-written file is continued only by the same merge."""
    digest = hashlib.sha256(said.encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}/{status.st_size}/{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted and own.is_floating_point else own


def _index_name(weights: Weights) -> str:
    if weights.path.name.endswith(".index.json"):
        return weights.path.name
    found = sorted(weights.path.glob("*.index.json"))  # none in a file
    return found[0].name if found else "diffusion_pytorch_model.safetensors.index.json"
