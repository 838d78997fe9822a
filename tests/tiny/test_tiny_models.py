"""The models that ship: they open, draw what they are told, and their recipes are exact where they say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvtrain.config import GenerateConfig, load
from hvtrain.generate import run as generate
from hvtrain.models import find
from hvtrain.tiny.clips import Drawing
from hvtrain.tiny.parts import ASSETS
from hvtrain.tiny.score import CONFIGS, look, read_video

SMALL = {"wan": (4, 8, 16, 16), "hunyuan-video": (4, 8, 8, 8)}  # widths of a VAE to try


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in (ASSETS / "wan").rglob("*") if path.is_file()) <= 8_000_000


@pytest.mark.parametrize("folder", ["wan"])
def test_it_draws_what_it_is_told(folder: str, tmp_path: Path) -> None:
    wanted = [Drawing("red", "circle", "left", "gray"), Drawing("cyan", "square", "down", "dark")]
    (tmp_path / "prompts.txt").write_text("".join(f"{clip.caption}\n" for clip in wanted))
    keys = [f"prompt_file={tmp_path / 'prompts.txt'}", f"output={tmp_path}"]
    files = generate.run(load(GenerateConfig, CONFIGS / folder / "generate.yaml", keys))
    seen = [look(read_video(path)) for path in files]
    assert [(one.color, one.motion) for one in seen] == [(clip.color, clip.motion) for clip in wanted]


@pytest.mark.parametrize("model", SMALL)
def test_whitening_changes_latents_and_no_picture(model: str, tmp_path: Path) -> None:
    """Scaled latents get mean 0 and deviation 1, and decode to what they did."""
    vae = find(model).tiny().vae
    torch.manual_seed(0)
    network = vae.build(channels=SMALL[model], norm_groups=4, latent_channels=16)
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = vae.moments(network, video)[0]
        flat, picture = mean.transpose(0, 1).flatten(1), vae.decode(network, mean)
        vae.whiten(network, flat.mean(1), flat.std(1))
        torch.testing.assert_close(
            vae.decode(network, vae.moments(network, video)[0]), picture, atol=1e-4, rtol=1e-4
        )
    vae.save(network, str(tmp_path / "vae.safetensors"))
    latents = find(model).open_vae(tmp_path / "vae.safetensors", dtype=torch.float32).encode(video)
    latents = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(16), atol=0.02, rtol=0)
