"""What saves memory changes nothing: activation policies, block swap and accumulation bit for bit,
float8 within its rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvtrain.adapters.attach import seed_dropout
from hvtrain.errors import ConfigError
from hvtrain.models.hunyuan_video.model import HunyuanVideo
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, shutdown
from hvtrain.parallel.hostcopy import HostCopies
from hvtrain.parallel.swap import BlockSwap, resident_bytes
from tests.parallel.tiny_run import ARCH, Case, Outcome, build_model, make_batch, train

ALONE = ParallelContext()
DEEP = replace(ARCH, double=3, single=5)
DEEP_BLOCKS = range(8)


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


class Living(TorchDispatchMode):
    """Bytes of everything computed while entered that is still in memory: by storage, so
    that no one can hold it unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def n_bytes(self, but: set[int]) -> int:
        return sum(n for at, (ref, n) in self.made.items() if at not in but and not ref.expired())


def test_a_policy_keeps_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes on the device between forward and backward: full keeps each block's two inputs, selective
    attention's outputs and log-sum-exps too, offload neither; what offload keeps is on the host, and none of
    the copies outlives its use."""
    host: set[int] = set()
    copies: list[HostCopies] = []
    room = HostCopies.on_host

    def on_host(self: HostCopies, x: torch.Tensor) -> torch.Tensor:
        copies.append(self)
        there = room(self, x)
        host.add(there.untyped_storage().data_ptr())
        return there

    monkeypatch.setattr(HostCopies, "on_host", on_host)

    def kept(recompute: str) -> tuple[int, int]:
        model, _ = build_model(Case(lora=True, arch=DEEP))
        parallelize(model, ALONE, recompute=recompute)
        seed_dropout(model, 7)
        host.clear()  # addresses are used again
        inp = make_batch(2, 0)[0]  # 77 image tokens
        given = {
            x.untyped_storage().data_ptr() for x in (*model.parameters(), inp.x, inp.t, *inp.cond.values())
        }
        with Living() as living:
            out = model(inp).sum()
            before = living.n_bytes(host | given)
            out.backward()
            del out
        grads = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
        return before, living.n_bytes(host | given | grads)

    inp = make_batch(2, 0)[0]
    tokens = 2 * (77 + max(inp.lengths["text"])) * 4  # of both samples, in bytes
    inputs = len(DEEP_BLOCKS) * tokens * DEEP.hidden_size
    attention = len(DEEP_BLOCKS) * sum(77 + n for n in inp.lengths["text"]) * 4 * (
        DEEP.hidden_size + DEEP.heads_num
    )
    before, after = zip(*(kept(p) for p in ("none", "full", "selective", "offload")))
    none, full, selective, offload = before
    assert none > 10 * full
    assert full - offload == inputs and selective - full == attention
    assert after == (0, 0, 0, 0)
    assert copies and all(not one.out for one in copies)


def test_selective_computes_attention_once() -> None:
    from hvtrain.models import kernels

    calls = {"n": 0}
    kernel = kernels.KERNELS["sdpa"]

    def counted(q, k, v):
        calls["n"] += 1
        return kernel.partial(q, k, v)

    model, _ = build_model(Case())
    kernels.KERNELS["counted"] = replace(kernel, name="counted", partial=counted)
    try:
        parallelize(model, ALONE, kernel="counted", recompute="selective")
        inp, _ = make_batch(0, 0)
        model(inp).sum().backward()
    finally:
        del kernels.KERNELS["counted"]
    refiner = 1  # is no block: nothing of it is computed again
    assert calls["n"] == (len(model.blocks) + refiner) * len(set(inp.lengths["text"]))


@pytest.mark.parametrize("n", [1, 3, 4])
def test_swapping_n_blocks_frees_n_blocks_worth(n: int) -> None:
    model = HunyuanVideo(DEEP).requires_grad_(False)
    whole = resident_bytes(model)
    blocks = sum(p.nbytes for block in model.blocks for p in block.parameters())
    swap = BlockSwap(model.blocks, n, torch.device("cpu"))
    parallelize(model, ALONE, training=False, visits=swap)
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
        parallelize(model, ALONE, training=False, visits=swap)
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

    def run_on_gpu(recompute: str, n_swapped: int) -> tuple[dict[str, torch.Tensor], int, int]:
        """Gradients; the bytes of weights that lie there; and the peak of activations above them."""
        torch.cuda.empty_cache()
        model, params = build_model(Case(lora=True, arch=DEEP))
        swap = BlockSwap(model.blocks, n_swapped, device) if n_swapped else None
        before = torch.cuda.memory_allocated(device)
        model.to(device)
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        parallelize(model, ctx, recompute=recompute, visits=swap)
        inp, target = make_batch(2, 0)
        inp = replace(
            inp, x=inp.x.to(device), t=inp.t.to(device),
            cond={k: v.to(device) for k, v in inp.cond.items()},
        )
        weights = torch.cuda.memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            (model(inp) - target.to(device)).square().mean().backward()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before - weights
        return {n: p.grad for n, p in params.items() if p.grad is not None}, weights, peak

    want, whole, most = run_on_gpu("none", 0)
    got, resident, peak = run_on_gpu(policy, 4)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)
    assert resident < 0.8 * whole, (resident, whole)  # half of the blocks are away
    assert peak < 0.7 * most, (peak, most)


def test_dropout_and_swap_need_no_weights_of_a_linear() -> None:
    """A swapped layer's shape is known while its weight is away: what saves and describes adapters works."""
    model, params = build_model(Case(lora=True, arch=DEEP))
    BlockSwap(model.blocks, 3, torch.device("cpu"))
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(m.out_features > 0 and m.in_features > 0 for m in linears) and params
