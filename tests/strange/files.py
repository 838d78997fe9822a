"""What the strange architecture is made of, as files; clips that it is trained on; and the
command line in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from hvtrain.models import find
from hvtrain.models.load import save_dit
from hvtrain.rng import generator
from hvtrain.tiny.data import ClipsRecipe, write_clips
from launcher import cli
from tests.models.any_model import random_model
from tests.parallel.ranks import run_ranks

NAME = "strange"


def hvtrain(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def on_two_ranks(*arguments: object) -> list[int]:
    """The exit codes of the command's two processes, which need not import torch as `launch`'s would."""
    return run_ranks(2, hvtrain, *map(str, arguments))


def write_parts(folder: Path) -> Path:
    """Every file of every flavor, and configs/model.yaml that names those beside the DiT."""
    spec = find(NAME)
    parts = sys.modules[f"hvtrain.models.{NAME}.parts"]
    folder.mkdir(parents=True, exist_ok=True)
    draw = generator(0, stream="parts")
    mix, _ = torch.linalg.qr(torch.randn(parts.CHANNELS, parts.CHANNELS, generator=draw))
    save_file({f"{NAME}_vae.mix": mix.contiguous()}, folder / "vae.safetensors")
    for name, shape in parts.TABLES.items():
        save_file({f"{NAME}_{name}": torch.randn(shape, generator=draw)}, folder / f"{name}.safetensors")
    save_file({f"{NAME}_eye": torch.randn(parts.EYE, generator=draw)}, folder / "eye.safetensors")
    for flavor in spec.flavors.values():
        for expert in flavor.experts or (None,):
            model = random_model(spec, flavor)
            if expert is not None and expert.part != "dit":
                for p in model.parameters():
                    p.data.mul_(0.9)
            name = flavor.name if expert is None else f"{flavor.name}-{expert.name}"
            save_dit(model, folder / f"{name}.safetensors", spec=spec, flavor=flavor)
    others = {name: str(folder / f"{name}.safetensors") for name in ("vae", *parts.TABLES, "eye")}
    config = {"model": {"name": NAME, "dtype": "float32", "vae_dtype": "float32", **others}}
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_data(folder: Path, *, n: int, seed: int) -> Path:
    """Clips of 64 x 64; the captions of half of them quote something."""
    dataset = write_clips(ClipsRecipe(output=str(folder), n=n, seed=seed))
    for i, caption in enumerate(sorted(folder.glob("*.txt"))):
        if i % 2:
            caption.write_text(f'{caption.read_text().strip()}, and it says "number {i}"\n')
    return dataset
