"""The checks themselves: each yields rows and needs nothing of another."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import Tensor

from hvtrain.config import AdapterConfig, ModelConfig, ParallelConfig, RunSettings, ZeroConfig
from hvtrain.fit.estimate import Candidate, Training, of_sampling, of_training
from hvtrain.fit.trace import Shape, fake_input
from hvtrain.models.kernels import KERNELS, Kernel, Partial
from hvtrain.models.measure import RESIDUES, TOLERANCE, Size, drawn, errors, timed, wrongs
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.parallel.swap import BlockSwap
from hvtrain.parallel.usp import _merge
from hvtrain.weights.float8 import dequantize, has_matmul, multiply, quantize
from tests.bench.bench_step import RANK, Case, build, ceiling, flops, our_step, step_of
from tests.gpu.report import Check, Row, Setup

GIB = 2**30


def dtype_of(here: Setup) -> torch.dtype:
    return torch.bfloat16 if here.cuda else torch.float32


def trained(here: Setup) -> list[Kernel]:
    """Kernels with a backward that run here."""
    return [k for k in KERNELS.values() if k.trains and k.missing(here.device, dtype_of(here)) is None]


def peak(here: Setup, work: Callable[[], object]) -> float | None:
    """GiB, beyond nothing; None on the CPU."""
    gc.collect()
    if not here.cuda:
        work()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(here.device)
    work()
    torch.cuda.synchronize(here.device)
    return torch.cuda.max_memory_allocated(here.device) / GIB


def relative(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want.double()).abs().max() / want.double().abs().max())


# --- 0 to 2: the machine, and attention alone -------------------------------------------------------------------------


def versions(here: Setup) -> Iterator[Row]:
    name = torch.cuda.get_device_name(here.device) if here.cuda else "CPU"
    yield Row("device", note=f"{name}, Python {sys.version.split()[0]}, CUDA {torch.version.cuda}")
    yield Row("cuDNN", note=f"{torch.backends.cudnn.version()}; order {getattr(torch._C, '_get_sdp_priority_order', str)()}")
    yield Row("kernels", note="; ".join(f"{n}: {k.missing(here.device, dtype_of(here)) or 'runs'}" for n, k in KERNELS.items()))
    yield Row("matrix product", tflops=ceiling(here.device) / 1e12)
    n = 1 << 30 if here.cuda else 1 << 22
    source, target = (torch.empty(n, dtype=torch.uint8, device=here.device) for _ in range(2))
    seconds = timed(lambda: target.copy_(source), here.device)
    yield Row("copy", ms=1000 * seconds, note=f"{2 * n / seconds / 1e9:,.0f} GB/s read and written")
    if here.cuda:
        q, k, v, _ = (x.transpose(1, 2) for x in drawn(Size(4096, 4096), here.device, torch.bfloat16))
        with torch.profiler.profile() as profile:
            F.scaled_dot_product_attention(q, k, v)
            torch.cuda.synchronize()
        longest = max(profile.key_averages(), key=lambda e: e.device_time_total)
        yield Row("F.sdpa runs", note=longest.key[:90])


def kernel_values(here: Setup) -> Iterator[Row]:
    """Against float64 at all residues, scores far below zero, and keys in parts that are merged as a ring does."""
    dtype = dtype_of(here)
    for kernel in trained(here):
        wrong = dict(wrongs(kernel, here.device, dtype))
        worst = errors(kernel, Size(256 + RESIDUES[3], 256 + RESIDUES[3]), here.device, dtype).worst
        note = "; ".join(f"{at}: {e.worst:.1e}" for at, e in list(wrong.items())[:3])
        yield Row(f"{kernel.name}, lengths", passed=not wrong, error=worst, note=note)
        for parts in (2, 4, 5):
            found = max(_in_parts(kernel, here, parts), key=lambda e: (e != e, e))
            yield Row(f"{kernel.name}, keys in {parts} parts", passed=found <= TOLERANCE[dtype], error=found)


def _in_parts(kernel: Kernel, here: Setup, parts: int) -> list[float]:
    q, k, v, d_out = drawn(Size(193, 320), here.device, dtype_of(here))
    whole = kernel.partial(q, k, v)
    merged: Partial | None = None
    cuts = list(zip(k.chunk(parts, 1), v.chunk(parts, 1), strict=True))
    for keys, values in cuts:
        merged = _merge(merged, kernel.partial(q, keys, values))
    assert merged is not None and kernel.backward is not None
    pieces = [kernel.backward(d_out, q, keys, values, merged) for keys, values in cuts]
    want = kernel.backward(d_out, q, k, v, whole)
    got = sum(p.q.float() for p in pieces), torch.cat([p.k for p in pieces], 1), torch.cat([p.v for p in pieces], 1)
    pairs = [(merged.out, whole.out), (merged.lse, whole.lse), *zip(got, want, strict=True)]
    return [relative(have, ref) for have, ref in pairs]


def attention_speed(here: Setup) -> Iterator[Row]:
    top, dtype = ceiling(here.device), dtype_of(here)
    for n in here.tokens:
        q, k, v, d_out = drawn(Size(n, n, heads=here.heads), here.device, dtype)
        work = 4 * n * n * here.heads * 128
        for kernel in trained(here):
            result = kernel.partial(q, k, v)
            rows = torch.linspace(0, n - 1, min(n, 64), device=here.device).long()
            scores = torch.einsum("bsnd,btnd->bnst", q[:, rows].float(), k.float()) / 128**0.5
            error = relative(result.out[:, rows], torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v.float()))
            del scores
            runs = {"forward": (partial(kernel.partial, q, k, v), work)}
            runs["backward"] = partial(kernel.backward, d_out, q, k, v, result), 5 * work // 2  # type: ignore[arg-type]
            for what, (run, flop) in runs.items():
                seconds, gib = timed(run, here.device), peak(here, run)
                yield Row(
                    f"{kernel.name} {what}, {n:,}", passed=error <= TOLERANCE[dtype], error=error, ms=1000 * seconds,
                    tflops=flop / seconds / 1e12, mfu=flop / seconds / top, peak_gib=gib,
                )


# --- 3 to 5: savers of memory, compiled blocks, whole steps -----------------------------------------------------------


def savers(here: Setup) -> Iterator[Row]:
    """Swapped blocks and offloaded inputs give the plain run's gradients to the bit, five steps in a row."""
    want = _five_steps(here, "full", 0)
    for policy, swap in [("selective", 0), ("offload", 0), ("full", 2), ("offload", 2)]:
        error = max(relative(a, b) if b.any() else 0.0 for a, b in zip(_five_steps(here, policy, swap), want, strict=True))
        yield Row(f"{policy}, {swap} blocks swapped", passed=error == 0, error=error, note="bit for bit, as full")


