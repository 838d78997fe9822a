"""Which model, its files, and how ranks share one sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from hvtrain.config.parts import list_of
from hvtrain.errors import ConfigError, suggest

TINY = "tiny:"
BOTH = "both"  # of the experts; however many there are
EXPERT = "{expert}"  # in a path: an expert's name
DType = Literal["bfloat16", "float16", "float32"]


def asset(path: str) -> str:
    """`tiny:NAME` is a file of the models that ship with the package; anything else stays as it is."""
    if not path.startswith(TINY):
        return path
    return str(Path(__file__).parents[1] / "tiny" / "assets" / path[len(TINY):])


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
    experts: str | None = None
    """In training, of a flavor that is made of several DiTs: which one is trained, on its own noise levels,
    or both, in turns; the files are the parts that `hvtrain models` names"""
    vae: str | None = None
    """VAE weights: file or diffusers directory"""
    parts: Mapping[str, str] = field(default_factory=dict)
    """The model's other files by name, text encoders first of all; `hvtrain models` lists each model's.
    model.NAME is short for model.parts.NAME"""
    dtype: DType = "bfloat16"
    """Dtype of the frozen DiT weights and of the text encoders"""
    quantize: Literal["none", "fp8", "fp8_scaled"] = "none"
    """Hold the DiT's frozen Linear weights in float8: fp8 casts, fp8_scaled keeps a factor for every 64
    values; a file that is float8 already keeps its own values"""
    fp8_matmul: Literal["auto", True, False] = "auto"
    """With quantize, multiply in float8, which rounds activations and gradients too: auto where that is
    measured to be faster on this GPU, true wherever a layer's sizes and factors let it, false nowhere. Layers
    with a factor for every 64 values (fp8_scaled) are always dequantised"""
    vae_dtype: DType = "float16"
    """Dtype of the VAE"""
    fp8_text: bool = False
    """Hold the linear weights of a large text encoder in float8"""
    vae_tiling: VaeTilingConfig = field(default_factory=VaeTilingConfig)
    """Tiling of the VAE"""

    REST: ClassVar[str] = "parts"  # takes the keys that are none of these; see load.build

    def __post_init__(self) -> None:
        known = list_of(self.name).parts
        for name in self.parts:
            if name not in known or name in ("dit", "vae"):
                keys = [*(f.name for f in fields(self)), *known]
                raise ConfigError(f"unknown key 'model.{name}'; {suggest(name, keys)}")

    @staticmethod
    def renamed(raw: Mapping) -> Mapping[str, str]:
        """What keys of older configs are called now."""
        name = raw.get("name", ModelConfig.name)
        name = getattr(name, "value", name)
        own = list_of(name).renamed if isinstance(name, str) else {}  # another kind of value is refused soon
        return {"expert": "experts", **own}

    def file(self, name: str) -> str | None:
        """A part's path as it is in the config; None: not given."""
        return {"dit": self.dit, "vae": self.vae, **self.parts}.get(name)

    @property
    def files(self) -> dict[str, str]:
        """Where the parts besides `dit` and `vae` are, `tiny:` names resolved."""
        return {name: asset(path) for name, path in self.parts.items()}


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share one sample; the ranks left over are data parallel."""

    ulysses: int = 1
    """Ulysses degree: ranks that share the attention heads"""
    ring: int = 1
    """Ring degree: ranks that pass keys and values around"""
    kernel: str = "auto"
    """Attention kernel: auto, sdpa, cudnn, flash2, flash3, flash4, on CPUs onednn, or for sampling alone sage
    and, on several GPUs, xfuser"""
