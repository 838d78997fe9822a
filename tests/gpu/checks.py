"""The checks themselves: each yields rows and needs nothing of another."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import Tensor

from hvtrain.config import AdapterConfig, ModelConfig, ParallelConfig, RunSettings, ZeroConfig
from hvtrain.fit.estimate import Candidate, Training, of_sampling, of_training
from hvtrain.fit.trace import Shape, fake_input
from hvtrain.models.dit import ModelInput
from hvtrain.models.kernels import KERNELS, Kernel, Partial
from hvtrain.models.measure import RESIDUES, TOLERANCE, Size, drawn, errors, timed, wrongs
from hvtrain.models.spec import Flavor
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.parallel.swap import BlockSwap
from hvtrain.parallel.usp import _merge
from tests.bench.bench_step import RANK, Case, build, ceiling, flops, our_step, step_of
from tests.gpu.float8 import float8_products
from tests.gpu.ranks import shared_attention
from tests.gpu.report import Check, Row, Setup
from tests.gpu.sparse import sparse_attention
from tests.gpu.work import GIB, dtype_of, peak, relative, trained

# --- 0 to 2: the machine, and attention alone ---------------------------------------------------------------


def versions(here: Setup) -> Iterator[Row]:
    name = torch.cuda.get_device_name(here.device) if here.cuda else "CPU"
    yield Row("device", note=f"{name}, Python {sys.version.split()[0]}, CUDA {torch.version.cuda}")
    yield Row(
        "cuDNN",
        note=f"{torch.backends.cudnn.version()}; order {getattr(torch._C, '_get_sdp_priority_order', str)()}"
    )
    yield Row(
        "kernels",
        note="; ".join(f"{n}: {k.missing(here.device, dtype_of(here)) or 'runs'}" for n, k in KERNELS.items())
    )
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
    """Against float64 at all residues, scores far below zero, and keys in parts
    that are merged as a ring does."""
    dtype = dtype_of(here)
    for kernel in trained(here):
        wrong = dict(wrongs(kernel, here.device, dtype))
        worst = errors(kernel, Size(256 + RESIDUES[3], 256 + RESIDUES[3]), here.device, dtype).worst
        note = "; ".join(f"{at}: {e.worst:.1e}" for at, e in list(wrong.items())[:3])
        yield Row(f"{kernel.name}, lengths", passed=not wrong, error=worst, note=note)
        for parts in (2, 4, 5):
            found = max(_in_parts(kernel, here, parts), key=lambda e: (e != e, e))
            yield Row(f"{kernel.name}, keys in {parts} parts", passed=found <= TOLERANCE[dtype], error=found)
        found = max(_of_views(kernel, here), key=lambda e: (e != e, e))
        yield Row(f"{kernel.name}, views of a fused product", passed=found <= TOLERANCE[dtype], error=found)


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
    got = (
        sum(p.q.float() for p in pieces), torch.cat([p.k for p in pieces], 1),
        torch.cat([p.v for p in pieces], 1)
    )
    pairs = [(merged.out, whole.out), (merged.lse, whole.lse), *zip(got, want, strict=True)]
    return [relative(have, ref) for have, ref in pairs]


def _of_views(kernel: Kernel, here: Setup) -> list[float]:
    """q, k, v as one product leaves them, side by side, and a gradient whose heads come first."""
    q, k, v, d_out = drawn(Size(193, 193, batch=2), here.device, dtype_of(here))
    assert kernel.backward is not None
    found = []
    for tensors in ((q, k, v), torch.stack([q, k, v], 2).unbind(2)):
        result = kernel.partial(*tensors)
        gradient = d_out if tensors[0] is q else d_out.transpose(1, 2).contiguous().transpose(1, 2)
        found.append([*result, *kernel.backward(gradient, *tensors, result)])
    return [relative(have, want) for want, have in zip(*found, strict=True)]


def attention_speed(here: Setup) -> Iterator[Row]:
    top, dtype = ceiling(here.device), dtype_of(here)
    for n in here.tokens:
        q, k, v, d_out = drawn(Size(n, n, heads=here.heads), here.device, dtype)
        work = 4 * n * n * here.heads * 128
        for kernel in trained(here):
            result = kernel.partial(q, k, v)
            rows = torch.linspace(0, n - 1, min(n, 64), device=here.device).long()
            scores = torch.einsum("bsnd,btnd->bnst", q[:, rows].float(), k.float()) / 128**0.5
            error = relative(
                result.out[:, rows], torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v.float())
            )
            del scores
            runs = {"forward": (partial(kernel.partial, q, k, v), work)}
            runs["backward"] = partial(kernel.backward, d_out, q, k, v, result), 5 * work // 2  # type: ignore[arg-type]
            for what, (run, flop) in runs.items():
                seconds, gib = timed(run, here.device), peak(here, run)
                yield Row(
                    f"{kernel.name} {what}, {n:,}", passed=error <= TOLERANCE[dtype], error=error,
                    ms=1000 * seconds, tflops=flop / seconds / 1e12, mfu=flop / seconds / top, peak_gib=gib,
                )


# --- 3 to 5: savers of memory, compiled blocks, whole steps -------------------------------------------------


def savers(here: Setup) -> Iterator[Row]:
    """Swapped blocks and offloaded inputs give the plain run's gradients to the bit, five steps
    in a row. Copies of swapped blocks begin late: who does not wait for them computes with a
    block that is not there yet."""
    want = _five_steps(here, "full", 0)
    for policy, swap in [("selective", 0), ("offload", 0), ("full", 2), ("offload", 2)]:
        error = max(
            relative(a, b) if b.any() else 0.0 for a,
            b in zip(_five_steps(here, policy, swap), want, strict=True)
        )
        yield Row(
            f"{policy}, {swap} blocks swapped", passed=error == 0, error=error, note="bit for bit, as full"
        )


def _five_steps(here: Setup, policy: str, swap: int) -> list[Tensor]:
    arch = replace(here.flavor.arch, double=4, single=6)
    torch.manual_seed(0)
    model = build(here.spec, replace(here.flavor, arch=arch), Case(True, "sdpa"), here.device)
    swapped = BlockSwap(model.blocks, swap, here.device) if swap else None
    ctx = ParallelContext(device=here.device)
    parallelize(model, ctx, kernel="sdpa", recompute=policy, dtype=torch.bfloat16, visits=swapped)
    width, height, frames = here.sizes[0]
    step = step_of(
        model, _random_input(here, here.flavor, Shape(1, frames, height // 2, width // 2)), Case(True),
        here.device
    )
    for _ in range(5):
        if swapped is not None and swapped.stream is not None:
            with torch.cuda.stream(swapped.stream):
                torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def _random_input(here: Setup, flavor: Flavor, shape: Shape) -> ModelInput:
    torch.manual_seed(1)
    with torch.device(here.device):
        inp = fake_input(here.spec, flavor, shape)
    values = {n: torch.randn_like(c) if c.is_floating_point() else c for n, c in inp.cond.items()}
    return replace(inp, x=torch.randn_like(inp.x), t=torch.full_like(inp.t, 500.0), cond=values)


def blocks(here: Setup) -> Iterator[Row]:
    """Two blocks of the model: eager and compiled, where the time goes, and how often is
    compiled over five lengths of text."""
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
    yield Row(
        "kernels that take longest, eager",
        note=_longest(our_step(here.spec, flavor, Case(True), inp, here.device), here)
    )
    width, height, frames = here.sizes[0]
    values = _random_input(here, flavor, Shape(1, frames, height, width))
    both = [_gradients(here, flavor, values, compiler) for compiler in (None, "inductor")]
    error = max(relative(b, a) for a, b in zip(*both, strict=True))
    yield Row("gradients compiled, float32", passed=error <= 1e-4, error=error)
    torch._dynamo.utils.counters.clear()
    step_of_length = partial(_with_text, inp)
    model = build(here.spec, flavor, Case(True, compiled=True), here.device)
    for length in (7, 11, 20, 5, 16):
        step_of(model, step_of_length(length), Case(True), here.device)()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield Row("graphs over 5 text lengths", passed=graphs <= 6, note=str(graphs))


def _gradients(here: Setup, flavor: Flavor, inp: ModelInput, compiler: str | None) -> list[Tensor]:
    torch.manual_seed(0)
    model = build(here.spec, flavor, Case(True), here.device).float()
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.02)  # a new LoRA adds nothing
    parallelize(
        model, ParallelContext(device=here.device), kernel="sdpa", recompute="selective", compiler=compiler
    )
    model(inp).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _longest(step: Callable[[], None], here: Setup) -> str:
    """Each one's share of a step's time on the device."""
    step()
    with torch.profiler.profile() as seen:
        step()
        if here.cuda:
            torch.cuda.synchronize(here.device)
    time = "self_device_time_total" if here.cuda else "self_cpu_time_total"
    found = sorted(((getattr(e, time), e.key) for e in seen.key_averages()), reverse=True)
    total = sum(t for t, _ in found)
    return "; ".join(f"{t / total:.0%} {name[:40]}" for t, name in found[:15])


def _with_text(inp, length: int):  # type: ignore[no-untyped-def]
    return replace(inp, lengths={name: (length,) * len(n) for name, n in inp.lengths.items()})


def steps(here: Setup) -> Iterator[Row]:
    """The whole model, random weights: sampling, and LoRA steps under every policy,
    beside what `hvtrain fit` says."""
    top, about = ceiling(here.device), Candidate(here.spec, here.flavor)
    ends = [here.sizes[0], here.sizes[-1]] if len(here.sizes) > 1 else list(here.sizes)
    wanted = [(Case(False), size) for size in ends]
    wanted += [
        (Case(True, recompute=policy), here.sizes[0]) for policy in ("full", "selective", "offload", "none")
    ]
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
            f"{case}, {width}x{height}x{frames}", passed=passed, ms=1000 * seconds,
            tflops=work / seconds / 1e12, mfu=work / seconds / top, peak_gib=gib, fit_gib=fit,
        )
        del step


def _fit(about: Candidate, shape: Shape, case: Case) -> float:
    model, alone = ModelConfig(name=about.spec.name), ParallelConfig()
    if not case.training:
        return of_sampling(model, alone, about, shape, 1).budget.total / GIB
    zero, run = ZeroConfig(engine="torch"), RunSettings(recompute=case.recompute)  # type: ignore[arg-type]
    return of_training(
        Training(model, AdapterConfig(rank=RANK), alone, zero, run), about, shape, 1
    ).budget.total / GIB


# --- 7 to 9: DeepSpeed, process groups, VAE -----------------------------------------------------------------


def engines(here: Setup) -> Iterator[Row]:
    """Every ZeRO stage of one process against plain PyTorch: six steps of a small network, at once and from
    what PyTorch left after three; gradients reduced beside the backward or after it."""
    from tests.parallel.test_engine import TORCH, make_engine, train

    alone = ParallelContext(device=here.device)
    want, saved = (train(make_engine(TORCH, ParallelContext()), ParallelContext(), until=n) for n in (6, 3))
    ctx = start(device=here.device)
    try:
        for stage in (0, 1, 2, 3):
            for offload in ("none", "cpu") if stage else ("none",):
                got = train(
                    _on(here, make_engine, ZeroConfig(stage=stage, offload_optimizer=offload), ctx), alone
                )
                error = max(relative(got.params[n], p) for n, p in want.params.items())
                yield Row(f"ZeRO-{stage}, optimizer on {offload}", passed=error < 1e-4, error=error)
            resumed = _on(here, make_engine, ZeroConfig(stage=stage), ctx)
            resumed.load_state(saved.params, saved.optimizer, n_steps=3)
            got = train(resumed, alone)
            error = max(relative(got.params[n], p) for n, p in want.params.items())
            yield Row(f"ZeRO-{stage}, resumed", passed=error < 1e-4, error=error)
        for stage, beside in [(s, b) for s in (1, 2, 3) for b in (False, True)]:
            with tempfile.TemporaryDirectory() as folder:
                own = Path(folder, "deepspeed.json")
                own.write_text(json.dumps({"zero_optimization": {"overlap_comm": beside}}))
                got = train(_on(here, make_engine, ZeroConfig(stage=stage, deepspeed=str(own)), ctx), alone)
            error = max(relative(got.params[n], p) for n, p in want.params.items())
            yield Row(f"ZeRO-{stage}, overlap_comm {str(beside).lower()}", passed=error < 1e-4, error=error)
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
    """Process groups as a job makes them, of one process: NCCL and gloo side by side,
    flags past the GPU's queue."""
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
        video = torch.randn(1, 3, 65, 256, 256, device=here.device, dtype=torch.float16)
    else:
        model = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 32), layers_per_block=1).eval()
        z, video = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, 1, 32, 32)
    for fixed in (False, True):
        torch.backends.cudnn.benchmark = fixed
        for what, run in (("decode", partial(model.decode, z)), ("encode", partial(model.encode, video))):
            with torch.no_grad():
                gib = peak(here, run)
                seconds = timed(run, here.device, repeats=1)
            note = f"720x1280x129 is 76 tiles: {76 * seconds:.0f} s"
            yield Row(f"{what} a tile, cudnn.benchmark {fixed}", ms=1000 * seconds, peak_gib=gib, note=note)
    torch.backends.cudnn.benchmark = False


CHECKS = {
    check.name: check
    for check in (
        Check("versions", "what is here: card, cuDNN, kernels, speed of products and copies", 5, versions),
        Check(
            "kernels", "attention kernels against float64 at all lengths, and merged as in a ring", 40,
            kernel_values
        ),
        Check(
            "attention", "every attention kernel's speed and memory at 18k, 67k and 119k tokens", 60,
            attention_speed
        ),
        Check("savers", "selective, offload and swapped blocks give the same to the bit", 40, savers),
        Check("blocks", "two blocks of the 13B, eager and compiled; how often is compiled", 120, blocks),
        Check("steps", "whole steps of the 13B: time, MFU, peak memory against hvtrain fit", 120, steps),
        Check("float8", "float8 products: values, speed of each part, what auto takes", 30, float8_products),
        Check("engines", "ZeRO stages of one process against plain PyTorch", 30, engines),
        Check("groups", "process groups of one process", 10, groups),
        Check("ranks", "Ulysses and ring of 2 and 4 processes that share the device", 30, shared_attention),
        Check("vae", "one tile of the VAE", 30, vae),
        Check(
            "sparse", "sparse attention: values, and speed at the largest size beside exact", 35,
            sparse_attention
        ),
    )
}