def _five_steps(here: Setup, policy: str, swap: int) -> list[Tensor]:
    arch = replace(here.flavor.arch, double=4, single=6)
    torch.manual_seed(0)
    model = build(here.spec, replace(here.flavor, arch=arch), Case(True, "sdpa"), here.device)
    swapped = BlockSwap(model.blocks, swap, here.device) if swap else None
    ctx = ParallelContext(device=here.device)
    parallelize(model, ctx, kernel="sdpa", recompute=policy, dtype=torch.bfloat16, visits=swapped)
    torch.manual_seed(1)
    width, height, frames = here.sizes[0]
    with torch.device(here.device):
        inp = fake_input(here.spec, here.flavor, Shape(1, frames, height // 2, width // 2))
    values = {n: torch.randn_like(c) if c.is_floating_point() else c for n, c in inp.cond.items()}
    inp = replace(inp, x=torch.randn_like(inp.x), t=torch.full_like(inp.t, 500.0), cond=values)
    step = step_of(model, inp, Case(True), here.device)
    for _ in range(5):
        step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def blocks(here: Setup) -> Iterator[Row]:
    """Two blocks of the model: eager and compiled, and how often is compiled over five lengths of text."""
    arch = replace(here.flavor.arch, double=1, single=1)
    flavor = replace(here.flavor, arch=arch)
    for width, height, frames in here.sizes:
        shape, times = Shape(1, frames, height, width), {}
        with torch.device(here.device):
            inp = fake_input(here.spec, flavor, shape)
        work = flops(here.spec, flavor, shape, training=True)
        for compiled in (False, True):
            case = Case(True, "auto", compiled=compiled, recompute="selective")
            times[compiled] = timed(our_step(here.spec, flavor, case, inp, here.device), here.device)
            what = f"LoRA step of 2 blocks, {'compiled' if compiled else 'eager'}, {width}x{height}x{frames}"
            note = f"{times[False] / times[True]:.2f}x eager" if compiled else ""
            yield Row(what, ms=1000 * times[compiled], tflops=work / times[compiled] / 1e12, note=note)
    torch._dynamo.utils.counters.clear()
    step_of_length = partial(_with_text, inp)
    model = build(here.spec, flavor, Case(True, compiled=True), here.device)
    for length in (7, 11, 20, 5, 16):
        step_of(model, step_of_length(length), Case(True), here.device)()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield Row("graphs over 5 text lengths", passed=graphs <= 6, note=str(graphs))


def _with_text(inp, length: int):  # type: ignore[no-untyped-def]
    return replace(inp, lengths={name: (length,) * len(n) for name, n in inp.lengths.items()})


def steps(here: Setup) -> Iterator[Row]:
    """The whole model, random weights: sampling, and LoRA steps under every policy, beside what `hvtrain fit` says."""
    top, about = ceiling(here.device), Candidate(here.spec, here.flavor)
    ends = [here.sizes[0], here.sizes[-1]] if len(here.sizes) > 1 else list(here.sizes)
    wanted = [(Case(False), size) for size in ends]
    wanted += [(Case(True, recompute=policy), here.sizes[0]) for policy in ("full", "selective", "offload", "none")]
    wanted.append((Case(True, recompute="full", compiled=True), here.sizes[0]))
    for case, (width, height, frames) in wanted:
        shape = Shape(1, frames, height, width)
        with torch.device(here.device):
            inp = fake_input(here.spec, here.flavor, shape)
        work = flops(here.spec, here.flavor, shape, training=case.training)
        step = our_step(here.spec, here.flavor, case, inp, here.device)
        seconds = timed(step, here.device, repeats=1 if here.cuda else 2)
        gib = peak(here, step)
        fit = _fit(about, shape, case)
        passed = gib is None or abs(fit / gib - 1) <= 0.1
        yield Row(
            f"{case}, {width}x{height}x{frames}", passed=passed, ms=1000 * seconds, tflops=work / seconds / 1e12,
            mfu=work / seconds / top, peak_gib=gib, fit_gib=fit,
        )
        del step


def _fit(about: Candidate, shape: Shape, case: Case) -> float:
    model, alone = ModelConfig(name=about.spec.name), ParallelConfig()
    if not case.training:
        return of_sampling(model, alone, about, shape, 1).budget.total / GIB
    zero, run = ZeroConfig(engine="torch"), RunSettings(recompute=case.recompute)  # type: ignore[arg-type]
    return of_training(Training(model, AdapterConfig(rank=RANK), alone, zero, run), about, shape, 1).budget.total / GIB


# --- 6 to 9: float8, DeepSpeed, process groups, VAE -------------------------------------------------------------------


def float8(here: Setup) -> Iterator[Row]:
    width = 3072 if here.cuda else 64
    rows = 119_056 if here.cuda else 96
    for name, n_in, n_out in (("qkv", width, 3 * width), ("fc2", 4 * width, width), ("linear2", 5 * width, width)):
        weight = torch.randn(n_out, n_in, device=here.device, dtype=torch.bfloat16) / n_in**0.5
        values, _ = quantize(weight, "fp8")
        for m in (rows, rows + 1):
            x = torch.randn(m, n_in, device=here.device, dtype=torch.bfloat16)
            plain = timed(lambda: F.linear(x, weight), here.device)  # noqa: B023
            yield Row(f"{name} bfloat16, M {m:,}", ms=1000 * plain, tflops=2 * m * n_in * n_out / plain / 1e12)
            if not has_matmul(here.device):
                yield Row(f"{name} float8, M {m:,}", note="this device multiplies no float8")
                continue
            want = F.linear(x[:512], dequantize(values, None, torch.bfloat16))
            error = relative(multiply(x[:512], values, None), want)
            eight = timed(lambda: multiply(x, values, None), here.device)  # noqa: B023
            yield Row(
                f"{name} float8, M {m:,}", passed=error < 0.1, error=error, ms=1000 * eight,
                tflops=2 * m * n_in * n_out / eight / 1e12, note=f"{plain / eight:.2f}x bfloat16",
            )


def engines(here: Setup) -> Iterator[Row]:
    """Every ZeRO stage of one process against plain PyTorch: six steps of a small network."""
    from tests.parallel.test_engine import TORCH, make_engine, train

    alone = ParallelContext(device=here.device)
    want = train(make_engine(TORCH, ParallelContext()), ParallelContext())
    ctx = start(device=here.device)
    try:
        for stage in (0, 1, 2, 3):
            for offload in ("none", "cpu") if stage else ("none",):
                got = train(_on(here, make_engine, ZeroConfig(stage=stage, offload_optimizer=offload), ctx), alone)
                error = max(relative(got.params[n], p) for n, p in want.params.items())
                yield Row(f"ZeRO-{stage}, optimizer on {offload}", passed=error < 1e-4, error=error)
    finally:
        shutdown()


def _on(here: Setup, make: Callable, zero: ZeroConfig, ctx: ParallelContext):  # type: ignore[no-untyped-def]
    """An engine whose small network takes its inputs where they are made, on the CPU."""
    engine = make(zero, ctx)
    if here.cuda:
        model = engine.model
        engine.model = lambda x: model(x.to(here.device)).cpu()
    return engine


def groups(here: Setup) -> Iterator[Row]:
    """Process groups as a job makes them, of one process: NCCL and gloo side by side, flags past the GPU's queue."""
    ctx = start(device=here.device)
    from hvtrain.parallel.context import solo_group

    try:
        solo_group(ctx)
        tensor = torch.ones(8, device=here.device)
        torch.distributed.all_reduce(tensor)
        torch.distributed.barrier()
        values: list = [None]
        torch.distributed.all_gather_object(values, {"a": 1})
        yield Row("all-reduce, barrier, objects", passed=float(tensor.sum()) == 8 and values == [{"a": 1}])
    finally:
        shutdown()


def vae(here: Setup) -> Iterator[Row]:
    """One tile, and so the whole picture."""
    from diffusers import AutoencoderKLHunyuanVideo

    if here.cuda:
        model = AutoencoderKLHunyuanVideo().to(here.device, torch.float16).eval()
        z = torch.randn(1, 16, 17, 32, 32, device=here.device, dtype=torch.float16)
    else:
        model = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 32), layers_per_block=1).eval()
        z = torch.randn(1, 16, 1, 4, 4)
    for fixed in (False, True):
        torch.backends.cudnn.benchmark = fixed
        with torch.no_grad():
            run = partial(model.decode, z)
            gib = peak(here, run)
            seconds = timed(run, here.device, repeats=1)
        note = f"720x1280x129 is 76 tiles: {76 * seconds:.0f} s"
        yield Row(f"decode a tile, cudnn.benchmark {fixed}", ms=1000 * seconds, peak_gib=gib, note=note)
    torch.backends.cudnn.benchmark = False


CHECKS = {
    check.name: check
    for check in (
        Check("versions", "what is here: card, cuDNN, kernels, speed of products and copies", 10, versions),
        Check("kernels", "attention kernels against float64 at all lengths, and merged as in a ring", 40, kernel_values),
        Check("attention", "every attention kernel's speed and memory at 18k, 67k and 119k tokens", 60, attention_speed),
        Check("savers", "selective, offload and swapped blocks give the same to the bit", 60, savers),
        Check("blocks", "two blocks of the 13B, eager and compiled; how often is compiled", 120, blocks),
        Check("steps", "whole steps of the 13B: time, MFU, peak memory against hvtrain fit", 120, steps),
        Check("float8", "float8 products against bfloat16", 30, float8),
        Check("engines", "ZeRO stages of one process against plain PyTorch", 60, engines),
        Check("groups", "process groups of one process", 15, groups),
        Check("vae", "one tile of the VAE", 30, vae),
    )
}
