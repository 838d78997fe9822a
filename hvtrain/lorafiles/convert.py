"""A LoRA in other programs' dialects. `read_lora` reads each of them back to the very same pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hvtrain.lorafiles.dialects import DIALECTS, Dialect, key_map, spread
from hvtrain.lorafiles.files import FOLDED_KEY, PARTS_KEY, RESCALED_KEY, LoraFile
from hvtrain.lorafiles.metadata import PEFT_KEY
from hvtrain.lorafiles.pairs import LoraPair, fold_alpha
from hvtrain.lorafiles.write import kept, parts_entry, write_tensors
from hvtrain.models.spec import ModelSpec


@dataclass(frozen=True)
class Converted:
    """A LoRA's tensors and metadata in some dialect, ready to be written."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def save(self, path: str | Path) -> None:
        write_tensors(path, self.tensors, metadata=self.metadata)


def converted(
    lora: LoraFile, spec: ModelSpec, to: Dialect, *, fold: bool | None = None, expert: int = 0
) -> Converted:
    """The layers and names of the dialect; in diffusers' q, k and v are apart.

    With `fold` (default: as the dialect likes it), alpha / rank is multiplied into the up-projection, which
    is exact where the scale is a power of two. `expert`: whose LoRA it is, of a model of several.
    """
    pairs = spread(lora.pairs, key_map(spec, spec.lora_keys.get(to.name, to.keys)))
    metadata = kept(lora.about_pairs, FOLDED_KEY, PEFT_KEY, PARTS_KEY) | parts_entry(pairs)
    if to.alpha == "rank" or (to.folds if fold is None else fold):
        metadata[FOLDED_KEY] = json.dumps(
            {name: pair.alpha for name, pair in pairs.items() if pair.scale != 1.0}
        )
        pairs = {name: fold_alpha(pair) for name, pair in pairs.items()}
    elif to.alpha == "metadata":
        metadata[PEFT_KEY] = json.dumps(
            {to.prefix(expert) + key: value for key, value in peft_config(pairs).items()}
        )
    return Converted(to.tensors(pairs, expert=expert), metadata)


def dora_for_comfyui(lora: LoraFile, weight: Callable[[str], torch.Tensor], *, expert: int = 0) -> Converted:
    """A DoRA for a program that divides by the lengths of the model's own rows, not of those with the LoRA
    added: what the latter come to is put into the lengths. `weight`: of a layer [out, in], float32."""
    dialect, lengths = DIALECTS["comfyui"], {}
    for name, pair in lora.pairs.items():
        if pair.magnitude is None:
            continue
        w = weight(name)
        whole = torch.linalg.vector_norm(w + pair.up.float() @ pair.down.float() * pair.scale, dim=1)
        ratio = torch.linalg.vector_norm(w, dim=1) / whole.clamp(min=1e-12)
        lengths[f"{dialect.prefix(expert)}{name}.dora_scale"] = (pair.magnitude.float() * ratio)[:, None]
    metadata = kept(lora.metadata, FOLDED_KEY, PEFT_KEY, PARTS_KEY) | {RESCALED_KEY: "comfyui"}
    return Converted(dialect.tensors(lora.pairs, expert=expert) | lengths, metadata)


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
