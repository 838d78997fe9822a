"""Which CPU cores a rank computes with: those beside its GPU, shared fairly with the
other ranks of its machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys")


def cores_of(
    mine: int, nodes: Sequence[int | None], allowed: set[int], cores: Mapping[int, set[int]]
) -> set[int]:
    """Of rank `mine` among a machine's ranks, whose GPUs hang at these NUMA `nodes`
    (None: unknown); `cores` by node.

    Ranks of one node share its cores without overlap; where a node has none for them, or is
    not known, all share alike."""
    node = nodes[mine]
    here = set() if node is None else allowed & cores.get(node, set())
    sharers = [rank for rank, node in enumerate(nodes) if node == nodes[mine]]
    if len(here) < len(sharers):
        here, sharers = allowed, list(range(len(nodes)))
    order, place = sorted(here), sharers.index(mine)
    begin, end = (len(order) * n // len(sharers) for n in (place, place + 1))
    return set(order[begin:end]) or allowed


def bind(device: torch.device, local_rank: int, n_ranks: int, *, system: Path = SYSTEM) -> None:
    """Have this process run beside its GPU. Only where GPUs are, several ranks share the machine,
    and nobody (Slurm, numactl) has given each rank cores of its own: then its mask is smaller
    than the machine. Linux only."""
    if device.type != "cuda" or n_ranks < 2 or not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    if len(allowed) < (os.cpu_count() or 1) or torch.cuda.device_count() < n_ranks:
        return
    mine = cores_of(local_rank, [node_of(i, system) for i in range(n_ranks)], allowed, node_cores(system))
    os.sched_setaffinity(0, mine)
    # two hardware threads a core, as a rule; loaders need some too
    torch.set_num_threads(max(1, len(mine) // 2))


def node_of(gpu: int, system: Path = SYSTEM) -> int | None:
    p: Any = torch.cuda.get_device_properties(gpu)
    try:
        name = f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
        node = int((system / "bus/pci/devices" / name / "numa_node").read_text())
    except (OSError, ValueError, AttributeError):  # older releases of torch do not tell
        return None
    return node if node >= 0 else None


def node_cores(system: Path = SYSTEM) -> dict[int, set[int]]:
    found = {}
    for folder in (system / "devices/system/node").glob("node[0-9]*"):
        ranges = [part.partition("-") for part in (folder / "cpulist").read_text().strip().split(",") if part]
        found[int(folder.name[4:])] = {
            n for low, _, high in ranges for n in range(int(low), int(high or low) + 1)
        }
    return found
