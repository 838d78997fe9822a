"""Who am I among the processes, and which of them share what: the only library
code that reads the environment.

World = data parallel x ring x Ulysses, a reshaped arange whose slices are the groups. Ulysses ranks are
neighbours (its all-to-all wants the fastest links), a ring is strided over them, data parallelism is
outermost. The ranks of one ring x Ulysses block hold one sample together: "sequence-parallel peers".
"""

from __future__ import annotations

import glob
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from hvtrain.errors import ConfigError, LaunchError
from hvtrain.parallel.cores import bind

T = TypeVar("T")
# cpu or cuda: what processes compute on where no one says; unset: a GPU if there is one
DEVICE = "HVTRAIN_DEVICE"
TIMEOUT = timedelta(hours=2)  # later than the watchdog of a run (train/watchdog.py), which can say who hangs


@dataclass(frozen=True)
class ParallelContext:
    """One process's place. The defaults are a single process without any process group."""

    world: int = 1
    rank: int = 0
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp_rank: int = 0
    sp_rank: int = 0
    ulysses_group: dist.ProcessGroup | None = None  # None where the degree is 1
    ring_group: dist.ProcessGroup | None = None
    sp_group: dist.ProcessGroup | None = None
    # how often this job's processes were started anew (torchrun, hvtrain launch --max-restarts)
    restarts: int = 0
    job: str = ""  # of Slurm
    requeues: int = 0  # how often Slurm started that job again

    @property
    def sp(self) -> int:
        return self.ulysses * self.ring

    @property
    def ulysses_rank(self) -> int:
        return self.sp_rank % self.ulysses

    @property
    def ring_rank(self) -> int:
        return self.sp_rank // self.ulysses

    @property
    def device_name(self) -> str:
        """For people: "CPU", or the GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def devices(self) -> str:
        """Of all processes, for people. Collective."""
        all_of_them = Counter(self.gather_objects((socket.gethostname(), self.device_name)))
        if len(all_of_them) == 1:
            return self.device_name
        return ", ".join(f"{n} x {name} of {host}" for (host, name), n in all_of_them.items())

    @property
    def memory_bytes(self) -> int:
        """All of the GPU's, or of this machine's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def apart(self) -> ParallelContext:
        """The same processes, each with whole samples of its own."""
        return replace(
            self, dp=self.world, dp_rank=self.rank, ulysses=1, ring=1, sp_rank=0, ulysses_group=None,
            ring_group=None, sp_group=None,
        )

    def barrier(self) -> None:
        if self.world > 1:
            self.all_reduce_sum(0.0)  # unlike dist.barrier, never guesses a device

    def all_reduce_sum(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.SUM)

    def all_reduce_mean(self, value: float) -> float:
        """Mean over all ranks; of a value that sequence-parallel peers share, that is the
        mean over data parallelism."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.world

    def all_reduce_max(self, value: float) -> float:
        return self._reduce(value, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        return self.all_reduce_max(float(flag)) > 0

    def gather_objects(self, value: object) -> list:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place, over all ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of them this rank does on its own."""
        return items[self.rank :: self.world]

    def unshare(self, own: Sequence[T]) -> list[T]:
        """From every rank's results of its `share`, all in the order of the items, on every rank."""
        every = self.gather_objects(list(own))
        return [every[i % self.world][i // self.world] for i in range(sum(map(len, every)))]

    def _reduce(self, value: float, op: dist.ReduceOp.RedOpType) -> float:
        if self.world == 1:
            return float(value)
        # A CPU tensor: goes over gloo also in a CUDA job, so it does not wait for the GPU's queue.
        tensor = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(tensor, op=op)
        return tensor.item()


def start(ulysses: int = 1, ring: int = 1, device: str | torch.device | None = None) -> ParallelContext:
    """Join the processes that torchrun started (or be the only one) and build the
    groups. All ranks must call it.

    May be called again with other degrees: the process group is made once.
    """
    world = _env_int("WORLD_SIZE", 1)
    rank, local_rank = _env_int("RANK", 0), _env_int("LOCAL_RANK", 0)
    dp = _data_degree(world, ulysses=ulysses, ring=ring)
    place = _pick_device(device, local_rank)
    bind(place, local_rank, _env_int("LOCAL_WORLD_SIZE", 1))
    # else the profiler says on stderr that it starts and that it stops
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if place.type != "cuda":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes for a GPU, and warns
    if world > 1 and not dist.is_initialized():
        _join(place)
    sp = ulysses * ring
    grid = torch.arange(world).reshape(dp, ring, ulysses)
    ctx = ParallelContext(
        world=world,
        rank=rank,
        local_rank=local_rank,
        device=place,
        dp=dp,
        ulysses=ulysses,
        ring=ring,
        dp_rank=rank // sp,
        sp_rank=rank % sp,
        ulysses_group=_my_group(grid.reshape(-1, ulysses), rank),
        ring_group=_my_group(grid.transpose(1, 2).reshape(-1, ring), rank),
        sp_group=_my_group(grid.reshape(-1, sp), rank),
        restarts=_env_int("TORCHELASTIC_RESTART_COUNT", 0),
        job=os.environ.get("SLURM_JOB_ID", ""),
        requeues=_env_int("SLURM_RESTART_COUNT", 0),
    )
    # one that ends for a mistake while another still connects would leave that one with an error of its own
    ctx.barrier()
    return ctx


def start_simulated(world: int, *, ulysses: int, ring: int) -> ParallelContext:
    """Rank 0 of a job of `world` processes, of which only this one exists: collectives return at once, with
    nothing in them. For tensors without values (hvtrain/fit)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dp = _data_degree(world, ulysses=ulysses, ring=ring)
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    grid = torch.arange(world).reshape(dp, ring, ulysses)
    return ParallelContext(
        world=world, dp=dp, ulysses=ulysses, ring=ring, ulysses_group=_my_group(grid.reshape(-1, ulysses), 0),
        ring_group=_my_group(grid.transpose(1, 2).reshape(-1, ring), 0),
        sp_group=_my_group(grid.reshape(-1, ulysses * ring), 0),
    )


def without_job() -> dict[str, str]:
    """The environment for a program that is not a rank of this job, and leaves its GPUs alone."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_", "GROUP_RANK")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(own)}, "CUDA_VISIBLE_DEVICES": ""}


