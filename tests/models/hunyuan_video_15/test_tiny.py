"""The tiny HunyuanVideo 1.5 that ships: its files are what the recipes make, and it
draws what it is told and shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import EncodeConfig, GenerateConfig, TrainConfig, asset, load
from hvtrain.generate import run as generate
from hvtrain.models import find
from hvtrain.models.hunyuan_video_15.text import TEMPLATE, open_text
from hvtrain.models.hunyuan_video_15.tiny import WIDTHS
from hvtrain.models.hunyuan_video_15.vision import open_vision
from hvtrain.models.load import identify
from hvtrain.tiny import clips
from hvtrain.tiny.score import draw_first, kept, look, read_video
from hvtrain.tiny.text import write_assets
from hvtrain.tiny.train_vae import VaeRecipe

CONFIGS = Path(__file__).parents[3] / "configs" / "tiny" / "hunyuan_video_15"
ASSETS = Path(asset("tiny:hunyuan_video_15"))
PARTS = {name: str(ASSETS / name) for name in ("llm", "byt5", "siglip")}


def test_the_recipe_makes_the_shipped_encoders(tmp_path: Path) -> None:
    write_assets("hunyuan-video-15", tmp_path)
    for name in PARTS:
        new, old = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, ASSETS))
        assert new.keys() == old.keys() and sorted(p.name for p in (tmp_path / name).iterdir()) == sorted(
            p.name for p in (ASSETS / name).iterdir()
        )
        for key in new:  # to the last bit of half precision: a normal draw's logarithm differs between CPUs
            torch.testing.assert_close(new[key], old[key], rtol=2e-3, atol=1e-6)
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 8_000_000


def test_words_and_pictures_are_told_apart() -> None:
    text, sight = open_text(PARTS, dtype=torch.float32), open_vision(PARTS)
    words = text.tokenizer.tokenizer.encode(TEMPLATE.format("a Red circle")).tokens[text.tokenizer.crop :]
    assert words == ["Ġa", "Ġred", "Ġcircle", "<|im_end|>", "\n", "<|im_start|>", "Ġassistant", "\n"]
    assert text.tokenizer.crop == 9  # the instruction is one token
    plain, quoting = text.encode(["a red circle", 'a sign "hi"'])
    assert (
        plain["text"].shape == (8, 64) and plain["glyph"].shape == (0, 32)
        and quoting["glyph"].shape == (12, 32)
    )
    states = [state["text"] for state in text.encode([f"a {color} circle" for color in clips.COLORS])]
    away = torch.pdist(torch.stack([state[1] for state in states]))
    # the colour, the same shape
    assert away.min() > 5 * torch.pdist(torch.stack([state[2] for state in states])).max() > 0
    drawn = [clips.render(clips.Drawing(color, "circle", "left", "gray"))[0] for color in clips.COLORS]
    pictures = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1 for picture in drawn])
    seen = torch.stack([one["vision"] for one in sight.encode(pictures)])
    assert seen.shape == (6, 16, 48) and torch.pdist(seen.flatten(1)).min() > 1


def test_it_draws_what_it_is_told_and_moves_what_it_is_shown(tmp_path: Path) -> None:
    """Two prompts of the held-out ones, then the same with first frames, by the same weights."""
    _, held = clips.combinations()
    told = [clips.Drawing(*held[i], "gray", seed=i) for i in (0, 13)]
    assert told[0].motion != told[1].motion
    pictures = draw_first(told, tmp_path)
    for config, given in (
        ("generate", ["", ""]), ("generate_image", [f" --i {picture}" for picture in pictures])
    ):
        (tmp_path / "prompts.txt").write_text(
            "".join(f"{clip.caption}{more}\n" for clip, more in zip(told, given))
        )
        keys = [f"prompt_file={tmp_path}/prompts.txt", f"output={tmp_path / config}", "steps=10"]
        made = generate.run(load(GenerateConfig, CONFIGS / f"{config}.yaml", keys))
        seen = [look(read_video(path)) for path in made]
        assert [(s.color, s.motion) for s in seen] == [(clip.color, clip.motion) for clip in told], config
    assert min(map(kept, made, pictures)) >= 22


def test_its_configs_load_and_its_files_say_what_they_are() -> None:
    files = {
        "encode": EncodeConfig, "generate": GenerateConfig, "generate_image": GenerateConfig, "vae": VaeRecipe
    }
    found = {
        path.stem: load(files.get(path.stem, TrainConfig), path)
        for path in CONFIGS.glob("*.yaml") if path.stem != "model"
    }
    assert found.keys() == {"encode", "dit", "lora", "generate", "generate_image", "vae"}
    assert {
        stem for stem, cfg in found.items() if stem != "vae" and cfg.model.flavor == "tiny"
    } == {"generate"}
    assert (
        found["vae"].model == "hunyuan-video-15"
        and found["encode"].columns == ("latents", "image", "vision", "text")
    )
    flavors = find("hunyuan-video-15").flavors
    assert identify(ASSETS / "dit.safetensors").arch == flavors["tiny"].arch == flavors["tiny-i2v"].arch
    with pytest.raises(Exception, match="time_r_in|meanflow"):
        identify(ASSETS / "dit.safetensors", flavor="tiny-steps")


def test_a_new_vae_knows_colors_and_whitening_changes_no_picture() -> None:
    """Untrained, it gives back a colour; whitened, latents have mean 0, together
    deviation 1, and decode as they did."""
    vae = find("hunyuan-video-15").tiny().vae
    torch.manual_seed(0)
    network = vae.build(channels=WIDTHS, norm_groups=0, latent_channels=32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if re.search(vae.branches, name):
                parameter.zero_()
        red = torch.tensor([0.6, -0.5, -0.5]).view(1, 3, 1, 1, 1).expand(-1, -1, 9, 64, 64)
        back = vae.decode(network, vae.moments(network, red)[0])[:, :, 1:, 16:48, 16:48].mean((0, 2, 3, 4))
        assert (back - red[0, :, 0, 0, 0]).abs().max() < 0.25
        video = torch.from_numpy(
            clips.render(clips.training_clips(1, seed=0)[0])
        ).permute(3, 0, 1, 2)[None] / 127.5 - 1
        mean = vae.moments(network, video)[0]
        flat, picture = mean.transpose(0, 1).flatten(1), vae.decode(network, mean)
        vae.whiten(network, flat.mean(1), flat.std(1))
        after = vae.moments(network, video)[0]
        torch.testing.assert_close(vae.decode(network, after), picture, atol=1e-4, rtol=1e-4)
        assert after.mean((0, 2, 3, 4)).abs().max() < 1e-5
        assert (after * network.arch.scaling_factor).square().mean().sqrt() == pytest.approx(1, abs=0.02)
