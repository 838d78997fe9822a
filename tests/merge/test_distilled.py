"""LoRAs that step distillation made: pairs, and differences of norms, biases, modulation
and layers outside the blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes, merging
from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.whole import editing, summed
from hvtrain.models import find
from hvtrain.models.load import load_dit, save_dit
from launcher import cli
from tests.models.test_wan import ARCH, I2V, build

SPEC = find("wan")
LAYER, NORM, BIAS, HEAD = (
    "blocks.1.cross_attn.q", "blocks.0.norm3.weight", "blocks.1.ffn.0.bias", "head.head.weight"
)
BLOCK, LAST = "blocks.1.modulation", "head.modulation"


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    save_dit(build(), tmp_path / "dit.safetensors", spec=SPEC, flavor=SPEC.fitted(SPEC.flavor("tiny"), ARCH))
    return tmp_path / "dit.safetensors"


def distilled(
    path: Path, *, more: dict[str, torch.Tensor] | None = None, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """What it adds to each tensor, and the file under ComfyUI's names."""
    draw, state = torch.Generator().manual_seed(1), build().state_dict()
    added = {
        name: scale * torch.randn(state[name].shape, generator=draw)
        for name in (NORM, BIAS, HEAD, BLOCK, LAST)
    }
    down, up = torch.randn(2, 72, generator=draw), torch.randn(72, 2, generator=draw)
    tensors = {
        f"diffusion_model.{LAYER}.lora_A.weight": down, f"diffusion_model.{LAYER}.lora_B.weight": up,
        "diffusion_model.blocks.0.norm3.diff": added[NORM],
        "diffusion_model.blocks.1.ffn.0.diff_b": added[BIAS], "diffusion_model.blocks.1.diff_m": added[BLOCK],
        "diffusion_model.head.diff_m": added[LAST], "diffusion_model.head.head.diff": added[HEAD],
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(7),
    }
    save_file({**tensors, **(more or {})}, path)
    return {**added, f"{LAYER}.weight": up @ down}


def a_pair(layer: str) -> dict[str, torch.Tensor]:
    shapes = {"A": (2, 72), "B": (72, 2)}
    return {f"diffusion_model.{layer}.lora_{end}.weight": torch.ones(shape) for end, shape in shapes.items()}


def test_all_of_it_is_merged(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    added = distilled(tmp_path / "lightning.safetensors")
    command = ["merge", "--dit", str(dit), "--output", str(tmp_path / "m.safetensors"), "--multiplier", "0.5"]
    assert cli.main([*command, "--lora", str(tmp_path / "lightning.safetensors")]) == 0
    assert "1 layers, rank 2, alpha/rank 1, 5 whole tensors" in capsys.readouterr().out
    base, merged = load_file(dit), load_file(tmp_path / "m.safetensors")
    assert {name for name in base if not torch.equal(base[name], merged[name])} == set(added)
    assert all(
        torch.allclose(merged[name], base[name] + 0.5 * delta, atol=1e-5) for name, delta in added.items()
    )
    assert cli.main([*command, "--lora", str(tmp_path / "lightning.safetensors"), "--as", "lora"]) == 2
    assert "adds to 5 whole tensors, for which a LoRA has no place" in capsys.readouterr().err


def test_two_of_one_tensor(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    added = distilled(tmp_path / "a.safetensors")
    other = {
        "diffusion_model.head.head.diff": added[HEAD],
        f"diffusion_model.{LAYER}.lora_A.weight": torch.zeros(2, 72),
        f"diffusion_model.{LAYER}.lora_B.weight": torch.zeros(72, 2)
    }  # fmt: skip
    save_file(other, tmp_path / "b.safetensors")
    command = ["merge", "--dit", str(dit), "--output", str(tmp_path / "m.safetensors")]
    loras = ["--lora", str(tmp_path / "a.safetensors"), "--lora", str(tmp_path / "b.safetensors")]
    assert cli.main([*command, *loras]) == 2
    assert "b.safetensors: changes 'head.head.weight', as a LoRA before it does" in capsys.readouterr().err
    assert cli.main([*command, *loras, "--on-overlap", "sum"]) == 0
    difference = load_file(tmp_path / "m.safetensors")[HEAD] - load_file(dit)[HEAD]
    assert torch.allclose(difference, 2 * added[HEAD], atol=1e-5)


def test_it_samples_as_the_merged_model(dit: Path, tmp_path: Path) -> None:
    """What generation does while it loads, float8 layers included, is what the merge writes."""
    added = distilled(tmp_path / "a.safetensors")
    shapes = linear_shapes(build())
    lora = read_lora(tmp_path / "a.safetensors", shapes, spec=SPEC, foreign=True)
    whole = summed([(lora, 1.0)], {name: p.shape for name, p in build().named_parameters()}, once=False)
    edit = editing(merging(shapes, [(lora, 1.0)]), whole)
    model, state = load_dit(dit, dtype=torch.float32, edit=edit).model, build().state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name] + added.get(name, 0), atol=1e-5), name


def test_what_a_model_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One made of an image's model, on one that sees no picture: left out and said. Layers of
    nobody are refused, and sizes."""
    more = {**a_pair("blocks.0.cross_attn.k_img"), "diffusion_model.img_emb.proj.0.diff": torch.ones(40)}
    distilled(tmp_path / "a.safetensors", more=more)
    shapes, own = linear_shapes(build()), {name: p.shape for name, p in build().named_parameters()}
    lora = read_lora(tmp_path / "a.safetensors", shapes, spec=SPEC, foreign=True)
    assert (
        list(lora.pairs) == [LAYER]
        and set(summed([(lora, 1.0)], own, once=True)) == {NORM, BIAS, HEAD, BLOCK, LAST}
    )
    said = capsys.readouterr().err
    assert (
        "a.safetensors: left out 1 layers that this model lacks: diffusion_model.blocks.0.cross_attn.k_img"
        in said
    )
    assert "left out 1 tensors that this model lacks: img_emb.proj.0.weight" in said
    theirs = read_lora(tmp_path / "a.safetensors", linear_shapes(build(I2V)), spec=SPEC, foreign=True)
    assert len(theirs.pairs) == 2 and not capsys.readouterr().err
    with pytest.raises(CheckpointError, match="'diffusion_model.*diff' holds full-difference weights"):
        # to train further, to convert: nothing may be lost
        read_lora(tmp_path / "a.safetensors", shapes, spec=SPEC)
    distilled(tmp_path / "b.safetensors", more=a_pair("blocks.0.vace"))
    with pytest.raises(
        CheckpointError,
        match="1 of its 2 layers are not in this wan model, first diffusion_model.blocks.0.vace"
    ):
        read_lora(tmp_path / "b.safetensors", shapes, spec=SPEC, foreign=True)
    distilled(tmp_path / "c.safetensors", more={"diffusion_model.time_embedding.0.diff_b": torch.ones(3)})
    lora = read_lora(tmp_path / "c.safetensors", shapes, spec=SPEC, foreign=True)
    with pytest.raises(
        CheckpointError, match=r"'time_embedding.0.bias' of shape \[3\], this model's is \[72\]"
    ):
        summed([(lora, 1.0)], own, once=True)
