"""The LoRAs of a generation: files, and slices of a sliced run by their LORAID."""

from __future__ import annotations

import math
from pathlib import Path

from hvtrain.config import GenerateConfig, asset
from hvtrain.errors import ConfigError
from hvtrain.lorafiles.dialects import Shapes
from hvtrain.lorafiles.files import LoraFile, read_lora
from hvtrain.lorafiles.overlap import by_layer, overlaps
from hvtrain.lorafiles.runs import finished
from hvtrain.lorafiles.tools import blocks
from hvtrain.models.spec import ModelSpec


def open_loras(cfg: GenerateConfig, shapes: Shapes, spec: ModelSpec, *, quiet: bool = False) -> list[tuple[LoraFile, float]]:
    """Read them, and say which blocks each holds and whether any two change the same rows."""
    wanted = [(asset(lora.path), lora.multiplier) for lora in cfg.lora] + _slices(cfg)
    for path, multiplier in wanted:
        if not math.isfinite(multiplier):
            raise ConfigError(f"the multiplier of {path} is {multiplier}, expected a finite number; 0 switches it off")
    loras = [(read_lora(path, shapes, spec=spec), multiplier) for path, multiplier in wanted]
    if not quiet:
        for lora, multiplier in loras:
            name = f"LORAID {lora.metadata['ss_loraid']}, " if lora.metadata.get("ss_loraid") else ""
            off = " (off)" if multiplier == 0 else ""
            print(f"{lora.summary()}, times {multiplier:g}{off}; {name}{blocks(lora.pairs)}", flush=True)
        if len(loras) > 1:
            shared = sum(o.n_rows for o in overlaps(by_layer(loras)))
            print(f"{shared} rows are changed by more than one" if shared else "no two change the same rows", flush=True)
    return loras


def _slices(cfg: GenerateConfig) -> list[tuple[str, float]]:
    if cfg.slices is None:
        return []
    folder = Path(cfg.slices)
    runs = {int(p.name): p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.isdigit()}
    ids = cfg.loraid or tuple(runs)
    unknown = [i for i in ids if i not in runs]
    if not runs or unknown:
        found = ", ".join(map(str, runs)) or "none"
        raise ConfigError(f"loraid: {folder} has no slice {unknown[0] if unknown else ''}; found {found}")
    factors = cfg.lora_multiplier or (1.0,)
    if len(factors) == 1:
        factors = factors * len(ids)
    chosen = []
    for i, factor in zip(ids, factors, strict=True):
        path = finished(runs[i])
        if isinstance(path, str):
            raise ConfigError(f"loraid: slice {i} cannot be applied: {path}")
        chosen.append((str(path), factor))
    return chosen
