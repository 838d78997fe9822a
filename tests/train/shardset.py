"""A small random shard set for the tiny flavor, and a config that trains on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from hvtrain.config import TrainConfig, load
from shards.schema import EMPTY_TEXT, Chunk, Made, Manifest, Stored, save_manifest
from shards.writer import write_tar


def make_shards(
    root: Path, *, n: int = 10, poison: str | None = None, more: Sequence[str] = (), encoders: Mapping[str, str] | None = None,
    seed: int = 1, scale: float = 1.0, word: int | None = None, words: str = "text",
) -> Path:
    """n samples; the one named `poison` has latents so large that no loss of them is finite. `more`: image, control, mask.
    `word`: all captions say nearly the same, each number another thing. `words`: the field of the captions' states."""
    g = torch.Generator().manual_seed(seed)
    keys = tuple(f"clip{i}" for i in range(n))
    latents = {k: (torch.randn(16, 2, 4, 4, generator=g) * scale).bfloat16() for k in keys}
    if poison:
        latents[poison] = torch.full_like(latents[poison], 3e38)
    text = {k: torch.randn(2 + i % 3, 64, generator=g) for i, k in enumerate(keys)}
    if word is not None:
        text = {k: torch.randn(3, 64, generator=torch.Generator().manual_seed(word)) + 0.1 * t[:1] for k, t in text.items()}
    tars = {
        "latents": write_tar(root, "latents/0.tar", [(k, {"latents": latents[k]}, {}) for k in keys]),
        "text": write_tar(root, "text/0.tar", [(k, {words: text[k], "pooled": torch.ones(64)}, {}) for k in keys]),
    }
    for column in more:
        if column == "mask":  # the left half of each frame
            left = (torch.arange(4) < 2).float().expand(1, 2, 4, 4)
            tars[column] = write_tar(root, "mask/0.tar", [(k, {"mask": left.clone()}, {}) for k in keys])
            continue
        rows = [(k, {f"{column}_latents": latents[k][:, :1].clone()}, {}) for k in keys]
        tars[column] = write_tar(root, f"{column}/0.tar", rows)
    made = {column: Made(name) for column, name in (encoders or {}).items()}
    if words != "text":
        made["text"] = Made(fields={words: Stored((None, 64), "float32"), "pooled": Stored((64,), "float32")})
    save_manifest(root, Manifest(tuple(tars), (Chunk("5x32x32", keys, tars),), made))
    save_file({words: torch.zeros(1, 64), "pooled": torch.zeros(64)}, str(root / EMPTY_TEXT))
    return root


def config(shards: Path, output: Path, *overrides: str) -> TrainConfig:
    """A LoRA on the model that ships, plain PyTorch, float32, 6 steps."""
    return load(TrainConfig, None, [
        "model.dit=tiny:dit.safetensors", "model.dtype=float32", f"data.shards={shards}", "data.batch_size=2",
        "adapter.rank=4", "adapter.alpha=4", "run.precision=fp32", "run.recompute=none", "run.steps=6", "optim.lr=1e-3",
        "zero.engine=torch", f"run.output_dir={output}", *overrides,
    ])
