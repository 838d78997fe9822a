"""A LoRA in other programs' dialects. `read_lora` reads each of them back to the very same pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hvtrain.lorafiles.dialects import key_map, spread
from hvtrain.lorafiles.files import (
    FOLDED_KEY,
    PARTS_KEY,
    STALE,
    LoraFile,
    parts_entry,
    sd_scripts_tensors,
    write_tensors,
)
from hvtrain.lorafiles.metadata import PEFT_KEY
from hvtrain.lorafiles.pairs import LoraPair, fold_alpha
from hvtrain.models.spec import ModelSpec


@dataclass(frozen=True)
class Converted:
    """A LoRA's tensors and metadata in some dialect, ready to be written."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def save(self, path: str | Path) -> None:
        write_tensors(path, self.tensors, metadata=self.metadata)


def to_diffusers(lora: LoraFile, spec: ModelSpec, *, fold: bool = True) -> Converted:
    """The layers and names of the diffusers model, `transformer.X.lora_A.weight`: q, k and v apart.

    With `fold`, alpha / rank is multiplied into lora_B, which every version of diffusers loads rightly; that is exact
    where the scale is a power of two. Without, alpha is kept in the file's PEFT metadata (diffusers >= 0.34 reads it;
    for a dict of tensors, pass it to `load_lora_adapter(metadata=...)`).
    """
    pairs = spread(lora.pairs, key_map(spec, "diffusers"))
    metadata = _kept(lora)
    if fold:
        metadata[FOLDED_KEY] = json.dumps({name: pair.alpha for name, pair in pairs.items() if pair.scale != 1.0})
        pairs = {name: fold_alpha(pair) for name, pair in pairs.items()}
    else:
        config = {f"transformer.{key}": value for key, value in peft_config(pairs).items()}
        metadata[PEFT_KEY] = json.dumps(config)
    return Converted(_tensors("transformer.", pairs), metadata)


def to_comfy(lora: LoraFile, *, fold: bool = False) -> Converted:
    """`diffusion_model.` + official names: ComfyUI and diffusers' converter read it."""
    pairs, metadata = _folded(lora) if fold else (lora.pairs, {})
    tensors = _tensors("diffusion_model.", pairs)
    for name, pair in pairs.items():
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(pair.alpha))
    return Converted(tensors, {**_kept(lora), **metadata, **parts_entry(lora.pairs)})


def to_diffusion_pipe(lora: LoraFile) -> Converted:
    """`diffusion_model.` + official names without alpha, which that program takes to be the rank: it is always folded."""
    pairs, metadata = _folded(lora)
    return Converted(_tensors("diffusion_model.", pairs), {**_kept(lora), **metadata, **parts_entry(lora.pairs)})


def to_musubi(lora: LoraFile, *, fold: bool = False) -> Converted:
    """`lora_unet_` + official names with underscores: sd-scripts, musubi-tuner, and what hvtrain trains."""
    pairs, metadata = _folded(lora) if fold else (lora.pairs, {})
    return Converted(sd_scripts_tensors(pairs), {**_kept(lora), **metadata, **parts_entry(lora.pairs)})


def _folded(lora: LoraFile) -> tuple[dict[str, LoraPair], dict[str, str]]:
    """Pairs with a scale of 1, and the metadata by which `read_lora` undoes it."""
    alphas = {name: pair.alpha for name, pair in lora.pairs.items() if pair.scale != 1.0}
    return {name: fold_alpha(pair) for name, pair in lora.pairs.items()}, {FOLDED_KEY: json.dumps(alphas)}


def peft_config(pairs: Mapping[str, LoraPair]) -> dict[str, object]:
    """The LoraConfig arguments that give these pairs their ranks and alphas."""
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {f"^{name}": pair.alpha for name, pair in pairs.items() if pair.alpha != alpha},
        "target_modules": list(pairs),
    }


def _tensors(prefix: str, pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    out = {}
    for name, pair in pairs.items():
        out[f"{prefix}{name}.lora_A.weight"] = pair.down
        out[f"{prefix}{name}.lora_B.weight"] = pair.up
    return out


def _kept(lora: LoraFile) -> dict[str, str]:
    """The file's metadata without what describes the old tensors' names and bytes."""
    stale = (*STALE, FOLDED_KEY, PEFT_KEY, PARTS_KEY)
    return {key: value for key, value in lora.metadata.items() if not key.startswith(stale)}
