"""Float8 base weights: layouts, files that hold them already, matmul and
dequantised products, LoRA over them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.adapters.attach import inject, linear_shapes, merge_all, merging
from hvtrain.config import asset
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.models.load import load_dit
from hvtrain.weights import float8
from hvtrain.weights.float8 import Fp8Linear, dequantize, multiply, quantize

TINY = asset("tiny:dit.safetensors")
LAYER = "double_blocks.0.img_mlp.fc1"


def test_scaled_has_musubi_s_layout():
    torch.manual_seed(0)
    weight = torch.randn(24, 192) * torch.logspace(-3, 1, 24)[:, None]
    values, scale = quantize(weight, "fp8_scaled")
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape and scale.shape == (24, 3, 1)
    assert torch.equal(scale, weight.view(24, 3, 64).abs().amax(2, keepdim=True) / 448)
    back = dequantize(values, scale, torch.float32)
    assert ((back - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.04
    # a width that 64 does not divide: one factor a row
    values, scale = quantize(weight[:, :100], "fp8_scaled")
    assert scale.shape == (24, 1)
    assert (dequantize(values, scale, torch.float32) - weight[:, :100]).norm() < 0.04 * weight.norm()


def test_rows_of_any_size_keep_a_factor_each_and_half_precision_holds_them():
    weight = torch.randn(
        64, 256, generator=torch.Generator().manual_seed(0)
    ) * torch.logspace(-6, 3, 64)[:, None]
    values, scale = quantize(weight.half(), "fp8_rows")
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (64, 1)
    values, scale = quantize(weight, "fp8_rows")
    assert ((values.float() * scale - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.04
    assert quantize(torch.zeros(2, 2), "fp8_rows")[0].float().abs().sum() == 0
    small, x = weight[:8, :64] * 1e3, torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    out = float8.linear(x.half(), *(lambda v, s: (v, None, s))(*quantize(small, "fp8_rows")))
    assert (out.float() - x @ small.T).norm() < 0.04 * (x @ small.T).norm()


def test_a_cast_saturates():
    values, scale = quantize(torch.tensor([[1000.0, -1000.0, 0.5]]), "fp8")
    assert scale is None and values.float().tolist() == [[448.0, -448.0, 0.5]]


@pytest.mark.parametrize("how", ["fp8", "fp8_scaled"])
def test_the_model_in_float8(how):
    """The blocks' layers are eight bits, everything else is what it was, and no more memory is held."""
    whole, loaded = (
        load_dit(TINY, dtype=torch.bfloat16), load_dit(TINY, dtype=torch.bfloat16, quantize_to=how)
    )
    targets = set(whole.spec.lora_targets(whole.model))
    for name, module in loaded.model.named_modules():
        assert isinstance(module, Fp8Linear) == (name in targets)
    before = whole.model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        module = name.rpartition(".")[0]
        if name.endswith("scale_weight"):
            continue
        if name.endswith(".weight") and module in targets:
            scale = loaded.model.get_submodule(module).scale_weight
            close = dequantize(tensor, scale, torch.float32)
            assert (close - before[name].float()).norm() <= 0.06 * before[name].float().norm()
        else:
            assert torch.equal(tensor, before[name])
    assert linear_shapes(loaded.model) == linear_shapes(whole.model)


