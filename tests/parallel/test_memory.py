"""What saves memory changes nothing: activation policies, block swap and accumulation bit for bit, float8 within its rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hvtrain.errors import ConfigError
from hvtrain.models.hunyuan_video.model import HunyuanVideo
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, shutdown
from hvtrain.parallel.swap import BlockSwap, resident_bytes
from tests.parallel.tiny_run import ARCH, Case, Outcome, build_model, make_batch, train

ALONE = ParallelContext()
DEEP = replace(ARCH, double=3, single=5)


def run(case: Case) -> Outcome:
    return train(case, ALONE, optimizer=torch.optim.AdamW, rate=2e-3, n_steps=4, clip=1.0)


def same(a: Outcome, b: Outcome) -> None:
    assert a.losses == b.losses
    for name, p in a.params.items():
        assert torch.equal(p, b.params[name]), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_each_activation_policy_is_bit_equal_to_none(policy: str, lora: bool) -> None:
    plain = Case(engine="torch", stage=0, lora=lora)
    same(run(replace(plain, recompute=policy)), run(plain))


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_block_swap_is_bit_equal_to_none(policy: str) -> None:
    plain = Case(engine="torch", stage=0, lora=True, recompute=policy, arch=DEEP)
    same(run(replace(plain, swap=4)), run(plain))


def test_three_micro_batches_are_bit_equal_with_all_savers() -> None:
    plain = Case(engine="torch", stage=0, lora=True, arch=DEEP, micro=3)
    same(run(replace(plain, recompute="selective", swap=4)), run(plain))


@pytest.mark.parametrize("engine, stage", [("torch", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_accumulation_is_bit_equal_to_adding_up_by_hand(engine: str, stage: int) -> None:
    """Three micro-steps through the engine, and three backward passes of a third of the loss each."""
    case = Case(engine=engine, stage=stage, micro=3)
    model, params = build_model(case)
    parallelize(model, ALONE)
    for micro in range(3):
        inp, target = make_batch(0, micro)
        ((model(inp) - target).square().mean() / 3).backward()
    rate = 2.0**14
    try:
        after = train(case, ALONE, optimizer=torch.optim.SGD, rate=rate, n_steps=1, clip=0.0).params
    finally:
        shutdown()
    for name, p in params.items():
        want = p.detach() - rate * (p.grad if p.grad is not None else torch.zeros_like(p))
        assert torch.equal(after[name], want), name


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_policy_keeps_what_it_says(policy: str) -> None:
    """Bytes that autograd holds between forward and backward: fewer than without, in the order of the policies."""

    def saved(recompute: str) -> int:
        model, _ = build_model(Case(lora=True, arch=DEEP))
        parallelize(model, ALONE, recompute=recompute)
        held: dict[int, torch.UntypedStorage] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                held[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        from hvtrain.adapters.lora import seed_dropout

        seed_dropout(model, 7)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(make_batch(0, 0)[0])
        out.sum().backward()
        return sum(s.nbytes() for s in held.values())

    assert saved(policy) < 0.5 * saved("none")


def test_selective_computes_attention_once() -> None:
    from hvtrain.models import attention

    calls = {"n": 0}
    kernel = attention.KERNELS["sdpa"]

    def counted(q, k, v):
        calls["n"] += 1
        return kernel.partial(q, k, v)

    model, _ = build_model(Case())
    attention.KERNELS["counted"] = replace(kernel, name="counted", partial=counted)
    try:
        parallelize(model, ALONE, kernel="counted", recompute="selective")
        inp, _ = make_batch(0, 0)
        model(inp).sum().backward()
    finally:
        del attention.KERNELS["counted"]
    assert calls["n"] == len(model.blocks) * len(set(inp.text_len))


@pytest.mark.parametrize("n", [1, 3, 4])
def test_swapping_n_blocks_frees_n_blocks_worth(n: int) -> None:
    model = HunyuanVideo(DEEP).requires_grad_(False)
    whole = resident_bytes(model)
    blocks = sum(p.nbytes for block in model.blocks for p in block.parameters())
    swap = BlockSwap(model.blocks, n, torch.device("cpu"))
    parallelize(model, ALONE, training=False, swap=swap)
    freed = whole - resident_bytes(model, swap)
    assert freed == pytest.approx(swap.freed, rel=0.01) and freed >= 0.99 * n * blocks / len(model.blocks)
    with torch.no_grad():
        inp = make_batch(0, 0)[0]
        first = model(inp)
        assert torch.equal(model(inp), first)  # the second pass begins where the first ended
    assert whole - resident_bytes(model, swap) == freed


def test_swapped_sampling_is_that_of_the_whole_model() -> None:
    torch.manual_seed(0)
    model = HunyuanVideo(DEEP).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.1)
    parallelize(model, ALONE, training=False)
    inp = make_batch(1, 0)[0]
    with torch.no_grad():
        want = model(inp)
        swap = BlockSwap(model.blocks, 4, torch.device("cpu"))
        parallelize(model, ALONE, training=False, swap=swap)
        assert all(torch.equal(model(inp), want) for _ in range(3))


def test_more_than_can_be_swapped_is_refused() -> None:
    model = HunyuanVideo(DEEP)
    with pytest.raises(ConfigError, match="full fine-tuning has nothing to swap"):
        BlockSwap(model.blocks, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"8 of 8 blocks cannot .* at most \d"):
        BlockSwap(model.requires_grad_(False).blocks, 8, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_block_swap_and_policies_on_a_gpu(policy: str) -> None:
    """The streams: the same numbers as without, and memory that falls."""
    device = torch.device("cuda", 0)
    ctx = ParallelContext(device=device)

    def grads(recompute: str, n_swapped: int) -> dict[str, torch.Tensor]:
        model, params = build_model(Case(lora=True, arch=DEEP))
        swap = BlockSwap(model.blocks, n_swapped, device) if n_swapped else None
        model.to(device)
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        parallelize(model, ctx, recompute=recompute, swap=swap)
        inp, target = make_batch(2, 0)
        inp = replace(
            inp, x=inp.x.to(device), t=inp.t.to(device), text=inp.text.to(device),
            cond={k: v.to(device) for k, v in inp.cond.items()},
        )
        for _ in range(3):
            (model(inp) - target.to(device)).square().mean().backward()
        return {n: p.grad for n, p in params.items() if p.grad is not None}

    want, got = grads("none", 0), grads(policy, 4)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)


def test_dropout_and_swap_need_no_weights_of_a_linear() -> None:
    """A swapped layer's shape is known while its weight is away: what saves and describes adapters works."""
    model, params = build_model(Case(lora=True, arch=DEEP))
    BlockSwap(model.blocks, 3, torch.device("cpu"))
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(m.out_features > 0 and m.in_features > 0 for m in linears) and params