_closers: list[Callable[[], object]] = []


def at_shutdown(close: Callable[[], object]) -> None:
    """Have a library that keeps groups of its own close them; a later `start` in this
    process then begins afresh."""
    if close not in _closers:
        _closers.append(close)


def shutdown() -> None:
    while _closers:
        _closers.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_heads(heads: int, ulysses: int) -> None:
    """Ulysses gives each rank heads/U whole heads, so U must divide their number."""
    if heads % ulysses:
        legal = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise ConfigError(
            f"parallel.ulysses: {ulysses} does not divide the model's {heads} attention heads; "
            f"choose one of {legal}, or use parallel.ring, which takes any degree"
        )


def solo_group(ctx: ParallelContext) -> None:
    """A process group of one, for libraries that insist on having one (DeepSpeed). Opens no port."""
    os.environ.setdefault("LOCAL_RANK", str(ctx.local_rank))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if ctx.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _data_degree(world: int, *, ulysses: int, ring: int) -> int:
    for name, degree in (("ulysses", ulysses), ("ring", ring)):
        if degree < 1:
            raise ConfigError(f"parallel.{name}: {degree} is not a degree; 1 turns it off")
    if world % (ulysses * ring):
        raise ConfigError(
            f"parallel: ulysses {ulysses} x ring {ring} = {ulysses * ring} does not divide the {world} "
            f"process(es) of this job; start a multiple of {ulysses * ring} (hvtrain launch --nproc N) or "
            "lower them"
        )
    return world // (ulysses * ring)


def _pick_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    if device is None:
        device = os.environ.get(DEVICE) or None
        if device not in (None, "cpu", "cuda"):
            raise LaunchError(
                f"environment variable {DEVICE} is '{device}', expected cpu or cuda, or nothing at all"
            )
    if device is None:
        if not torch.cuda.is_available():
            _refuse_unseen_gpus()
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise LaunchError(
                f"process {local_rank} of this machine has no GPU: PyTorch sees {n_gpus}; start one process "
                f"per GPU (--nproc {max(1, n_gpus)}), or set {DEVICE}=cpu to compute on the CPU"
            )
        place = torch.device("cuda", place.index if place.index is not None else local_rank)
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            # Read when the GPU is first used. Every text length makes blocks of other sizes:
            # without, gaps fill the memory.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(place)
    return place


def _refuse_unseen_gpus() -> None:
    """Raise if there are GPUs that PyTorch does not see: 13 billion parameters on a
    CPU look like a run that hangs.

    Whoever hides them (CUDA_VISIBLE_DEVICES set to nothing or to no GPU) means it.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return
    files = sorted(glob.glob("/dev/nvidia[0-9]*"))
    given = next(
        (f"{n}={os.environ[n]}" for n in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS") if os.environ.get(n)), None
    )
    found = f"this machine has {files[0]}" if files else f"Slurm gave this job {given}" if given else None
    if found is None:
        return
    try:
        torch.cuda.init()
        reason = "no device is visible to this process"
    except Exception as error:  # of several kinds: no driver, an old one, a CPU build
        reason = str(error).strip().splitlines()[0].rstrip(".")
    raise LaunchError(
        f"{found}, but PyTorch {torch.__version__} sees no GPU: {reason}. Install the build of PyTorch for "
        f"your driver (docs/install.md), or have Slurm give the job its GPUs; {DEVICE}=cpu computes on the "
        "CPU all the same"
    )


def _join(place: torch.device) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun or hvtrain launch"
        )
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store over a restart: without a name of its own, an attempt
    # finds the addresses of the dead.
    store = dist.PrefixStore(f"hvtrain/attempt-{_env_int('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    where = {"store": store, "rank": rank, "world_size": world, "timeout": TIMEOUT}
    if place.type == "cuda":
        # gloo beside nccl: flags and sums of single numbers then never wait for the GPU's queue.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place, **where)
    else:
        dist.init_process_group("gloo", **where)


def _my_group(rows: torch.Tensor, rank: int) -> dist.ProcessGroup | None:
    """The group of the row that holds this rank. Every rank makes every group: new_group is collective."""
    if rows.shape[1] == 1:
        return None
    mine = None
    for row in rows.tolist():
        group = dist.new_group(row, timeout=TIMEOUT)
        if rank in row:
            mine = group
    return mine


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"environment variable {name} is '{text}', expected a number; start with torchrun"
        ) from None
