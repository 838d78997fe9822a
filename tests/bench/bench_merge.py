"""Merging LoRAs into a large checkpoint, beside `cp` of that file.

    python -m tests.bench.bench_merge [--gb 6] [--slices 8] [--rank 32] [--folder DIR]

The checkpoint has the official names and the widths of the full-size model with fewer blocks, random
bfloat16. Eight LORAID slices (rows, interleaved), then as many LoRAs over all rows. Every figure is a run of
its own process: seconds, and the peak of its anonymous memory (what the page cache cannot give back). The
commands take turns, the fastest round of each counts. Prints a table, asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hvtrain.lorafiles.metadata import lora_metadata
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.models import all_specs
from hvtrain.models.load import ARCH_KEY, FLAVOR_KEY, MODEL_KEY
from hvtrain.models.spec import ModelSpec
from hvtrain.slices.plan import FILE, Cut, load_plan
from hvtrain.slices.run import run as write_plan
from hvtrain.weights.stream import open_writer
from shards.tensors import Extent


def make_model(path: Path, spec: ModelSpec, gb: float) -> None:
    """Blocks of the full width, as many as fit."""
    full = next(iter(spec.flavors.values()))
    n = 1
    while True:
        arch = replace(full.arch, double=n, single=2 * n)
        with torch.device("meta"):
            state = spec.build(arch).state_dict()
        if 2 * sum(t.numel() for t in state.values()) >= gb * 1e9:
            break
        n += 1
    slots = [Extent(name, torch.bfloat16, tuple(t.shape)) for name, t in state.items()]
    metadata = {MODEL_KEY: spec.name, ARCH_KEY: json.dumps(asdict(arch)), FLAVOR_KEY: full.name}
    draw = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 24, generator=draw) * 0.02).bfloat16()
    with open_writer(path, slots, metadata=metadata) as writer:
        for slot in slots:
            size = torch.Size(slot.shape).numel()
            writer.write(slot.name, noise.repeat(-(-size // len(noise)))[:size].view(slot.shape))


def make_loras(folder: Path, model: Path, *, n: int, rank: int, sliced: bool) -> list[Path]:
    """Random pairs: of a plan's slices, or over all rows."""
    if not (folder / FILE).exists():
        cut = Cut(n=n, granularity="rows", order="interleaved")
        list(write_plan(cut, str(folder), dit=str(model), model=None, flavor=None))
    plan = load_plan(folder / FILE)
    outs, widths = {}, {}
    for s in plan.slices:
        for slot in s.slots:
            outs[slot.module] = max(outs.get(slot.module, 0), slot.end)
    from hvtrain.models.load import identify

    found = identify(model)
    for module in outs:
        widths[module] = found.weights.shapes[f"{module}.weight"][1]
    paths = []
    for s in plan.slices:
        g = torch.Generator().manual_seed(s.loraid)
        pairs = {}
        for slot in s.slots:
            up = torch.randn(outs[slot.module], rank, generator=g) * 0.01
            if sliced:
                up[: slot.begin] = 0
                up[slot.end :] = 0
            pairs[slot.module] = LoraPair(
                torch.randn(rank, widths[slot.module], generator=g) * 0.01, up, float(rank)
            )
        path = folder / f"{'slice' if sliced else 'whole'}-{s.loraid}.safetensors"
        meta = lora_metadata(path, {"ss_loraid": s.loraid}, architecture=plan.model, rank=rank, alpha=rank)
        write_lora(path, pairs, metadata=meta, dtype=torch.bfloat16)
        paths.append(path)
    return paths


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, peak anonymous MiB) of a process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
            except (OSError, TypeError, ValueError):
                pass
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    seconds = time.perf_counter() - begun
    thread.join()
    if code:
        raise SystemExit(f"{command} ended with {code}")
    return seconds, peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--rounds", type=int, default=3, help="every command this often, in turn; the fastest counts"
    )
    parser.add_argument("--folder", help="where the files go (default: the system's temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model, out = folder / "model.safetensors", folder / "merged.safetensors"
        make_model(model, all_specs()[0], args.gb)
        loras = {
            sliced: make_loras(folder / "loras", model, n=args.slices, rank=args.rank, sliced=sliced)
            for sliced in (True, False)
        }
        os.sync()
        print(
            f"{model.stat().st_size / 1e9:.2f} GB, {args.slices} LoRAs of rank {args.rank}, {os.cpu_count()} "
            "cores"
        )
        merge = [sys.executable, "-m", "launcher.cli", "merge", "--dit", str(model), "--output", str(out)]
        runs = [
            ("cp", ["cp", str(model), str(out)]),
            ("cp, then sync", ["sh", "-c", f"cp {model} {out} && sync {out}"])
        ]
        for sliced, policy in ((True, "error"), (False, "sum"), (False, "average")):
            given = [part for path in loras[sliced] for part in ("--lora", str(path))]
            label = f"{args.slices} slices" if sliced else f"{args.slices} overlapping, {policy}"
            runs.append((f"hvtrain merge, {label}", [*merge, *given, "--on-overlap", policy]))
        table = Table()
        for column in ("", "seconds", "slowest", "of cp", "of cp and sync", "peak anonymous MiB"):
            table.add_column(column, justify="right" if column else "left")
        seconds: dict[str, list[float]] = {label: [] for label, _ in runs}
        peaks: dict[str, float] = {}
        for _ in range(args.rounds):
            for label, command in runs:
                out.unlink(missing_ok=True)
                os.sync()
                taken, peaks[label] = measured(command)
                seconds[label].append(taken)
        for label, taken_ in seconds.items():
            best = min(taken_)
            ratios = [f"{best / min(seconds[other]):.2f}" for other in ("cp", "cp, then sync")]
            table.add_row(label, f"{best:.1f}", f"{max(taken_):.1f}", *ratios, f"{peaks[label]:.0f}")
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
