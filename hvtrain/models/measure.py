"""Attention kernels on the device at hand: how far they are from float64, and which is the fastest.

`auto` asks here once for each class of shapes, device, dtype and set of kernels, and the answer is kept in
~/.cache/hvtrain: a second start is not slower, and goes the same way.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hvtrain.models.kernels import Kernel
from hvtrain.rng import generator
from shards.atomic import write_text

log = logging.getLogger(__name__)
# of a length modulo 128: kernels have been wrong for some, and clips and texts make them all
RESIDUES = (0, 1, 63, 64, 65, 127)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 3e-2}
KEPT = Path("~/.cache/hvtrain/kernels.json")


class Size(NamedTuple):
    queries: int
    keys: int
    batch: int = 1
    heads: int = 2
    dim: int = 128


class Workload(NamedTuple):
    """What one call of attention is to do: queries and keys, heads, and whether gradients follow."""

    tokens: int
    heads: int
    dim: int
    learns: bool


LONG = Workload(16384, 4, 128, learns=True)  # where a kernel shows what it can do
_CLASSES, _HEADS = (1024, 4096, 16384, 65536), 4


def class_of(work: Workload) -> Workload:
    """What is measured in its place: as many tokens as `tokens_class` says, and no more heads than fill a
    card."""
    tokens = tokens_class(work.tokens)
    return work._replace(tokens=tokens, heads=min(work.heads, max(1, _HEADS * 16384 // tokens)))


def tokens_class(tokens: int) -> int:
    """The least number in _CLASSES that is not below half of it; beyond, kernels no longer get faster."""
    return next((n for n in _CLASSES if tokens <= 2 * n), _CLASSES[-1])


class Errors(NamedTuple):
    """The largest difference from float64 over the largest value; NaN where anything is."""

    out: float
    lse: float
    dq: float
    dk: float
    dv: float

    @property
    def worst(self) -> float:
        return max(self, key=lambda e: (e != e, e))


def drawn(size: Size, device: torch.device, dtype: torch.dtype, *, low: bool = False) -> list[Tensor]:
    """q, k, v and the output's gradient, [B S N D]. `low`: scores so far below zero that the log-sum-exp is
    under -88.7, whose exponential is no float32: there a cuDNN lost its gradients (pytorch#196678)."""
    draw = generator(size.queries * 1000 + size.keys, stream="kernel-errors")
    b, n, d = size.batch, size.heads, size.dim
    q, k, v, g = (
        torch.randn(b, s, n, d, generator=draw) for s in (size.queries, size.keys, size.keys, size.queries)
    )
    if low:
        q, k = q * 0.1 + 1, k - 120 / d**0.5
    return [x.to(device, dtype) for x in (q, k, v, g)]


def errors(
    kernel: Kernel, size: Size, device: torch.device, dtype: torch.dtype, *, low: bool = False
) -> Errors:
    q, k, v, d_out = drawn(size, device, dtype, low=low)
    with torch.enable_grad():
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        scores = torch.einsum("bsnd,btnd->bnst", wide[0], wide[1]) / size.dim**0.5
        out = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), wide[2])
        wanted = [
            x.detach() for x in (out, scores.logsumexp(-1), *torch.autograd.grad(out, wide, d_out.double()))
        ]
    with torch.no_grad():
        found = kernel.partial(q, k, v)
        grads = kernel.backward(d_out, q, k, v, found) if kernel.backward else wanted[2:]
    pairs = zip([*found, *grads], wanted, strict=True)
    return Errors(*(float((have.double() - want).abs().max() / want.abs().max()) for have, want in pairs))


def wrongs(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, *, dim: int = 128
) -> Iterator[tuple[str, Errors]]:
    """Where a kernel is wrong: sizes of all residues, of unequal queries and
    keys, and scores far below zero."""
    sizes = [Size(256 + r, 256 + r) for r in RESIDUES] + [Size(257, 129), Size(64, 448, batch=2)]
    for size in (s._replace(dim=dim) for s in sizes):
        for low in (False, True):
            found = errors(kernel, size, device, dtype, low=low)
            # Keys that are nearly alike make gradients the small differences of large numbers.
            if not found.worst <= TOLERANCE[dtype] * (10 if low else 1):
                yield f"{size.queries} x {size.keys}{', low scores' if low else ''}", found


def timed(work: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats`, after one that does not count."""
    best = float("inf")
    for i in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - begin) if i else best
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(kernel: Kernel, work: Workload, device: torch.device, dtype: torch.dtype) -> float:
    """Forward and backward; the way without a log-sum-exp where nothing is learnt."""
    q, k, v, d_out = drawn(Size(work.tokens, work.tokens, heads=work.heads, dim=work.dim), device, dtype)

    def once() -> None:
        if not work.learns or kernel.backward is None:
            kernel.attend(q, k, v)
        else:
            kernel.backward(d_out, q, k, v, kernel.partial(q, k, v))

    with torch.no_grad():
        return timed(once, device)


def fastest(
    candidates: Sequence[Kernel], device: torch.device, dtype: torch.dtype, *, work: Workload = LONG,
    kept: Path = KEPT,
) -> Kernel:
    """Of those whose gradients are right on this device, for work of this class. The last
    candidate, PyTorch's own, is taken if none is."""
    work = class_of(work)
    key = " | ".join([machine(device), str(dtype), *(k.name for k in candidates), str(tuple(work))])
    by_name = {kernel.name: kernel for kernel in candidates}
    found = remembered(key, by_name, lambda: Answer(_measured(candidates, device, dtype, work)), kept=kept)
    return by_name[found]


def _measured(
    candidates: Sequence[Kernel], device: torch.device, dtype: torch.dtype, work: Workload
) -> str:
    times: dict[str, float] = {}
    for kernel in candidates:
        wrong = next(wrongs(kernel, device, dtype, dim=work.dim), None)
        if wrong is not None:
            log.warning(
                "attention kernel %s is wrong on this device at %s: error %.3g", kernel.name, wrong[0],
                wrong[1].worst
            )
            continue
        times[kernel.name] = seconds(kernel, work, device, dtype)
    told = ", ".join(f"{n} {1000 * s:.2f}" for n, s in times.items())
    log.info(
        "attention kernels at %d tokens x %d heads of %d, ms: %s", work.tokens, work.heads, work.dim, told
    )
    return min(times, key=lambda n: times[n], default=candidates[-1].name)


class Answer(NamedTuple):
    """What a measurement found; it does not last where it says less of the device than of this run."""

    word: str
    lasts: bool = True


def remembered(key: str, legal: Collection[str], find: Callable[[], Answer], *, kept: Path) -> str:
    """What `find` gives, one of `legal`; asked once for a key, and kept in a file if it lasts. Of several
    processes that measure at a time, those that end later take what the first has kept; two that end in the
    same instant may differ, which costs little."""
    kept = kept.expanduser()
    before = _read(kept).get(key)
    if before is not None and before in legal:
        return before
    found = find()
    if not found.lasts:
        return found.word
    known = _read(kept)
    first = known.get(key)
    if first is not None and first in legal:
        return first
    with suppress(OSError):  # a home that cannot be written: measured again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({**known, key: found.word}, indent=1) + "\n")
    return found.word


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
