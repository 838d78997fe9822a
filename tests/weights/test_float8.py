"""Float8 base weights: layouts, files that hold them already, matmul and
dequantised products, LoRA over them."""

import json
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
import torch._meta_registrations
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hvtrain.adapters.attach import inject, linear_shapes, merge_all, merging
from hvtrain.config import asset
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.models.dit import Tokens
from hvtrain.models.load import load_dit
from hvtrain.parallel.recompute import keeping_attention, pick_policy
from hvtrain.weights import float8, float8_tokens
from hvtrain.weights.float8 import Fp8Linear, Products, dequantize, multiply, multiply_back, quantize
from tests.weights.scaled import ScaledProduct

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


@pytest.fixture
def product(monkeypatch) -> ScaledProduct:
    """A GPU's float8 product; its fast sums are off by 2 %."""
    made = ScaledProduct(coarse=0.02)
    monkeypatch.setattr(torch, "_scaled_mm", made)
    return made


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


of_rows = pytest.mark.skipif(
    not hasattr(torch.distributed, "all_gather_single"),
    reason="before torch 2.13 a CPU's float8 product takes one factor only"
)


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


class Block(torch.nn.Module):
    """Two float8 layers, the first with a LoRA that is added to what it gives in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        for name in ("one", "two"):
            weight = self.get_submodule(name).weight.data
            float8.replace_linear(self, name, *quantize(weight, "fp8_rows"))
        float8.use_products(self, {(64, 32): BOTH, (32, 64): BOTH})
        for p in self.parameters():
            p.requires_grad_(False)
        inject(self, ["one"], rank=4, seed=3)
        torch.nn.init.normal_(self.one.lora_up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.nn.functional.gelu(self.one(x)))


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_what_is_computed_again_is_the_same(how, product):
    """The first pass of a checkpoint may be without gradients: that must not make its sums coarse. In
    evaluation mode they are."""
    block, x = Block().train(), torch.randn(2, 5, 32).bfloat16()

    def step(run) -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(given)
        params = [block.one.lora_down.weight, block.one.lora_up.weight]
        for p in params:
            p.grad = None
        out.float().square().sum().backward()
        return [out.detach(), given.grad, *(p.grad for p in params)]

    options = {
        "reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False},
        "selective": {"use_reentrant": False, "context_fn": keeping_attention},
    }[how]
    want = step(block)
    n = len(product.fast)
    got = step(lambda x: checkpoint(block, x, **options))
    assert len(product.fast) > n == 4 and not any(product.fast)
    assert all(torch.equal(a, b) and b.abs().sum() > 0 for a, b in zip(got, want, strict=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), want[0])  # a pass without gradients in a training step
        product.fast.clear()
        coarse = block.eval()(x)
    assert product.fast == [True, True]
    error = (coarse.float() - want[0].float()).norm() / want[0].float().norm()
    assert 0.01 < error < 0.08


def test_a_lora_over_float8_products_has_the_gradients_of_the_formula(product):
    block, x = Block().train(), torch.randn(2, 50, 32).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        block(x).float().square().sum().backward()
    found = [x.grad, block.one.lora_down.weight.grad, block.one.lora_up.weight.grad]
    assert len(product.shapes) == 4
    one, two = (dequantize(m.weight, m.scale_weight, torch.float32) for m in (block.one, block.two))
    wide = x.detach().float().requires_grad_()
    factors = block.one.lora_down.weight, block.one.lora_up.weight
    down, up = (p.detach().clone().requires_grad_() for p in factors)
    inner = wide @ one.T + block.one.bias + wide @ down.T @ up.T * (block.one.alpha / 4)
    out = torch.nn.functional.gelu(inner) @ two.T + block.two.bias
    wanted = torch.autograd.grad(out.square().sum(), [wide, down, up])
    for have, want in zip(found, wanted, strict=True):
        assert (have.float() - want).norm() < 0.06 * want.norm()


class Counting(TorchDispatchMode):
    """Float8 products, those of compiled code too."""

    n = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


@of_rows
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_block_multiplies_as_it_does_in_eager_mode(recompute, monkeypatch):
    """And nothing in it is compiled apart from it."""
    monkeypatch.setattr(float8_tokens, "fused", lambda x, by: 1 / 0)
    x, found, counts = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).bfloat16(), [], []
    for compiled in (False, True):
        block = Block().train()
        if compiled:
            monkeypatch.setattr(float8_tokens, "FUSED_ON", "cpu")
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            block.compile(backend="aot_eager", fullgraph=True)
        with Counting() as seen:
            with torch.autocast("cpu", torch.bfloat16):
                out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            out.float().square().sum().backward()
        counts.append(seen.n)
        factors = block.one.lora_down.weight, block.one.lora_up.weight
        found.append(torch.cat([p.grad.flatten() for p in factors]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert counts[0] == counts[1] == (5 if recompute else 3)  # x itself has no gradient
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()


@of_rows
def test_one_kernel_serves_a_layer_wherever_it_is_called(monkeypatch):
    """Forward, backward and computed again, under autocast and hooks, with and without gradients."""
    monkeypatch.setattr(float8_tokens, "FUSED_ON", "cpu")
    monkeypatch.setattr(float8_tokens, "_refused", {})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    float8_tokens._compiled.cache_clear()
    for m, policy in zip((5, 9, 33, 7), ("none", "full", "selective", "offload"), strict=True):
        block, asked = Block().train(), torch.randn(1, m, 32).bfloat16()
        empty = asked.new_empty(0)
        tokens = Tokens(asked.clone().requires_grad_(m != 5), (empty, empty), m, (1, 1, m), empty, (0,))

        def run(t: Tokens, block: Block = block) -> Tokens:
            return replace(t, img=block(t.img))

        with torch.autocast("cpu", torch.bfloat16):
            out = pick_policy(policy)(run, tokens).img
        out.float().square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            block.eval()(asked)
        float8_tokens.quantize_tokens(asked[0])  # as it is measured
    # widths of 32 and 64, each forward, and backward with a factor a row
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4 and not float8_tokens._refused


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
