"""What is done only on a GPU, with PyTorch's functions stood in for: what they are asked, and
what becomes of the answer."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention
from torch import Tensor

from hvtrain.adapters.attach import adapted_layers
from hvtrain.config import ZeroConfig
from hvtrain.fit import oom
from hvtrain.fit import run as fit
from hvtrain.generate.conditions import free
from hvtrain.merge.evaluate import compute_dtype
from hvtrain.models import kernels, sparse_flex
from hvtrain.models.attention import local_attend
from hvtrain.models.dit import Joint
from hvtrain.models.kernels import KERNELS
from hvtrain.parallel import context
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, solo_group, start
from hvtrain.parallel.swap import BlockSwap
from hvtrain.parallel.xfuser_path import XfuserAttention
from hvtrain.rng import generator
from hvtrain.train.engine import Step
from hvtrain.train.monitor import memory_gib
from hvtrain.train.prepare import idle_on_host
from hvtrain.train.zero import ds_config
from hvtrain.weights.float8 import has_matmul
from tests.parallel.tiny_run import ARCH, Case, build_model, make_batch

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")
ON_GPU = ParallelContext(device=GPU)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs of 80 GiB; which were chosen."""
    taken: list[torch.device] = []

    def properties(device: torch.device) -> types.SimpleNamespace:
        assert device == GPU
        return types.SimpleNamespace(total_memory=80 << 30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {GPU: 3 << 30}[device])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_memory_is_the_gpu_s(card) -> None:
    assert ON_GPU.memory_bytes == 80 << 30 and memory_gib(GPU) == 3.0
    assert memory_gib(CPU) != 3.0 and ParallelContext().memory_bytes != 80 << 30


