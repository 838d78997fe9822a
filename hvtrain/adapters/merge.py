"""`hvtrain merge`: LoRAs into a model file. Tensor by tensor, so that memory does not depend on the model's size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hvtrain.adapters.dialects import Shapes, key_map, pieces
from hvtrain.adapters.files import LoraFile, read_lora
from hvtrain.adapters.lora import linear_shapes
from hvtrain.adapters.pairs import LoraPair, add_pairs, cut_rows
from hvtrain.config import MergeConfig, asset
from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.models.load import Identified, check, identify
from hvtrain.models.stream import Slot, open_writer
from hvtrain.models.weights import Weights, open_weights
from shards.atomic import write_text

MERGED_KEY = "hvtrain.merged"  # metadata: what has been merged into a model, oldest first
_STALE = ("sshs_", "modelspec.hash_sha256")  # metadata that describes the bytes as they were
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Part:
    """What is added to one tensor of the file: pairs already cut to its rows, with their multipliers."""

    pairs: list[tuple[LoraPair, float]] = field(default_factory=list)


def run(cfg: MergeConfig) -> None:
    """The merged model has the input's names (prefix included), layout, dtypes and metadata, as safetensors."""
    source, output = Path(asset(cfg.dit)), Path(cfg.output)
    if not cfg.lora:
        raise ConfigError("lora: nothing to merge; give at least one LoRA file")
    if cfg.dtype is not None and cfg.dtype not in _DTYPES:
        raise ConfigError(f"dtype: no dtype '{cfg.dtype}'; {suggest(cfg.dtype, _DTYPES)}")
    dtype = _DTYPES[cfg.dtype] if cfg.dtype else None
    _check_output(output, source, [Path(entry.path) for entry in cfg.lora])
    found = identify(source, model=cfg.model)
    shapes = _check_whole(found)
    loras = [(read_lora(entry.path, shapes, spec=found.spec), entry.multiplier) for entry in cfg.lora]
    parts = plan(found, loras, shapes=shapes)
    weights = open_weights(source)  # every tensor under the file's own name, also those that are not the DiT's
    _refuse_scaled(weights, parts)
    for lora, multiplier in loras:
        print(f"{lora.summary()}, times {multiplier:g}")
    write(weights, parts, output, metadata=_metadata(weights, loras), dtype=dtype)
    print(f"{output}: {len(parts)} of {len(weights)} tensors changed")


def _check_output(output: Path, source: Path, loras: Sequence[Path]) -> None:
    for path in (source, *loras):
        if output.exists() and path.exists() and output.samefile(path):
            raise ConfigError(f"output: {output} is one of the inputs; choose another name")
    if output.suffix not in ("", ".safetensors"):
        raise ConfigError(f"output: {output} must end in .safetensors (or name a directory, for a sharded model)")


def _check_whole(found: Identified) -> dict[str, tuple[int, int]]:
    """Refuse an incomplete model; else [out, in] of its Linear layers."""
    with torch.device("meta"):
        model = found.spec.build(found.arch)
    have = found.weights.shapes
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check(found.path, wanted, {name: source.shape(have) for name, source in found.sources.items()})
    return linear_shapes(model)


def plan(found: Identified, loras: Sequence[tuple[LoraFile, float]], *, shapes: Shapes) -> dict[str, Part]:
    """Which tensors of the file change, by the file's own names. A multiplier of 0 changes none."""
    parts: dict[str, Part] = {}
    for lora, multiplier in loras:
        for module, pair in lora.pairs.items() if multiplier != 0.0 else ():
            places = pieces(key_map(found.spec, found.dialect), module, shapes[module][0])
            for layer, cut in zip(places, cut_rows(pair, list(places.values())), strict=True):
                if cut is not None:
                    name = f"{found.prefix}{layer}.weight"
                    parts.setdefault(name, Part()).pairs.append((cut, multiplier))
    return parts


def _refuse_scaled(weights: Weights, parts: Mapping[str, Part]) -> None:
    """Eight-bit weights that count times a factor kept elsewhere cannot take a sum: the factor is not applied here."""
    scaled = any(name.endswith((".scale_weight", "scaled_fp8")) for name in weights)
    beside = any(file.with_name(f"{file.stem}_map.pt").exists() for file in weights.files)
    name = next((name for name in parts if weights.dtype(name) in _FLOAT8), None)
    if name and (scaled or beside):
        raise CheckpointError(
            f"{weights.path}: '{name}' is scaled 8-bit: merge into the bfloat16 file and quantise the result"
        )


def _metadata(weights: Weights, loras: Sequence[tuple[LoraFile, float]]) -> dict[str, str]:
    kept = {key: value for key, value in weights.metadata.items() if not key.startswith(_STALE)}
    history = json.loads(kept.get(MERGED_KEY, "[]"))
    for lora, multiplier in loras:
        entry: dict[str, object] = {"file": lora.path.name, "multiplier": multiplier}
        entry |= {key: lora.metadata[key] for key in ("sshs_model_hash", "ss_loraid") if key in lora.metadata}
        history.append(entry)
    return {**kept, MERGED_KEY: json.dumps(history)}


def write(
    weights: Weights,
    parts: Mapping[str, Part],
    output: Path,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """One file, or a directory with the shards of the input and their index."""
    slots = {name: Slot(name, _dtype(entry.dtype, dtype), entry.shape) for name, entry in weights.entries.items()}
    total = sum(slot.n_bytes for slot in slots.values())
    single = output.suffix == ".safetensors"
    if not single and len(weights.files) == 1:
        raise ConfigError(f"output: {output} must end in .safetensors: {weights.path} is a single file")
    folder = output.parent if single else output
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < total:
        raise ConfigError(f"output: {folder} has {free / 1e9:.1f} GB free, the merged model needs {total / 1e9:.1f} GB")
    names = {file: file.with_suffix(".safetensors").name for file in weights.files}
    home = {name: output if single else output / names[entry.file] for name, entry in weights.entries.items()}
    for path in dict.fromkeys(home.values()):
        own = [slot for name, slot in slots.items() if home[name] == path]
        _write_file(weights, parts, path, own, metadata)
    if not single:
        table = {name: path.name for name, path in home.items()}
        index = {"metadata": {"total_size": total}, "weight_map": table}
        write_text(output / _index_name(weights), json.dumps(index, indent=2))


def _write_file(
    weights: Weights, parts: Mapping[str, Part], path: Path, slots: Sequence[Slot], metadata: Mapping[str, str]
) -> None:
    wanted = {slot.name: slot.dtype for slot in slots}
    with open_writer(path, slots, metadata=metadata) as writer:
        for name in writer.waiting:
            given = weights.get(name)
            tensor = given
            if name in parts:
                # Another dtype is rounded to once, after the sum. The mapping itself must not be written to.
                between = given.dtype if given.dtype == wanted[name] else torch.float32
                tensor = given.to(between, copy=True, memory_format=torch.contiguous_format)
                add_pairs(tensor, parts[name].pairs)
            writer.write(name, tensor.to(wanted[name]))
            weights.release(given)


def _dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted and own.is_floating_point else own


def _index_name(weights: Weights) -> str:
    if weights.path.name.endswith(".index.json"):
        return weights.path.name
    found = sorted(weights.path.glob("*.index.json")) if weights.path.is_dir() else []
    return found[0].name if found else "diffusion_pytorch_model.safetensors.index.json"
