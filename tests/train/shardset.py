"""A small random shard set for the tiny flavor, and a config that trains on it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from hvtrain.config import TrainConfig, load
from hvtrain.models.spec import Flavor
from shards.schema import EMPTY_TEXT, Chunk, Made, Manifest, Stored, save_manifest
from shards.writer import write_tar
from tests.models.any_model import batch


def make_shards(
    root: Path, *, n: int = 10, poison: str | None = None, more: Sequence[str] = (),
    encoders: Mapping[str, str] | None = None, seed: int = 1, scale: float = 1.0, word: int | None = None,
    words: str = "text",
) -> Path:
    """n samples; the one named `poison` has latents so large that no loss of them is finite. `more`:
    image, control, mask. `word`: all captions say nearly the same, each number another thing. `words`:
    the field of the captions' states."""
    g = torch.Generator().manual_seed(seed)
    keys = tuple(f"clip{i}" for i in range(n))
    latents = {k: (torch.randn(16, 2, 4, 4, generator=g) * scale).bfloat16() for k in keys}
    if poison:
        latents[poison] = torch.full_like(latents[poison], 3e38)
    text = {k: torch.randn(2 + i % 3, 64, generator=g) for i, k in enumerate(keys)}
    if word is not None:
        text = {
            k: torch.randn(3, 64, generator=torch.Generator().manual_seed(word)) + 0.1 * t[:1] for k,
            t in text.items()
        }
    tars = {
        "latents": write_tar(root, "latents/0.tar", [(k, {"latents": latents[k]}, {}) for k in keys]),
        "text": write_tar(
            root, "text/0.tar", [(k, {words: text[k], "pooled": torch.ones(64)}, {}) for k in keys]
        ),
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


def make_set(
    root: Path, flavor: Flavor, *, n: int = 16, without: Collection[str] = (), masked: bool = False
) -> Path:
    """n times the same random sample, as any flavor declares it; `masked`: with a mask, of
    which the first frame counts."""
    keys, columns = tuple(f"clip{i}" for i in range(n)), [c for c in flavor.columns if c not in without]
    x, cond = batch(flavor)
    fields = {
        c: {f.name: cond[f.name][0, :3].clone() for f in flavor.cond if f.column == c and f.ragged}
        for c in columns
    }
    for f in flavor.cond:
        if not f.ragged and f.column in fields:
            fields[f.column][f.name] = cond[f.name][0].clone()
    fields["latents"]["latents"] = x[0].clone()
    if masked:
        columns.append("mask")
        fields["mask"] = {
            "mask": (torch.arange(x.shape[2]) < 1).float().view(1, -1, 1, 1).expand(1, *x.shape[2:]).clone()
        }
    tars = {c: write_tar(root, f"{c}/0.tar", [(k, fields[c], {}) for k in keys]) for c in columns}
    stored = {f.name: Stored(f.dims, "float32") for f in flavor.cond}
    of = {
        c: Made(fields={n: stored.get(n, Stored(tuple(t.shape), "float32")) for n, t in fields[c].items()})
        for c in columns
    }
    latent = flavor.latent
    bucket = f"{2 * latent.stride_t + 1}x{2 * latent.unit[0]}x{3 * latent.unit[1]}"
    save_manifest(root, Manifest(tuple(tars), (Chunk(bucket, keys, tars),), of))
    empty = {
        n: torch.zeros_like(t[:1] if stored[n].dims[0] is None else t) for n, t in fields["text"].items()
    }
    save_file(empty, root / EMPTY_TEXT)
    return root


def config(shards: Path, output: Path, *overrides: str) -> TrainConfig:
    """A LoRA on the model that ships, plain PyTorch, float32, 6 steps."""
    return load(TrainConfig, None, [
        "model.dit=tiny:dit.safetensors", "model.dtype=float32", f"data.shards={shards}", "data.batch_size=2",
        "adapter.rank=4", "adapter.alpha=4", "run.precision=fp32", "run.recompute=none", "run.steps=6",
        "optim.lr=1e-3", "zero.engine=torch", f"run.output_dir={output}", *overrides,
    ])
