"""The LoRA in the library that most people generate with: same weights, same
LoRA, same change of the output."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from hvtrain.adapters.attach import linear_shapes
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.write import save_lora
from tests.adapters.models import ARCH, SPEC, adapted, an_input, build, lora_tensors

pytest.importorskip("peft")


def in_diffusers() -> HunyuanVideoTransformer3DModel:
    model = HunyuanVideoTransformer3DModel(
        in_channels=ARCH.in_channels,
        out_channels=ARCH.out_channels,
        num_attention_heads=ARCH.heads_num,
        attention_head_dim=ARCH.head_dim,
        num_layers=ARCH.double,
        num_single_layers=ARCH.single,
        num_refiner_layers=ARCH.refiner_depth,
        text_embed_dim=ARCH.text_dim,
        pooled_projection_dim=ARCH.pooled_dim,
        rope_axes_dim=ARCH.rope_dims,
    ).eval()
    weights = build().state_dict()
    cuts = SPEC.key_maps["diffusers"].write(weights)
    model.load_state_dict({name: cut.take(weights[cut.source]) for name, cut in cuts.items()})
    return model


@torch.no_grad()
def velocity(model: HunyuanVideoTransformer3DModel) -> torch.Tensor:
    inp = an_input()
    return model(
        hidden_states=inp.x,
        timestep=inp.t,
        encoder_hidden_states=inp.cond["text"],
        encoder_attention_mask=torch.arange(inp.cond["text"].shape[1])[None]
        < torch.tensor(inp.lengths["text"])[:, None],
        pooled_projections=inp.cond["pooled"],
        guidance=inp.cond["guidance"],
        return_dict=False,
    )[0]


@torch.no_grad()
def change_here() -> torch.Tensor:
    return adapted()(an_input()) - build()(an_input())


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "a.safetensors"
    save_lora(path, lora_tensors(adapted()), rank=4, alpha=2.0, metadata={}, architecture=SPEC.name)
    return read_lora(path, linear_shapes(build()), spec=SPEC)


@pytest.mark.parametrize("fold", [True, False])
def test_a_converted_lora_changes_diffusers_as_it_changes_us(lora, tmp_path, fold):
    made = converted(lora, SPEC, DIALECTS["diffusers"], fold=fold)
    made.save(tmp_path / "d.safetensors")
    model = in_diffusers()
    before = velocity(model)
    # prefix "transformer", as a pipeline does
    model.load_lora_adapter(str(tmp_path), weight_name="d.safetensors")
    change, expected = velocity(model) - before, change_here()
    assert expected.norm() / before.norm() > 0.1
    assert (change - expected).norm() / expected.norm() < 1e-4


def test_diffusers_converts_our_comfy_names(lora):
    """Its own converter for files with official names, which drops alpha: hence a scale of 1 here."""
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    comfy = converted(lora, SPEC, DIALECTS["comfyui"]).tensors
    tensors = {k: v for k, v in comfy.items() if "double" in k and not k.endswith(".alpha")}
    theirs = _convert_hunyuan_video_lora_to_diffusers(dict(tensors))
    ours = converted(lora, SPEC, DIALECTS["diffusers"], fold=False).tensors
    assert theirs.keys() == {k for k in ours if "single" not in k}
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