def _file(tmp_path, *, layout: str):
    state = load_dit(TINY, dtype=torch.bfloat16).model.state_dict()
    weight = state[f"{LAYER}.weight"]
    if layout == "tensor":
        scale = (weight.float().abs().max() / 448).reshape(1)
        values = (weight.float() / scale).to(torch.float8_e4m3fn)
    else:
        values, scale = quantize(weight, "fp8_scaled")
    with open(TINY, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {**state, f"{LAYER}.weight": values, f"{LAYER}.scale_weight": scale}
    save_file(tensors, tmp_path / "x.safetensors", head["__metadata__"])
    return values, scale


@pytest.mark.parametrize("layout", ["tensor", "block"])
def test_a_float8_file_keeps_its_own_values(tmp_path, layout):
    values, scale = _file(tmp_path, layout=layout)
    layer = load_dit(tmp_path / "x.safetensors", quantize_to="fp8_scaled").model.get_submodule(LAYER)
    assert (
        torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
        and torch.equal(layer.scale_weight, scale)
    )
    other = load_dit(
        tmp_path / "x.safetensors", quantize_to="fp8_scaled"
    ).model.get_submodule("double_blocks.0.img_mlp.fc2")
    assert other.scale_weight.ndim == 3


def test_loras_are_merged_before_quantisation(tmp_path):
    shapes = linear_shapes(load_dit(TINY).model)
    torch.manual_seed(0)
    n_out, n_in = shapes[LAYER]
    lora = LoraFile(
        tmp_path / "l.safetensors", {LAYER: LoraPair(torch.randn(4, n_in), torch.randn(n_out, 4), 4.0)}
    )
    whole = load_dit(TINY, dtype=torch.bfloat16).model
    merge_all(whole, [(lora, 0.5)])
    want = quantize(whole.get_submodule(LAYER).weight.data, "fp8_scaled")
    got = load_dit(
        TINY, quantize_to="fp8_scaled", edit=merging(shapes, [(lora, 0.5)])
    ).model.get_submodule(LAYER)
    assert (
        torch.equal(got.weight.view(torch.uint8), want[0].view(torch.uint8))
        and torch.equal(got.scale_weight, want[1])
    )


@pytest.mark.parametrize("scaled", [None, "tensor", "row", "block"])
@pytest.mark.parametrize("matmul", [False, True])
def test_products_and_gradients(scaled, matmul, monkeypatch):
    """Against float32 products of the dequantised weight. torch has its float8 matmul on CPUs
    too, so that path runs here."""
    if matmul and scaled != "block" and not hasattr(torch.distributed, "all_gather_single"):
        pytest.skip("before torch 2.13 a CPU's float8 matmul takes one factor only")
    monkeypatch.setattr(float8, "has_matmul", lambda device: matmul)
    torch.manual_seed(0)
    weight = torch.randn(48, 128)
    values, scale = quantize(weight, "fp8_scaled" if scaled == "block" else "fp8")
    if scaled == "tensor":
        scale = torch.tensor([0.37])
    elif scaled == "row":
        scale = torch.rand(48, 1) + 0.5
    full = dequantize(values, scale, torch.float32)
    x, bias, grad = (
        torch.randn(2, 5, 128).bfloat16().requires_grad_(), torch.randn(48), torch.randn(2, 5, 48).bfloat16()
    )
    seen = []
    monkeypatch.setattr(float8, "multiply", lambda *a: seen.append(1) or multiply(*a))
    out = float8.linear(x, values, bias, scale)
    out.backward(grad)
    want = x.detach().float() @ full.T + bias
    close = 0.04 if matmul and scaled != "block" else 0.01
    assert len(seen) == (2 if matmul and scaled != "block" else 0)
    assert (out.float() - want).norm() <= close * want.norm()
    assert (x.grad.float() - grad.float() @ full).norm() <= close * (grad.float() @ full).norm()


def test_how_a_model_multiplies_is_its_own(monkeypatch):
    """Two models in one process, one of them told not to multiply in float8; a LoRA keeps its layer's way."""
    monkeypatch.setattr(float8, "has_matmul", lambda device: True)
    seen = []
    monkeypatch.setattr(
        float8, "multiply", lambda x, weight,
        scale: seen.append(1) or x @ dequantize(weight, scale, x.dtype).T
    )
    models = [load_dit(TINY, dtype=torch.bfloat16, quantize_to="fp8").model for _ in range(2)]
    for model, allowed in zip(models, (True, False), strict=True):
        float8.use_matmul(model, allowed)
    for lora in (False, True):
        counts = []
        for model in models:
            if lora:
                inject(model, [LAYER], rank=2, seed=3)
            seen.clear()
            x = torch.randn(3, model.get_submodule(LAYER).in_features).bfloat16().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                model.get_submodule(LAYER)(x).sum().backward()
            counts.append(len(seen))
        assert counts == [2, 0]  # forward and backward


def test_a_lora_over_float8_trains_as_over_the_dequantised_model():
    """Same adapters, same loss and gradients as over a float32 model with the dequantised weights."""
    from dataclasses import replace

    from hvtrain.models.hunyuan_video.inputs import HunyuanInput

    a = load_dit(TINY, dtype=torch.float32, quantize_to="fp8_scaled").model
    b = load_dit(TINY, dtype=torch.float32).model
    for name, module in a.named_modules():
        if isinstance(module, Fp8Linear):
            b.get_submodule(name).weight.data = dequantize(module.weight, module.scale_weight, torch.float32)
    torch.manual_seed(0)
    arch = a.arch
    inp = HunyuanInput(
        x=torch.randn(1, arch.in_channels, 2, 4, 4), t=torch.tensor([300.0]), lengths={"text": (3,)},
        cond={
            "text": torch.randn(1, 3, arch.text_dim), "pooled": torch.randn(1, arch.pooled_dim),
            "guidance": torch.tensor([6000.0]),
        },
    )
    grads = []
    for model in (a, b):
        names = inject(model, [LAYER, "single_blocks.0.linear1"], rank=2, seed=3)
        for n in names:
            if "lora_up" in n:
                torch.nn.init.constant_(model.get_parameter(n), 0.01)
        model(replace(inp)).square().mean().backward()
        grads.append({n: model.get_parameter(n).grad for n in names})
    assert grads[0].keys() == grads[1].keys() and all(g.abs().sum() > 0 for g in grads[0].values())
    for name, g in grads[1].items():
        torch.testing.assert_close(grads[0][name], g, rtol=1e-4, atol=1e-8)


@pytest.mark.gpu
def test_float8_matmul_on_a_gpu():
    torch.manual_seed(0)
    weight = torch.randn(256, 512, device="cuda")
    values, _ = quantize(weight, "fp8")
    x = torch.randn(64, 512, device="cuda").bfloat16()
    want = x.float() @ dequantize(values, None, torch.float32).T
    assert (multiply(x, values, None).float() - want).norm() <= 0.05 * want.norm()
