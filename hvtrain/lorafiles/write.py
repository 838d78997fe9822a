"""LoRA files as they are written: under the sd-scripts / musubi-tuner names, with their hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from hvtrain.adapters.table import ADAPTERS, kinds_of
from hvtrain.errors import ConfigError
from hvtrain.lorafiles.dialects import MUSUBI
from hvtrain.lorafiles.files import PARTS_KEY, STALE, split_ending
from hvtrain.lorafiles.metadata import file_order, lora_metadata, model_hashes
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.weights.outputs import check_place
from hvtrain.weights.stream import open_writer

_NAMES = {part: name for kind in ADAPTERS.values() for part, name in kind.PARTS.items()}


def save_lora(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    alpha: float,
    metadata: Mapping[str, object],
    architecture: str = "",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write trained adapters of one kind: `tensors` under their parameter names (`X.lora_down.weight`,
    `X.hada_w1_a`), and `X.alpha` where a layer's is not `alpha`."""
    found: dict[str, torch.Tensor] = {}
    parts = set()
    for name, tensor in tensors.items():
        module, part = split_ending(name)
        if part not in _NAMES and part != "alpha":
            raise ValueError(f"'{name}' is not an adapter's parameter")
        stem = f"lora_unet_{module.replace('.', '_')}"
        if part != "alpha":
            parts.add(part)
            found[f"{stem}.{_NAMES[part]}"] = tensor.to("cpu", dtype).contiguous()
            found.setdefault(f"{stem}.alpha", torch.tensor(float(alpha or rank)))
        else:
            found[f"{stem}.alpha"] = tensor.float()
    (kind,) = kinds_of(parts)
    path = Path(path)
    arguments: dict[str, object] = {}
    for about in (kind.METADATA, metadata):
        arguments |= about.get("ss_network_args", {})  # type: ignore[call-overload]
    about = {**kind.METADATA, **metadata, "ss_network_args": arguments}
    full = lora_metadata(path, about, architecture=architecture, rank=rank, alpha=alpha or rank)
    write_tensors(path, found, metadata=full)


def write_lora(
    path: str | Path,
    pairs: Mapping[str, LoraPair],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """A file in the sd-scripts dialect, its hashes included."""
    write_tensors(path, MUSUBI.tensors(pairs, dtype=dtype), metadata={**metadata, **parts_entry(pairs)})


def kept(metadata: Mapping[str, str], *also: str) -> dict[str, str]:
    """A file's metadata for another file: without what describes its bytes, and without `also`."""
    return {key: value for key, value in metadata.items() if not key.startswith((*STALE, *also))}


def parts_entry(pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    """The metadata that lets a joined pair be cut into the very pairs that it was made of."""
    parts = {module: pair.parts for module, pair in pairs.items() if pair.parts}
    return {PARTS_KEY: json.dumps(parts)} if parts else {}


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str]
) -> None:
    """A file of any dialect, its hashes included, appearing under its name only when complete."""
    slots = file_order(tensors)
    with open_writer(path, slots, metadata={**metadata, **model_hashes(tensors, metadata)}) as writer:
        for name in writer.waiting:
            writer.write(name, tensors[name])


def check_output(output: str, *sources: str | Path) -> None:
    """Before long work: refuse a name that is no file's, an input's, or in a
    place that cannot be written to."""
    target = Path(output)
    if target.suffix != ".safetensors":
        raise ConfigError(f"--output {output}: expected a name that ends in .safetensors")
    if target.exists() and any(Path(source).exists() and target.samefile(source) for source in sources):
        raise ConfigError(f"--output {output} is the input; choose another name")
    if target.is_dir():
        raise ConfigError(f"--output {output} is a directory; name a file in it")
    check_place(target)
