"""`hvtrain generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hvtrain.config.model import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class LoraFileConfig:
    """A LoRA to apply."""

    path: str = ""
    """LoRA file"""
    multiplier: float = 1.0
    """How strongly"""


@dataclass(frozen=True)
class GenerateConfig:
    """`hvtrain generate`: videos from prompts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model"""
    prompt: str | None = None
    """What to show; or give prompt_file"""
    prompt_file: str | None = None
    """A text file with one prompt a line"""
    output: str = ""
    """The .mp4 file (or .png, for frames=1); a directory with prompt_file, and without it a file is named in one"""
    width: int | None = None
    """Pixels, a multiple of 16; null: the flavor's own"""
    height: int | None = None
    """Pixels, a multiple of 16"""
    frames: int | None = None
    """4n + 1"""
    fps: int | None = None
    """Frames a second of the file"""
    steps: int | None = None
    """Sampling steps"""
    seed: int = 0
    """Seed of the noise; with prompt_file, line i takes seed + i"""
    shift: float | None = None
    """Shift of the sigma schedule"""
    guidance: float | None = None
    """Embedded guidance"""
    cfg_scale: float | None = None
    """True classifier-free guidance: 1 is off, above costs a second forward pass"""
    negative_prompt: str | None = None
    """What not to show, for cfg_scale above 1"""
    batch_size: int = 1
    """Prompts sampled together"""
    decode: Literal["each", "last"] = "each"
    """each: decode a video when it is sampled, with the DiT still on the GPU if both fit; last: sample all, then decode all"""
    save_latents: bool = False
    """Keep the latents of each video beside it, as NAME.latents.safetensors"""
    lora: tuple[LoraFileConfig, ...] = ()
    """LoRAs to apply; multiplier 0 switches one off completely"""
    slices: str | None = None
    """A sliced run: the directory that holds 01, 02, ... of `hvtrain slices run`"""
    loraid: tuple[int, ...] = ()
    """Which of its slices to apply; none: all"""
    lora_multiplier: tuple[float, ...] = ()
    """One for each of them in order, or one for all; none: 1.0"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share one video"""
    blocks_to_swap: int = 0
    """Keep the weights of so many blocks in host memory and bring each when it is computed"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast"""
