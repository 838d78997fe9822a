"""A LoRA's training step on a CPU beside diffusers + PEFT + plain PyTorch: seconds and
peak memory, of the same weights.

    python -m tests.bench.bench_lora [--tokens 2048 4096 8192] [--width 768]
    [--double 1] [--single 2] [--repeats 3]

HunyuanVideo's transformer of small depth with heads of 128, bfloat16 weights, float32 LoRA of the same rank
on the same layers (ours has one pair for a fused q, k, v, theirs three), the blocks checkpointed, AdamW,
one clip and 256 valid tokens of text. Each program is a process of its own with one thread; they take their
steps in turn, and the fastest of each counts. Peak memory is what the process holds at most in its steps
over what it held before it made its model. `output`: how far the first forward is from ours in float32, in
norm. Prints a table, asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hvtrain.adapters.attach import inject
from hvtrain.adapters.lora import LoraLinear
from hvtrain.models import find
from hvtrain.models.dit import DiT, ModelInput
from hvtrain.models.hunyuan_video.arch import HunyuanVideoArch
from hvtrain.models.kernels import KERNELS
from hvtrain.models.precision import autocast
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator

RANK, TEXT, SIDE = 32, 256, 32  # SIDE: of the latents, 256 tokens a frame
SPEC = find("hunyuan-video")
CPU = torch.device("cpu")
Step = Callable[[], Tensor]  # a whole training step; the velocity [B C T H W]


@dataclass(frozen=True)
class Size:
    tokens: int
    width: int
    double: int
    single: int

    @property
    def arch(self) -> HunyuanVideoArch:
        return replace(
            SPEC.flavors["t2v"].arch, hidden_size=self.width, heads_num=self.width // 128, double=self.double,
            single=self.single, text_dim=1024,
        )


def weights(size: Size) -> dict[str, Tensor]:
    """float32, under official names, of unit scale: each matrix keeps the size of what goes through it."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in SPEC.build(size.arch).state_dict().items()}
    found = {}
    for name, shape in shapes.items():
        draw = torch.randn(shape, generator=generator(0, stream=name))
        found[name] = (
            draw / draw[0].numel() ** 0.5
            if len(shape) > 1 else (1 + 0.1 * draw if "norm" in name else 0.1 * draw)
        )
    return found


def an_input(size: Size) -> ModelInput:
    draw = generator(0, stream="input")
    x = torch.randn(1, 16, size.tokens // (SIDE // 2) ** 2, SIDE, SIDE, generator=draw)
    cond = {
        "text": torch.randn(1, TEXT, size.arch.text_dim, generator=draw), "text_len": torch.tensor([TEXT]),
        "pooled": torch.randn(1, size.arch.pooled_dim, generator=draw),
    }
    return SPEC.make_input(x, torch.tensor([0.5]), cond, task="t2v", guidance=6.0, x0=x)


def training(model: nn.Module, forward: Callable[[], Tensor], *, cast: bool = True) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> Tensor:
        with autocast("cpu", enabled=cast):
            out = forward()
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.detach().float()

    return step


def ours(size: Size, *, dtype: torch.dtype = torch.bfloat16, kernel: str = "auto", **options) -> DiT:
    model = SPEC.build(size.arch)
    model.load_state_dict(weights(size))
    model.to(dtype).requires_grad_(False)
    inject(model, SPEC.lora_targets(model), rank=RANK)
    chosen = KERNELS[kernel] if kernel != "auto" else kernel
    parallelize(model, ParallelContext(device=CPU), kernel=chosen, dtype=dtype, **options)
    return model.train()


def our_step(size: Size, **options) -> Step:
    model, inp = ours(size, **options), an_input(size)
    return training(model, lambda: model(inp))


def beside_step(size: Size) -> Step:
    """The LoRA in products of its own, added to the base's output."""
    LoraLinear.joined = lambda self, x, scale: None  # type: ignore[method-assign, assignment]
    return our_step(size, recompute="full")


def exact(size: Size) -> Tensor:
    with torch.no_grad():
        return ours(size, dtype=torch.float32, kernel="sdpa")(an_input(size))


def their_step(size: Size, *, cast: bool = True) -> Step:
    """diffusers' transformer and PEFT's LoRA. `cast`: under autocast with a float32 LoRA, as diffusers' own
    training scripts do; else everything is bfloat16."""
    from diffusers import HunyuanVideoTransformer3DModel
    from peft import LoraConfig

    a, inp = size.arch, an_input(size)
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=a.heads_num, num_layers=a.double, num_single_layers=a.single,
        text_embed_dim=a.text_dim, pooled_projection_dim=a.pooled_dim,
    )
    own = weights(size)
    model.load_state_dict(
        {name: cut.take(own[cut.source]) for name, cut in SPEC.key_maps["diffusers"].write(own).items()}
    )
    del own
    model.to(torch.bfloat16).requires_grad_(False)
    blocks = re.compile(r"(single_)?transformer_blocks\.(?!.*(norm|norm1|norm1_context)\.linear$)")
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and blocks.match(n)]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.float32 if cast else torch.bfloat16)
    model.enable_gradient_checkpointing()
    model.train()
    given = {
        "hidden_states": inp.x.bfloat16(), "timestep": inp.t,
        "encoder_hidden_states": inp.cond["text"].bfloat16(),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bfloat16), "guidance": inp.cond["guidance"],
        "pooled_projections": inp.cond["pooled"].bfloat16(), "return_dict": False,
    }
    return training(model, lambda: model(**given)[0], cast=cast)


