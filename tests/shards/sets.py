"""Small shard sets for tests."""

import torch
from safetensors.torch import save_file

from shards import open_set
from shards.schema import EMPTY_TEXT, Chunk, Manifest, save_manifest
from shards.writer import write_tar


def make_set(root, *, sizes=((3, 5), (2, 4)), seed=0):
    """A set with one chunk per (samples, latent width)."""
    g = torch.Generator().manual_seed(seed)
    chunks = []
    for c, (n, width) in enumerate(sizes):
        keys = tuple(f"clip{c}_{i}" for i in range(n))
        latents = [
            (k, {"latents": torch.randn(2, 1, 2, width, generator=g).bfloat16()}, {"key": k}) for k in keys
        ]
        text = [(k, {"text": torch.randn(i + 1, 4, generator=g), "pooled": torch.ones(3)}, {"caption": k})
                for i, k in enumerate(keys)]
        tars = {
            name: write_tar(root, f"{name}/{c:06d}.tar", rows) for name,
            rows in (("latents", latents), ("text", text))
        }
        chunks.append(Chunk(f"1x2x{width}", keys, tars))
    save_file({"text": torch.zeros(1, 4), "pooled": torch.zeros(3)}, str(root / EMPTY_TEXT))
    save_manifest(root, Manifest(("latents", "text"), tuple(chunks)))
    return open_set(root)
