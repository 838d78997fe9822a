"""Which model, its files, and how ranks share one sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class VaeTilingConfig:
    """How the VAE cuts large videos."""

    enabled: bool = True
    """Encode and decode in overlapping tiles where a video is larger than one"""
    spatial: int = 256
    """Tile height and width in pixels"""
    temporal: int = 64
    """Tile length in frames"""
    slicing: bool = False
    """One video of a batch at a time"""


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and where its files are. `tiny:` names the files that ship with hvtrain."""

    name: str = "hunyuan-video"
    """Architecture; `hvtrain models` lists them"""
    flavor: str | None = None
    """Flavor of the architecture; null reads it from the DiT file"""
    dit: str | None = None
    """DiT weights: .safetensors, .pt, a sharded index or a directory; null in training starts from scratch"""
    vae: str | None = None
    """VAE weights: file or diffusers directory"""
    llm: str | None = None
    """LLM text encoder: HF directory or single file"""
    llm_tokenizer: str | None = None
    """Tokenizer directory of the LLM; null takes the encoder's own directory"""
    clip: str | None = None
    """CLIP text encoder: HF directory or single file"""
    clip_tokenizer: str | None = None
    """Tokenizer directory of CLIP; null takes the encoder's own directory"""
    dtype: DType = "bfloat16"
    """Dtype of the frozen DiT weights and of the text encoders"""
    quantize: Literal["none", "fp8", "fp8_scaled"] = "none"
    """Hold the DiT's frozen Linear weights in float8: fp8 casts, fp8_scaled keeps a factor for every 64 values; a file that
    is float8 already keeps its own values"""
    fp8_matmul: bool = True
    """With quantize, multiply in float8 where the GPU can (not for fp8_scaled's factors); false dequantises everywhere"""
    vae_dtype: DType = "float16"
    """Dtype of the VAE"""
    fp8_llm: bool = False
    """Hold the LLM's linear weights in float8"""
    vae_tiling: VaeTilingConfig = field(default_factory=VaeTilingConfig)
    """Tiling of the VAE"""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share one sample; the ranks left over are data parallel."""

    ulysses: int = 1
    """Ulysses degree: ranks that share the attention heads"""
    ring: int = 1
    """Ring degree: ranks that pass keys and values around"""
    kernel: str = "auto"
    """Attention kernel: auto, sdpa, flash2, flash3, sage (sampling only) or xfuser (sampling on several GPUs only)"""
