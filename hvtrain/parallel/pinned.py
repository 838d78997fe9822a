"""Host memory that a GPU copies from and to at full speed: of the size that is asked for, no
more than is used at a time."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_LOCKED: set[int] = set()  # addresses; what PyTorch's own allocator gives is not among them
_ROOM, _SLACK = 2**21, 1.25  # sizes are multiples of 2 MB; how much larger a room may be than what lies in it


def page_locked(n_bytes: int) -> Tensor:
    """uint8 [n_bytes]. Of this size: PyTorch's own allocator rounds up to a power of two, which of a
    block of 283 MB would be 512."""
    memory = torch.empty(n_bytes, dtype=torch.uint8)
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), n_bytes, 0))
    if not failed:
        _LOCKED.add(memory.data_ptr())
        return memory
    log.warning(
        "%d MB of host memory could not be locked in place (CUDA error %d); rounded up instead",
        n_bytes >> 20, failed
    )
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


def unlock(memory: Tensor) -> None:
    """Before memory of `page_locked` is given back: nothing on the GPU may still copy from or to it."""
    torch.cuda.synchronize()
    if memory.data_ptr() in _LOCKED:  # to unlock other memory is an error
        _LOCKED.remove(memory.data_ptr())
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class Rooms:
    """Page-locked memory that is used again. All of it together is at most what was in use at one
    time, the sizes rounded up to 2 MB, by a quarter more: where clips of other sizes come, what
    fits none of them goes first."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.used: dict[int, Tensor] = {}  # by address
        self.most = 0  # bytes in use at a time

    @property
    def n_bytes(self) -> int:
        return sum(room.numel() for room in (*self.free, *self.used.values()))

    def take(self, n_bytes: int) -> Tensor:
        """uint8 [n_bytes]; its address is that of the room, which `give` takes back."""
        size = -(-n_bytes // _ROOM) * _ROOM
        fits = [i for i, room in enumerate(self.free) if size <= room.numel() <= _SLACK * size]
        room = self.free.pop(min(fits, key=lambda i: self.free[i].numel())) if fits else self._new(size)
        self.used[room.data_ptr()] = room
        self.most = max(self.most, sum(room.numel() for room in self.used.values()))
        return room[:n_bytes]

    def give(self, memory: Tensor) -> None:
        """What comes next into it is copied behind what still goes out of it, on one stream."""
        self.free.append(self.used.pop(memory.data_ptr()))

    def _new(self, size: int) -> Tensor:
        most = max(self.most, size + sum(room.numel() for room in self.used.values()))
        while self.free and self.n_bytes + size > _SLACK * most:
            unlock(self.free.pop(0))  # the one that has been free for longest
        return page_locked(size)
