"""Float8 products in blocks that train: computed again, compiled, with a LoRA on them."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hvtrain.adapters.attach import inject
from hvtrain.models.dit import Tokens
from hvtrain.parallel.recompute import keeping_attention, pick_policy
from hvtrain.weights import float8, float8_tokens
from hvtrain.weights.float8 import Products, dequantize, quantize
from tests.weights.scaled import needs_compiler, of_rows

BOTH = Products(True, True)


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


@needs_compiler
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
