"""`hvtrain merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvtrain.config.generate import LoraFileConfig
from hvtrain.config.model import DType


@dataclass(frozen=True)
class MergeConfig:
    """`hvtrain merge`: LoRAs into a DiT file, or into one LoRA."""

    dit: str = ""
    """The model: a file, a sharded index or a directory; for target lora it may be left out"""
    lora: tuple[LoraFileConfig, ...] = ()
    """LoRA files, or directories of finished runs"""
    plan: str | None = None
    """plan.json: all slices of it are merged"""
    slices: str | None = None
    """Directory with the slices' runs, 01, 02, ...; null: the plan's own"""
    allow_missing: bool = False
    """Merge the finished slices of a plan, though some are not there"""
    any_base: bool = False
    """Accept LoRAs that were trained on other weights"""
    output: str = ""
    """The safetensors file to write; a directory for a sharded model"""
    target: Literal["model", "lora"] = "model"
    """model: into the weights; lora: one LoRA of all"""
    rank: int | None = None
    """For target lora: cut every layer to this rank; null: ranks add up"""
    on_overlap: str = "error"
    """Where LoRAs change the same rows: error, sum, average, ties, dare, orthogonal or priority (the first given wins)"""
    density: float | None = None
    """For ties and dare: the share of elements that is kept; null: 0.2 and 0.5"""
    seed: int = 0
    """For dare"""
    dtype: DType | None = None
    """Dtype of the merged tensors; null: each keeps its own"""
    max_shard_gb: float | None = None
    """Cut the merged model into files of at most so many GB (output is then a directory); null: as the input"""
    device: str = "cpu"
    """Where sums are computed: cpu or cuda"""
    evaluate: tuple[str, ...] = ()
    """Shard sets: report the held-out loss of the base, of each LoRA alone and of the merge"""
    model: str | None = None
    """Architecture; null reads it from the file"""
    flavor: str | None = None
    """Flavor of the architecture, for evaluate; null reads it from the file"""
