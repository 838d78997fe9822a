"""The latent upsamplers against the official implementation's references."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hvtrain.errors import CheckpointError
from hvtrain.models.hunyuan_video_15.upsample import To720p, To1080p, open_upsampler
from tests.oracles.check import errors

DATA = Path(__file__).parents[2] / "data"
KINDS = {"720p": To720p, "1080p": To1080p}


def reference(which: str) -> tuple[dict, dict]:
    with safe_open(DATA / f"hunyuan_video_15_upsampler_{which}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


def written(which: str, folder: Path, **config: object) -> Path:
    tensors, _ = reference(which)
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("which", KINDS)
def test_equals_the_official_implementation(which, tmp_path):
    found = errors(str(DATA / f"hunyuan_video_15_upsampler_{which}.safetensors"))
    assert len(found) == (4 if which == "1080p" else 3)
    assert max(found.values()) < 1e-5
    # And opened from a file, at the given size and at a larger one.
    tensors, config = reference(which)
    upsampler = open_upsampler(written(which, tmp_path))
    assert isinstance(upsampler.model, KINDS[which]) and upsampler.fingerprint
    x = tensors["input.x"]
    torch.testing.assert_close(upsampler(x, (6, 8)), tensors["output"])
    assert upsampler(x.bfloat16(), (9, 12)).dtype == torch.float32
    if which == "1080p":
        torch.testing.assert_close(upsampler(x, tuple(config["target_shape"])), tensors["output.resized"])


def test_the_whole_may_be_added(tmp_path):
    """Which no weight shows: the config beside it says it."""
    x = reference("720p")[0]["input.x"]
    plain = open_upsampler(written("720p", tmp_path))(x, (6, 8))
    added = open_upsampler(written("720p", tmp_path, global_residual=True))(x, (6, 8))
    torch.testing.assert_close(added, plain + x)


def test_other_files_are_refused(tmp_path):
    save_file({"encoder.x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match="x.safetensors: not a latent upsampler: no 'conv_in.conv.weight' in it"
    ):
        open_upsampler(tmp_path / "x.safetensors")
    save_file({"conv_in.conv.weight": torch.zeros(2, 2, 3, 3, 3)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="no 'up.0.block.0.conv1.conv.weight' in it"):
        open_upsampler(tmp_path / "y.safetensors")
