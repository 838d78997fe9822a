"""A training step and a sampling step at real size: time, tokens/s, MFU, peak memory.

    python -m tests.bench.bench_step               # a GPU: 13B, 544 x 960 x {33, 129}, 720 x 1280 x 129
    python -m tests.bench.bench_step --flavor tiny --sizes 64x64x9     # anywhere, to see that it runs

Random weights at the flavor's real dimensions. One row for each size x {LoRA training, sampling} x attention
kernel that this device has, then torch.compile of the blocks, float8 weights (multiplied as they are where
that is measured to be faster), diffusers' model in the same run. FLOPs are those of a step without
recomputation (hvtrain.fit's trace); MFU is against this device's own measured bfloat16 matmul. What does not
fit or run says so in its row. Prints a table, asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hvtrain.adapters.attach import inject, linear_shapes
from hvtrain.fit.trace import Shape, fake_input, simulated, trace_step
from hvtrain.models import all_specs, find
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.kernels import KERNELS, pick_kernel
from hvtrain.models.measure import LONG
from hvtrain.models.precision import autocast
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.products import pick_products
from hvtrain.weights.float8 import quantize, replace_linear, use_products

RANK = 32


@dataclass(frozen=True)
class Case:
    """One row."""

    training: bool
    kernel: str = "auto"
    compiled: bool = False
    quantized: str = "none"
    recompute: str = "full"

    def __str__(self) -> str:
        parts = [
            self.kernel, *(["compiled"] if self.compiled else []),
            *([self.quantized] if self.quantized != "none" else [])
        ]
        if self.training and self.recompute != "full":
            parts.append(f"recompute {self.recompute}")
        return ("LoRA training, " if self.training else "sampling, ") + " ".join(parts)


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(spec: ModelSpec, flavor: Flavor, case: Case, device: torch.device) -> DiT:
    with _dtype(torch.bfloat16), torch.device(device):
        model = spec.build(flavor.arch)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    if case.quantized != "none":
        for name in spec.lora_targets(model):
            replace_linear(model, name, *quantize(model.get_submodule(name).weight.data, case.quantized))
        shapes = set(linear_shapes(model).values()) if case.quantized == "fp8" else set()
        use_products(
            model, pick_products(
                "auto", shapes, ParallelContext(device=device), dtype=torch.bfloat16, tokens=LONG.tokens,
                learns=case.training, factors=False,
            )
        )
    model.requires_grad_(False)
    if case.training:
        inject(model, spec.lora_targets(model), rank=RANK)
    ctx = ParallelContext(device=device)
    parallelize(
        model, ctx, kernel=case.kernel, dtype=torch.bfloat16, training=case.training,
        recompute=case.recompute if case.training else "none", compiler="inductor" if case.compiled else None,
    )
    return model.train(case.training)


def flops(spec: ModelSpec, flavor: Flavor, shape: Shape, *, training: bool) -> int:
    with simulated(world=1, ulysses=1, ring=1) as ctx:
        with _dtype(torch.bfloat16):
            model = spec.build(flavor.arch).requires_grad_(False)
        if training:
            inject(model, spec.lora_targets(model), rank=RANK)
        return trace_step(model, fake_input(spec, flavor, shape), ctx=ctx, training=training).flops


def step_of(model: DiT, inp: ModelInput, case: Case, device: torch.device) -> Callable[[], None]:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True) if params else None

    def step() -> None:
        with torch.set_grad_enabled(case.training), autocast(device.type, enabled=True):
            out = model(inp)
        if optimizer is not None:
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def our_step(
    spec: ModelSpec, flavor: Flavor, case: Case, inp: ModelInput, device: torch.device
) -> Callable[[], None]:
    return step_of(build(spec, flavor, case, device), inp, case, device)


def measured(step: Callable[[], None], device: torch.device, *, repeats: int) -> tuple[float, float]:
    """(seconds, peak GiB) of the fastest of some steps, after one to warm up."""
    cuda = device.type == "cuda"
    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    best = float("inf")
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best, torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")


def ceiling(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 matmul here."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / measured(lambda: torch.mm(a, b), device, repeats=10)[0]


def cases(device: torch.device) -> list[Case]:
    kernels = [n for n in KERNELS if KERNELS[n].missing(device, torch.bfloat16) is None]
    best = pick_kernel("auto", device=device, dtype=torch.bfloat16).name
    found = [Case(False, k) for k in kernels] + [Case(True, k) for k in kernels if KERNELS[k].trains]
    found += [
        Case(True, best, recompute="selective"), Case(False, best, compiled=True),
        Case(True, best, compiled=True)
    ]
    return found + [Case(t, best, quantized=q) for q in ("fp8", "fp8_scaled") for t in (False, True)]


def diffusers_step(flavor: Flavor, inp: ModelInput, device: torch.device) -> Callable[[], None]:
    """diffusers' transformer of the same sizes, sampling."""
    from diffusers import HunyuanVideoTransformer3DModel

    a = flavor.arch
    with _dtype(torch.bfloat16), torch.device(device):
        model = HunyuanVideoTransformer3DModel(
            in_channels=a.in_channels, out_channels=a.out_channels, num_attention_heads=a.heads_num,
            attention_head_dim=a.hidden_size // a.heads_num, num_layers=a.double, num_single_layers=a.single,
            num_refiner_layers=a.refiner_depth, text_embed_dim=a.text_dim, pooled_projection_dim=a.pooled_dim,
            rope_axes_dim=a.rope_dims, rope_theta=a.rope_theta, guidance_embeds=a.guidance_embed,
        ).eval()
    mask = torch.ones(inp.cond["text"].shape[:2], device=device, dtype=torch.bfloat16)

    def step() -> None:
        with torch.no_grad():
            model(
                hidden_states=inp.x.bfloat16(), timestep=inp.t,
                encoder_hidden_states=inp.cond["text"].bfloat16(), encoder_attention_mask=mask,
                pooled_projections=inp.cond["pooled"].bfloat16(), guidance=inp.cond["guidance"],
            )

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=next(iter(all_specs())).name)
    parser.add_argument("--flavor")
    parser.add_argument(
        "--sizes", nargs="+", default=["960x544x33", "960x544x129", "1280x720x129"], metavar="WxHxF"
    )
    parser.add_argument(
        "--rows", nargs="+", default=[""], metavar="TEXT", help="only steps whose name has one of these in it"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    spec = find(args.model)
    flavor = spec.flavor(args.flavor) if args.flavor else next(iter(spec.flavors.values()))
    top = ceiling(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(title=f"{spec.name} {flavor.name} on {name}; bfloat16 matmul {top / 1e12:,.1f} TFLOP/s")
    for column in ("size", "step", "ms", "tokens/s", "TFLOP", "MFU", "peak GiB"):
        table.add_column(column, justify="left" if column in ("size", "step") else "right")
    for size in args.sizes:
        width, height, frames = (int(n) for n in size.split("x"))
        shape = Shape(1, frames, height, width)
        n_tokens = flavor.latent.n_tokens(flavor.latent.shape(frames=frames, height=height, width=width))
        with torch.device(device):
            inp = fake_input(spec, flavor, shape)
        work = {training: flops(spec, flavor, shape, training=training) for training in (False, True)}
        rows: list[tuple[str, bool, Callable[[], Callable[[], None]]]] = [
            (str(case), case.training, partial(our_step, spec, flavor, case, inp, device))
            for case in cases(device)
        ]
        rows.append(("sampling, diffusers", False, partial(diffusers_step, flavor, inp, device)))
        for label, training, make in [row for row in rows if any(text in row[0] for text in args.rows)]:
            try:
                seconds, peak = measured(make(), device, repeats=args.repeats)
            except Exception as error:  # the row says it
                table.add_row(
                    size, label,
                    f"{type(error).__name__} {str(error).splitlines()[0][:50] if str(error) else ''}"
                )
            else:
                share = work[training] / seconds / top
                table.add_row(
                    size, label, f"{seconds * 1e3:,.1f}", f"{n_tokens / seconds:,.0f}",
                    f"{work[training] / 1e12:,.3f}", f"{share:.2f}", f"{peak:.1f}",
                )
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
