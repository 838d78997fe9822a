"""`hvtrain generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hvtrain.config.model import ModelConfig, ParallelConfig
from hvtrain.config.sampling import Sampling
from hvtrain.config.sparse import SparseConfig


@dataclass(frozen=True)
class LoraFileConfig:
    """A LoRA to apply."""

    path: str = ""
    """LoRA file"""
    multiplier: float = 1.0
    """How strongly"""


@dataclass(frozen=True)
class SampledLora(LoraFileConfig):
    """A LoRA to sample with."""

    expert: str | None = None
    """Which expert of the flavor it changes; null: the one that its metadata names, else all of them"""


@dataclass(frozen=True)
class GenerateConfig(Sampling):
    """`hvtrain generate`: videos from prompts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model"""
    prompt: str | None = None
    """What to show; or give prompt_file"""
    prompt_file: str | None = None
    """A text file with one prompt a line, which may end with options of its own: `a cat --w 640 --h 368 --d
    7`; or YAML, a list of prompts with keys of their own: `- {prompt: a cat, seed: 7}`"""
    output: str = ""
    """The .mp4 file (or .png, for frames=1); a directory with prompt_file, and
    without it a file is named in one"""
    batch_size: int = 1
    """Prompts sampled together"""
    decode: Literal["each", "last"] = "each"
    """each: decode a video when it is sampled, with the DiT still on the GPU if both fit; last:
    sample all, then decode all"""
    save_latents: bool = False
    """Keep the latents of each video beside it, as NAME.latents.safetensors"""
    lora: tuple[SampledLora, ...] = ()
    """LoRAs to apply; multiplier 0 switches one off completely"""
    slices: str | None = None
    """A sliced run: the directory that holds 01, 02, ... of `hvtrain slices run`"""
    loraid: tuple[int, ...] = ()
    """Which of its slices to apply; none: all"""
    lora_multiplier: tuple[float, ...] = ()
    """One for each of them in order, or one for all; none: 1.0"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share one video"""
    sparse: SparseConfig = field(default_factory=SparseConfig)
    """Attention that leaves out pairs of tokens; NOT exact"""
    blocks_to_swap: int = 0
    """Keep the weights of so many blocks in host memory and bring each when it is computed"""
    shard_weights: bool = False
    """Cut the blocks' weights over the ranks that share a video (parallel), and gather
    each block when it is computed"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast"""
