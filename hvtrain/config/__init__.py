"""Every setting of every command: frozen dataclasses with a docstring under each field. No torch."""

from __future__ import annotations

from hvtrain.config.encode import EncodeConfig
from hvtrain.config.generate import GenerateConfig, LoraFileConfig, SampledLora
from hvtrain.config.load import build, dump, load, reference, to_dict
from hvtrain.config.merge import MergeConfig, ReconcileConfig
from hvtrain.config.model import DType, ModelConfig, ParallelConfig, VaeTilingConfig, asset
from hvtrain.config.sampling import Sampling
from hvtrain.config.sparse import SparseConfig
from hvtrain.config.train import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    FlowConfig,
    OptimConfig,
    PreviewConfig,
    RunSettings,
    SamplePrompt,
    ShardsConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "ROOTS",
    "AdapterConfig",
    "DType",
    "DataConfig",
    "EncodeConfig",
    "EvalConfig",
    "FlowConfig",
    "GenerateConfig",
    "LoraFileConfig",
    "MergeConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PreviewConfig",
    "ReconcileConfig",
    "RunSettings",
    "SamplePrompt",
    "SampledLora",
    "Sampling",
    "ShardsConfig",
    "SparseConfig",
    "TrainConfig",
    "VaeTilingConfig",
    "ZeroConfig",
    "asset",
    "build",
    "dump",
    "load",
    "reference",
    "to_dict",
]

ROOTS: dict[str, type] = {
    "train": TrainConfig, "encode": EncodeConfig, "generate": GenerateConfig, "merge": MergeConfig,
}
