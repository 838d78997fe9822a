"""How fast shards are read and written, beside cat, tar, GET, webdataset and one safetensors file per sample.

    python -m tests.bench.bench_shards [--samples 240] [--folder DIR] [--repeat 5] [--only
    reading|url|writing]

URLs are those of a server on this machine (tests/bench/serve.py; fsspec needs the package aiohttp): at once,
and with 20 ms for each request as object storage has them.

One run, page cache warm; every figure is the best of --repeat passes over all samples. Samples have the size
of 544x960x33 latents in bfloat16 plus 256 LLaMA embeddings. A training run keeps its set open, so the passes
of "hvtrain" do; "opened anew" also maps the pages and compares checksums. Prints a table, asserts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import webdataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, load_file, save_file
from torch import Tensor

import shards
from shards import ShardSet, open_set
from shards.loader import BatchLoader
from shards.schema import EMPTY_TEXT, Chunk, Manifest, save_manifest
from shards.writer import write_tar

LATENTS = (16, 9, 68, 120)
TEXT = (256, 4096)
BATCH = 2
PER_TAR = 40


def samples(n: int) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        latents = torch.randn(LATENTS, generator=g).bfloat16()
        yield f"clip{i:06d}", {"latents": latents}, {
            "text": torch.randn(TEXT, generator=g).bfloat16(),
            "pooled": torch.randn(768, generator=g).bfloat16(),
        }


def make_set(root: Path, plain: Path, n: int) -> ShardSet:
    """The shard set, and the same samples as single files."""
    rows = list(samples(n))
    for folder in ("latents", "text"):
        (plain / folder).mkdir(parents=True)
    for key, latents, text in rows:
        save_file({**latents, **text}, str(plain / f"{key}.safetensors"))
        save_file(latents, str(plain / "latents" / f"{key}.safetensors"))
        save_file(text, str(plain / "text" / f"{key}.safetensors"))
    chunks = []
    for number, part in enumerate(
        itertools.batched(rows, PER_TAR) if hasattr(itertools, "batched") else _batched(rows)
    ):
        tars = {
            "latents": write_tar(
                root, f"latents/{number:03d}.tar", [(k, x, {"source": k}) for k, x, _ in part]
            ),
            "text": write_tar(root, f"text/{number:03d}.tar", [(k, t, {"caption": k}) for k, _, t in part]),
        }
        chunks.append(Chunk("33x544x960", tuple(k for k, _, _ in part), tars))
    save_file(rows[0][2], str(root / EMPTY_TEXT))
    save_manifest(root, Manifest(("latents", "text"), tuple(chunks)))
    return open_set(root)


def _batched(rows: list) -> Iterator[list]:
    for i in range(0, len(rows), PER_TAR):
        yield rows[i : i + PER_TAR]


def best(run: Callable[[], int], repeat: int) -> tuple[float, int]:
    """(seconds of the fastest pass, samples)."""
    times, n = [], 0
    for _ in range(repeat):
        begun = time.perf_counter()
        n = run()
        times.append(time.perf_counter() - begun)
    return min(times), n


# --- reading ------------------------------------------------------------------------------------------------


def cat(root: Path, n: int) -> Callable[[], int]:
    def run() -> int:
        subprocess.run(f"cat {root}/*/*.tar > /dev/null", shell=True, check=True)
        return n

    return run


def ours(root: Path | str, n: int, *, anew: bool = False, **options) -> Callable[[], int]:
    """As in training: the set stays open, the loader goes on, its workers live."""
    kept = None if anew else iter(BatchLoader(open_set(root), batch_size=BATCH, **options))

    def run() -> int:
        seen = 0
        for batch in kept or BatchLoader(open_set(root), batch_size=BATCH, **options):
            seen += len(batch.keys)
            if seen >= n:
                return seen
        raise AssertionError

    return run


def with_pipeline(root: Path | str) -> Callable[[], int]:
    pipe = shards.pipeline(root, batch_size=BATCH, buffer=0)
    return lambda: sum(len(batch["__key__"]) for batch in pipe)


def get(address: str, root: Path, n: int) -> Callable[[], int]:
    """Every tar by a request of its own, one after the other, to nowhere."""
    names = [f"{address}/{path.relative_to(root)}" for path in sorted(root.glob("*/*.tar"))]

    def run() -> int:
        words = [word for name in names for word in ("-o", "/dev/null", name)]
        subprocess.run(["curl", "--silent", "--fail", *words], check=True)
        return n

    return run


@contextmanager
def served(root: Path, delay_s: float) -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(root), str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.kill()


Row = tuple[str, Callable[[], int]]


def local(root: Path, plain: Path, n: int) -> list[Row]:
    return [
        ("cat *.tar > /dev/null", cat(root, n)),
        ("hvtrain, 0 workers", ours(root, n)),
        ("hvtrain, 1 thread", ours(root, n, workers=1)),
        ("hvtrain, 2 threads", ours(root, n, workers=2)),
        ("hvtrain, 2 threads, set opened anew", ours(root, n, workers=2, anew=True)),
        ("hvtrain, 1 process", ours(root, n, workers=1, worker_type="process")),
        ("hvtrain, 2 processes", ours(root, n, workers=2, worker_type="process")),
        ("shards.pipeline", with_pipeline(root)),
        ("webdataset", with_webdataset(root)),
        ("two files per sample, DataLoader, 2 processes", with_pairs(plain)),
        ("one safetensors file per sample", with_single_files(plain)),
    ]


def urls(root: Path, n: int) -> Iterator[tuple[str, list[Row]]]:
    for delay_s in (0.0, 0.02):
        with served(root, delay_s) as address:
            yield f"URLs, {1000 * delay_s:.0f} ms a request", [
                ("GET of every tar (curl)", get(address, root, n)),
                ("shards.pipeline: a tar a request", with_pipeline(address)),
                ("hvtrain, byte ranges, 0 workers", ours(address, n)),
                ("hvtrain, byte ranges, 4 threads", ours(address, n, workers=4)),
                ("hvtrain, byte ranges, 16 threads", ours(address, n, workers=16)),
                ("hvtrain, byte ranges, 2 processes", ours(address, n, workers=2, worker_type="process")),
                ("hvtrain, byte ranges, 8 processes", ours(address, n, workers=8, worker_type="process")),
            ]


def with_webdataset(root: Path) -> Callable[[], int]:
    """Its default decoders know no safetensors, so the bytes go through
    safetensors.torch.load; then batches are stacked."""

    def column(name: str) -> Iterator[dict]:
        tars = [str(path) for path in sorted((root / name).glob("*.tar"))]
        for row in webdataset.WebDataset(tars, shardshuffle=False).decode():
            data = row["safetensors"]
            yield load(data) if isinstance(data, bytes) else data

    def run() -> int:
        seen, batch = 0, []
        for latents, text in zip(column("latents"), column("text"), strict=True):
            batch.append({**latents, **text})
            if len(batch) == BATCH:
                {name: torch.stack([s[name] for s in batch]) for name in batch[0]}
                seen, batch = seen + BATCH, []
        return seen

    return run


def with_single_files(plain: Path) -> Callable[[], int]:
    def run() -> int:
        seen, batch = 0, []
        for path in sorted(plain.glob("*.safetensors")):
            batch.append(load_file(path))
            if len(batch) == BATCH:
                {name: torch.stack([s[name] for s in batch]) for name in batch[0]}
                seen, batch = seen + BATCH, []
        return seen

    return run


class _Pairs(torch.utils.data.Dataset):
    """musubi-tuner's layout: a latent file and a text file per sample, read by the DataLoader's processes."""

    def __init__(self, plain: Path) -> None:
        self.paths = sorted((plain / "latents").glob("*.safetensors"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        path = self.paths[index]
        return {**load_file(path), **load_file(path.parents[1] / "text" / path.name)}


def with_pairs(plain: Path) -> Callable[[], int]:
    def run() -> int:
        loader = torch.utils.data.DataLoader(_Pairs(plain), batch_size=BATCH, num_workers=2)
        return sum(len(batch["latents"]) for batch in loader)

    return run


# --- writing ------------------------------------------------------------------------------------------------


def write_ours(folder: Path, rows: list) -> Callable[[], int]:
    def run() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        for number, part in enumerate(_batched(rows)):
            write_tar(folder, f"all/{number:03d}.tar", [(k, {**x, **t}, {}) for k, x, t in part])
        return len(rows)

    return run


def write_tar_cf(folder: Path, plain: Path, n: int, *, sync: bool) -> Callable[[], int]:
    """GNU tar of files that hold the same bytes."""

    def run() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        names = sorted(path.name for path in plain.glob("*.safetensors"))
        for number, part in enumerate(_batched(names)):
            subprocess.run(["tar", "cf", folder / f"{number:03d}.tar", "-C", plain, *part], check=True)
            if sync:
                subprocess.run(["sync", folder / f"{number:03d}.tar"], check=True)
        return n

    return run


def table(title: str, rows: list[tuple[str, Callable[[], int]]], *, n_bytes: int, repeat: int) -> None:
    out = Table(title=title)
    for name in ("", "samples/s", "GB/s", "of the first", "of the last"):
        out.add_column(name, justify="right" if name else "left")
    results = [(name, *best(run, repeat)) for name, run in rows]
    rates = [n / seconds for _, seconds, n in results]
    for (name, seconds, _), rate in zip(results, rates):
        bandwidth, share = f"{n_bytes / seconds / 1e9:.2f}", f"{100 * rate / rates[0]:.0f} %"
        out.add_row(name, f"{rate:.0f}", bandwidth, share, f"{rate / rates[-1]:.2f} x")
    Console(width=110).print(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--folder", help="where the files go (default: the system's temporary directory)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=("reading", "url", "writing"))
    args = parser.parse_args()
    wanted = {args.only} if args.only else {"reading", "url", "writing"}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root, plain, scratch = Path(name) / "set", Path(name) / "plain", Path(name) / "scratch"
        make_set(root, plain, args.samples)
        os.sync()  # or the disk is still busy with writing when reading is timed
        n_bytes = sum(path.stat().st_size for path in root.glob("*/*.tar"))
        print(
            f"{args.samples} samples, {n_bytes / 2**20:.0f} MiB, batches of {BATCH}, "
            f"{torch.get_num_threads()} threads"
        )
        report = partial(table, n_bytes=n_bytes, repeat=args.repeat)
        if "reading" in wanted:
            report("reading", local(root, plain, args.samples))
        for title, rows in urls(root, args.samples) if "url" in wanted else ():
            report(title, rows)
        if "writing" in wanted:
            rows = list(samples(args.samples))
            report("writing", [
                ("tar cf", write_tar_cf(scratch, plain, args.samples, sync=False)),
                ("tar cf; sync", write_tar_cf(scratch, plain, args.samples, sync=True)),
                ("hvtrain (synced, checksums)", write_ours(scratch, rows)),
            ])


if __name__ == "__main__":
    main()