def test_fit_asks_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {0: types.SimpleNamespace(total_memory=24 << 30)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", seen.__getitem__)
    for there, gib in ((True, 24), (False, fit.DEFAULT_MEMORY_GIB)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert fit.memory_bytes(fit.Asked()) == gib * 2**30


def test_out_of_memory_names_the_gpu(card, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> types.SimpleNamespace:
        asked.append(command)
        return types.SimpleNamespace(stdout="use less", stderr="")

    monkeypatch.setattr(oom.subprocess, "run", run)
    for ctx, where, gib in (
        (ParallelContext(world=4, device=GPU), "GPU 1 (80 GiB)", 80.0),
        (ParallelContext(world=4), "this machine", ParallelContext().memory_bytes // 4 / 2**30),
    ):
        said = str(oom.explained(RuntimeError("no memory"), "", ctx, None, ()))
        assert said.startswith(f"out of memory on {where} before the first step; use less")
        assert asked[-1][-3:-1] == ["4", str(gib)]


def test_what_is_no_longer_used_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    free(CPU)
    assert not emptied
    free(GPU)
    assert emptied == [True]


def test_a_merge_is_evaluated_in_half_precision() -> None:
    assert compute_dtype(GPU) == torch.bfloat16 and compute_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("n", "stays"), [(20 << 30, False), (21 << 30, True)])
def test_an_idle_expert_that_leaves_too_little_room_is_on_the_host(card, n: int, stays: bool) -> None:
    """Two of n bytes each: more than half of the GPU's memory."""
    outline = types.SimpleNamespace(parameters=lambda: [types.SimpleNamespace(numel=lambda: n)])
    bases = [types.SimpleNamespace(outline=outline)] * 2
    asked = {"zero": ZeroConfig(stage=2), "whole": False, "n_bytes": 1}
    assert idle_on_host(bases, "auto", ctx=ON_GPU, **asked) is stays  # type: ignore[arg-type]
    assert not idle_on_host(bases, "auto", ctx=ParallelContext(), **asked)  # type: ignore[arg-type]


def test_offloaded_state_is_in_memory_that_a_gpu_reads_at_once() -> None:
    net = torch.nn.Linear(3, 3)
    for cuda in (True, False):
        zero = ds_config(
            ZeroConfig(stage=3, offload_optimizer="cpu", offload_param="cpu"), net, cuda=cuda, step=Step()
        )
        for what in ("offload_optimizer", "offload_param"):
            assert zero["zero_optimization"][what] == {"device": "cpu", "pin_memory": cuda}


@pytest.mark.parametrize(("capability", "multiplies"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_float8_is_multiplied_from_ada_on(
    capability: tuple[int, int], multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {GPU: capability}[device])
    assert has_matmul(GPU) is multiplies and not has_matmul(CPU)


# --- copies beside the computation --------------------------------------------------------------------------


class Late:
    """A stream whose copies are made when somebody waits for them, and not
    before; until then there is NaN."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self.inside = self.behind = False
        self.n_copies = 0

    def wait_stream(self, main: object) -> None:
        self.behind = True

    def record_event(self) -> int:
        self.behind = False
        return self.n_copies

    def wait_event(self, event: int) -> None:  # of the stream that computes
        while self.n_copies - len(self.queue) < event:
            target, copy = self.queue.pop(0)
            copy(target)

    def fetch(self, real: Callable[[Tensor], None], target: Tensor) -> None:
        assert self.inside and self.behind, "over a block that may still be computed with"
        target.fill_(255)
        self.queue.append((target, real))
        self.n_copies += 1


@contextmanager
def entered(late: Late):
    late.inside = True
    yield
    late.inside = False


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_swapped_block_is_waited_for(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(late: Late | None) -> dict[str, Tensor]:
        model, params = build_model(Case(arch=replace(ARCH, double=3, single=5), lora=True))
        for layer in adapted_layers(model):
            layer.dropout = 0.0
        swapped = None if late is None else BlockSwap(model.blocks, 4, CPU)
        if swapped is not None:
            swapped.stream = late  # type: ignore[assignment]
            for home in swapped.homes.values():
                object.__setattr__(home, "fetch", partial(late.fetch, home.fetch))
        parallelize(model, ParallelContext(), recompute=recompute, visits=swapped)
        for step in range(2):
            inp, target = make_batch(step, 0)
            (model(inp) - target).square().mean().backward()
        return {name: p.grad for name, p in params.items()}

    late = Late()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: late)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    got, want = gradients(late), gradients(None)
    assert late.n_copies > 8 and all(torch.equal(got[name], grad) for name, grad in want.items())


# --- process groups -----------------------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    made: list[tuple[tuple, dict]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: made.append((args, options)))
    monkeypatch.setattr(context, "bind", lambda *args: None)
    return made


def test_a_job_on_gpus_has_nccl_and_gloo_side_by_side(card, groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says which GPU is its own: without, the first collective guesses."""
    for name, value in {
        "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(ParallelContext, "barrier", lambda self: None)
    ctx = start()
    assert card == [GPU] and (ctx.rank, ctx.world, ctx.device) == (1, 2, GPU)
    (args, options), = groups
    assert args == ("cpu:gloo,cuda:nccl",)
    assert (options["device_id"], options["rank"], options["world_size"]) == (GPU, 1, 2)
    assert options["timeout"] == context.TIMEOUT


def test_a_group_of_one_on_a_gpu(groups) -> None:
    solo_group(ON_GPU)
    solo_group(ParallelContext())
    assert [args for args, _ in groups] == [("cpu:gloo,cuda:nccl",), ("gloo",)]


# --- attention ----------------------------------------------------------------------------------------------


def test_cudnn_s_attention_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    @contextmanager
    def only(backend: object):
        asked.append(backend)
        yield

    monkeypatch.setattr(kernels, "sdpa_kernel", only)
    q, k, v = (torch.randn(1, 5, 2, 16, generator=generator(i, stream="cudnn")) for i in range(3))
    torch.testing.assert_close(KERNELS["cudnn"].attend(q, k, v), KERNELS["sdpa"].attend(q, k, v))
    assert asked == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]


def test_flex_attention_is_there_on_a_gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(sparse_flex.importlib.util, "find_spec", lambda name: name)
    assert sparse_flex.missing(GPU) is None and sparse_flex.missing(CPU) is not None


class OneOther(types.SimpleNamespace):
    """torch.ops.aten with another operator."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch.ops.aten, name)


def test_flash_attention_4_is_pytorch_s_while_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It registers for the whole process, so before and after a call the operators are what they were."""
    now: list[str | None] = [None]
    used: list[tuple[str, str | None]] = []

    def activate(name: str) -> None:
        now.append(name)

    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: now[-1])
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", now.pop)
    sdpa = KERNELS["sdpa"]

    @contextmanager
    def only(backend: object):
        used.append((str(backend), now[-1]))
        yield

    def forward(q, k, v):
        used.append(("forward", now[-1]))
        part = sdpa.partial(*(x.transpose(1, 2) for x in (q, k, v)))
        return part.out.transpose(1, 2), part.lse, None

    def backward(dout, q, k, v, merged):
        used.append(("backward", now[-1]))
        return sdpa.backward(dout, q, k, v, merged)

    monkeypatch.setattr(kernels, "sdpa_kernel", only)
    monkeypatch.setattr(kernels, "aten", OneOther(_scaled_dot_product_flash_attention=forward))
    draw = generator(0, stream="flash4")
    q, k, v, d_out = (torch.randn(1, 5, 2, 16, generator=draw) for _ in range(4))
    want = sdpa.attend(q, k, v)
    with monkeypatch.context() as inner:
        inner.setattr(kernels, "_flash_backward", backward)
        four = KERNELS["flash4"]
        result = four.partial(q, k, v)
        torch.testing.assert_close(result.out, want)
        torch.testing.assert_close(four.attend(q, k, v), want)
        grads = four.backward(d_out, q, k, v, result)
        with kernels._as_flash("FA4"):
            four.partial(q, k, v)  # within another: nothing changes
    assert now == [None] and {name for _, name in used} == {"FA4"}
    assert [what for what, _ in used] == ["forward", "SDPBackend.FLASH_ATTENTION", "backward", "forward"]
    assert [g.shape for g in grads] == [q.shape] * 3


def test_xfuser_gets_each_sample_s_own_text_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """And everything in autocast's type, which its operators do not take part in."""
    seen: list[torch.dtype] = []

    def layer(
        attention, q, k, v, *, dropout_p, causal, joint_tensor_query, joint_tensor_key, joint_tensor_value,
        joint_strategy
    ):
        assert (attention, dropout_p, causal, joint_strategy) == (None, 0.0, False, "rear")
        whole = [
            torch.cat(pair, 1)
            for pair in ((q, joint_tensor_query), (k, joint_tensor_key), (v, joint_tensor_value))
        ]
        seen.extend(x.dtype for x in whole)
        return KERNELS["sdpa"].attend(*whole)

    one = object.__new__(XfuserAttention)
    one.ctx, one.layer, one.kernel, one.sparse = ParallelContext(), layer, KERNELS["sdpa"], None
    draw = generator(0, stream="xfuser")
    q, k, v = (

            Joint(torch.randn(3, 6, 2, 16, generator=draw), torch.randn(3, 4, 2, 16, generator=draw))
            for _ in range(3)

    )
    got, want = (f(q, k, v, txt_len=(4, 0, 2), n_img=6) for f in (one.joint, local_attend))
    torch.testing.assert_close(got, want)
    assert set(seen) == {torch.float32}
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: {"cuda": torch.bfloat16}[device])
    seen.clear()
    one.joint(q, k, v, txt_len=(4, 0, 2), n_img=6)
    assert set(seen) == {torch.bfloat16}


def test_communication_beside_the_backward() -> None:
    """Gradients beside the backward: only of a full fine-tune, and only where ZeRO cuts them."""
    net, frozen = (
        torch.nn.Linear(3, 3),
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False))
    )
    for model, stage, cuda in ((net, 0, True), (net, 2, True), (net, 2, False), (frozen, 2, True)):
        made = ds_config(
            ZeroConfig(stage=stage), model, cuda=cuda, step=Step()
        )["zero_optimization"]["overlap_comm"]
        assert made is (model is net and stage == 2 and cuda)
