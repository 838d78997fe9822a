"""`hvtrain merge`."""

from __future__ import annotations

from dataclasses import dataclass

from hvtrain.config.generate import LoraFileConfig
from hvtrain.config.model import DType


@dataclass(frozen=True)
class MergeConfig:
    """`hvtrain merge`: LoRAs into a DiT file."""

    dit: str = ""
    """The model: a file, a sharded index or a directory"""
    lora: tuple[LoraFileConfig, ...] = ()
    """What to add"""
    output: str = ""
    """The safetensors file to write"""
    dtype: DType | None = None
    """Dtype of the merged tensors; null: each keeps its own"""
    model: str | None = None
    """Architecture; null reads it from the file"""
