"""Which cores and which host memory a rank gets, on machines that are not this one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvtrain.parallel import cores, pinned
from hvtrain.parallel.cores import cores_of, node_cores, node_of

TWO = {0: set(range(8)), 1: set(range(8, 16))}


def test_ranks_share_their_node_without_overlap():
    nodes = [0, 0, 1, 1]
    mine = [cores_of(rank, nodes, set(range(16)), TWO) for rank in range(4)]
    assert mine == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}]
    assert cores_of(0, [0], set(range(16)), TWO) == TWO[0]


def test_a_node_without_cores_for_them_is_no_reason_to_have_none():
    assert cores_of(3, [1] * 4, set(range(8)), TWO) == {6, 7}  # GPUs at node 1, cores of node 0 only
    assert [cores_of(r, [None, None], {3, 4, 9}, TWO) for r in (0, 1)] == [{3}, {4, 9}]
    assert cores_of(1, [0, 0, 0], {5}, TWO) == {5}


def machine(root: Path) -> Path:
    for node, text in enumerate(("0-3,8-11", "4-7,12-15")):
        folder = root / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text + "\n")
    for i, node in enumerate((0, 1)):
        folder = root / f"bus/pci/devices/0000:{0x18 + i:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    return root


def test_the_system_s_own_files(tmp_path, monkeypatch):
    root = machine(tmp_path)
    assert node_cores(root) == {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7, 12, 13, 14, 15}}
    cards = [SimpleNamespace(pci_domain_id=0, pci_bus_id=0x18 + i, pci_device_id=0) for i in range(3)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    assert [node_of(i, root) for i in range(3)] == [0, 1, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bound, threads, masks = [], [], [set(range(16))]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: masks[0])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, mask: bound.append(mask))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    gpu = torch.device("cuda", 1)
    cores.bind(gpu, 1, 2, system=root)
    assert bound == [{4, 5, 6, 7, 12, 13, 14, 15}] and threads == [4]
    cores.bind(torch.device("cpu"), 1, 2, system=root)
    cores.bind(gpu, 1, 1, system=root)
    masks[0] = set(range(8))  # somebody has given this rank its own
    cores.bind(gpu, 1, 2, system=root)
    assert len(bound) == 1


@pytest.mark.parametrize("failed", [0, 712])
def test_host_memory_is_locked_in_place_and_not_rounded_up(monkeypatch, caplog, failed):
    asked = []

    def register(pointer, size, flags):
        asked.append((pointer, size, flags))
        return failed

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    made = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **o: made(*size, **o).fill_(1 + pin_memory)
    )
    memory = pinned.page_locked(1000)
    assert memory.shape == (1000,) and memory.dtype == torch.uint8 and int(memory[0]) == (2 if failed else 1)
    assert [a[1:] for a in asked] == [(1000, 0)] and (failed or asked[0][0] == memory.data_ptr())
    assert ("CUDA error 712" in caplog.text) == bool(failed)