PROGRAMS: dict[str, Callable[[Size], Step]] = {
    "ours": lambda size: our_step(size, recompute="full"),
    "ours, torch's attention": lambda size: our_step(size, recompute="full", kernel="sdpa"),
    "ours, LoRA added after": beside_step,
    "ours, recompute selective": lambda size: our_step(size, recompute="selective"),
    "ours, compiled": lambda size: our_step(size, recompute="full", compiler="inductor"),
    "diffusers, autocast": their_step,
    "diffusers, all bfloat16": lambda size: their_step(size, cast=False),
}


# --- each program in a process of its own -------------------------------------------------------------------


def memory(key: str) -> int:
    """Bytes, of this process: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def serve(name: str, size: Size, reference: str) -> None:
    """Make the model and take a first step, then another for each line that comes; print what each took."""
    torch.set_num_threads(1)
    import diffusers  # noqa: F401 - of every program, so that none has it in its baseline alone
    import peft  # noqa: F401

    before = memory("VmRSS")
    step = PROGRAMS[name](size)
    wanted = torch.load(reference)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    error = float((step() - wanted).norm() / wanted.norm())
    print(json.dumps({"error": error}), flush=True)
    for _ in sys.stdin:
        begun, used = time.perf_counter(), time.process_time()
        step()
        seconds, busy = time.perf_counter() - begun, time.process_time() - used
        print(json.dumps({"seconds": seconds, "busy": busy, "peak": memory("VmHWM") - before}), flush=True)


def compare(size: Size, names: list[str], *, repeats: int, reference: Path) -> dict[str, dict[str, float]]:
    torch.save(exact(size), reference)
    told = json.dumps([size.tokens, size.width, size.double, size.single])
    found: dict[str, dict[str, float]] = {}
    children = {}
    for name in names:  # one after another: none disturbs another's first step
        command = [sys.executable, "-m", "tests.bench.bench_lora", "--serve", name, told, str(reference)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert child.stdout is not None
        children[name], found[name] = child, json.loads(child.stdout.readline() or "{}")
    for _ in range(repeats):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            row, best = json.loads(child.stdout.readline()), found[name]
            for key, least in (("seconds", min), ("busy", min), ("peak", max)):
                best[key] = least(best.get(key, row[key]), row[key])
    for child in children.values():
        child.communicate()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rows", nargs="+", default=[""], metavar="TEXT",
        help="only programs whose name has one of these in it"
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve[0], Size(*json.loads(args.serve[1])), args.serve[2])
    torch.set_num_threads(1)
    names = [name for name in PROGRAMS if any(text in name for text in args.rows)]
    table = Table(
        title=f"LoRA step, width {args.width}, {args.double} + {args.single} blocks, rank {RANK}, one thread "
        "of a CPU"
    )
    for column in ("tokens", "program", "s", "CPU s", "slower than the first", "peak MiB", "output"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for tokens in args.tokens:
        size = Size(tokens, args.width, args.double, args.single)
        reference = Path(f"/tmp/bench_lora_{tokens}_{time.time_ns()}.pt")
        try:
            found = compare(size, names, repeats=args.repeats, reference=reference)
        finally:
            reference.unlink(missing_ok=True)
        first = found[names[0]]
        for name, row in found.items():
            table.add_row(
                f"{tokens} + {TEXT}", name, f"{row['seconds']:.2f}", f"{row['busy']:.2f}",
                f"{row['busy'] / first['busy']:.2f}", f"{row['peak'] / 2**20:,.0f}", f"{row['error']:.4f}",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
