"""`hvtrain encode`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvtrain.config.model import DType, ModelConfig


@dataclass(frozen=True)
class EncodeConfig:
    """`hvtrain encode`: clips and captions into shards."""

    dataset: str = ""
    """Dataset file (TOML or YAML)"""
    output: str = ""
    """Directory of the shard set; a re-run continues it"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The VAE and text encoders"""
    columns: tuple[str, ...] = ("latents", "text")
    """What to encode: latents, text, image (for image to video), control, and columns of the model's
    own; together or one by one"""
    batch_size: int = 1
    """Clips of one shape that go through the VAE together"""
    dtype: DType = "bfloat16"
    """Dtype of the stored tensors"""
    samples_per_tar: int = 512
    """Samples of a tar at most; a small bucket is cut into up to 8 tars, so that several processes share
    it"""
    workers: int = 2
    """Decoding threads"""
    seed: int = 0
    """Seed of the posterior samples"""
    strict: bool = False
    """Stop at the first clip that cannot be used; otherwise it is listed in rejected.jsonl"""
