"""Float8 base weights: layouts, files that hold them already, matmul and
dequantised products, LoRA over them."""

import json
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch._meta_registrations
from safetensors.torch import save_file

from hvtrain.adapters.attach import inject, linear_shapes, merge_all, merging
from hvtrain.config import asset
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.models.load import load_dit
from hvtrain.weights import float8
from hvtrain.weights.float8 import Fp8Linear, Products, dequantize, multiply, multiply_back, quantize
from tests.weights.scaled import ScaledProduct, of_rows

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


BOTH = Products(True, True)


@pytest.mark.parametrize("scaled", [None, "tensor", "row", "block"])
@pytest.mark.parametrize("way", [Products(), Products(True, False), Products(False, True), BOTH])
def test_products_and_gradients(scaled, way, product):
    """Against float32 products of the dequantised weight, forward and backward each in its way."""
    torch.manual_seed(0)
    values, scale = quantize(torch.randn(48, 128), "fp8_scaled" if scaled == "block" else "fp8")
    if scaled == "tensor":
        scale = torch.tensor([0.37])
    elif scaled == "row":
        scale = torch.logspace(-3, 2, 48)[:, None]
    full = dequantize(values, scale, torch.float32)
    x, bias, grad = (
        torch.randn(2, 5, 128).bfloat16().requires_grad_(), torch.randn(48), torch.randn(2, 5, 48).bfloat16()
    )
    out = float8.linear(x, values, bias, scale, products=way)
    out.backward(grad)
    want, back = x.detach().float() @ full.T + bias, grad.float() @ full
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in ((out.detach(), want), (x.grad, back))]
    used = [name for name, on in zip(("forward", "backward"), way, strict=True) if on and scaled != "block"]
    shapes = {"forward": (10, 128, 48), "backward": (10, 48, 128)}
    assert product.shapes == [shapes[name] for name in used]
    for name, error in zip(("forward", "backward"), errors, strict=True):
        # of float8, or one to bfloat16
        assert 0.015 < error < 0.035 if name in used else error < 0.006
    assert not any(product.fast) and product.biased == [name == "forward" for name in used]


@of_rows
def test_the_cpu_s_own_float8_product_gives_the_same(monkeypatch):
    """PyTorch's, with what it is given here."""
    torch.manual_seed(0)
    values, scale = quantize(torch.randn(48, 128), "fp8_rows")
    x, bias, grad = torch.randn(7, 128).bfloat16(), torch.randn(48).bfloat16(), torch.randn(7, 48).bfloat16()

    def both():
        return multiply(x, values, scale, bias, fast=True), multiply_back(grad, values, scale)

    own = both()
    monkeypatch.setattr(torch, "_scaled_mm", ScaledProduct())
    for have, want in zip(own, both(), strict=True):
        torch.testing.assert_close(have, want, rtol=2**-7, atol=1e-2)


def test_the_bias_is_added_before_the_result_is_rounded(product):
    """The product is 256.5, and no number of bfloat16 lies between 256 and 258."""
    values = torch.full((16, 16), 1.0).to(torch.float8_e4m3fn)
    x = torch.zeros(1, 16).bfloat16()
    x[0, :3] = torch.tensor([448.0, -192.0, 0.5])
    biases = [torch.full((16,), b).bfloat16() for b in (0.0, 0.4375, 0.625, 2.75)]
    many = [multiply(x, values, None, bias)[0, 0].item() for bias in biases]
    assert many == [256.0, 256.0, 258.0, 260.0] and product.biased == [True] * 4
    assert [(torch.tensor(256.0).bfloat16() + b[0]).item() for b in biases] == [256.0, 256.0, 256.0, 258.0]


def test_a_factor_a_row_goes_into_the_gradient_before_it_is_rounded(product):
    """Rows of one weight differ by 1e6: with the factor after, the small numbers of a gradient that
    meet large factors would be lost."""
    torch.manual_seed(0)
    scale = torch.logspace(-3, 3, 64)[:, None]
    values = torch.randn(64, 32).to(torch.float8_e4m3fn)
    grad = (torch.randn(9, 64) / scale.view(-1)).bfloat16()
    want = grad.float() @ dequantize(values, scale, torch.float32)
    assert (multiply_back(grad, values, scale).float() - want).norm() < 0.035 * want.norm()


@of_rows
@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_and_gradients_may_lie_in_columns(compiled, product, monkeypatch):
    """A GPU's product takes rows alone, in eager mode and where torch.compile looks a block through."""
    torch.manual_seed(0)
    values, scale = quantize(torch.randn(48, 32), "fp8_rows")
    x, grad = torch.randn(1, 32, 6).bfloat16(), torch.randn(1, 48, 6).bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return float8.linear(x, values, None, scale, products=BOTH)

    found = []
    for turned in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        given = turned.detach().requires_grad_()
        if compiled:
            monkeypatch.undo()  # of PyTorch's own product, as its checks see a GPU's tensors
            monkeypatch.setattr(torch._meta_registrations, "device_hint", lambda t: "cuda")
            torch._dynamo.reset()
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        run(given).backward(grad.transpose(1, 2))
        found.append(given.grad)
    assert torch.equal(*found) and found[0].any()


def test_sizes_that_have_no_product_are_dequantised(product):
    x = torch.randn(3, 64).bfloat16()
    for n_out, n_in in ((40, 64), (48, 24), (16, 64)):
        values, _ = quantize(torch.randn(n_out, n_in), "fp8")
        out = float8.linear(x[:, :n_in], values, None, products=BOTH)
        want = x[:, :n_in].float() @ values.float().T
        assert (out.float() - want).norm() < 0.035 * want.norm()
    assert product.shapes == [(3, 64, 16)]
    out = float8.linear(x.float(), values, None, products=BOTH)  # computed in float32, and so dequantised
    torch.testing.assert_close(out, x.float() @ values.float().T)
    assert product.shapes == [(3, 64, 16)]


def test_how_a_model_multiplies_is_its_own(product):
    """Three models in one process; one was never told; a LoRA keeps its layer's way."""
    models = [load_dit(TINY, dtype=torch.bfloat16, quantize_to="fp8").model for _ in range(3)]
    shape = tuple(models[0].get_submodule(LAYER).weight.shape)
    for model, way in zip(models, (BOTH, Products(True, False)), strict=False):
        float8.use_products(model, {shape: way})
    for lora in (False, True):
        counts = []
        for model in models:
            if lora:
                inject(model, [LAYER], rank=2, seed=3)
            product.shapes.clear()
            x = torch.randn(3, model.get_submodule(LAYER).in_features).bfloat16().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                model.get_submodule(LAYER)(x).sum().backward()
            counts.append(len(product.shapes))
        assert counts == [2, 1, 0]
    float8.use_products(models[0], {})
    assert models[0].get_submodule("double_blocks.0.img_mlp.fc2").products == Products()


def test_a_lora_over_float8_trains_as_over_the_dequantised_model():
    """Same adapters, same loss and gradients as over a float32 model with the dequantised weights."""
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
