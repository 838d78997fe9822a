"""Saved activations in pinned host memory: copied out behind the forward pass,
and back ahead of the backward.

On CUDA both copies run on a stream of their own. The CPU is far ahead of the GPU, so what is on the device is
bounded by events: in the forward the computation waits for the copy of the block `ahead` places before, whose
memory is then free; in the backward a copy back begins when the GPU, not the CPU, is `ahead` places from
where it is needed. The memory is the computing stream's own, so it is free for others as soon as it is
dropped. On a CPU the same calls copy within host memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor

from hvtrain.parallel.pinned import Rooms


class CopyQueue:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, to: Tensor, of: Tensor) -> torch.cuda.Event:
        """When the GPU has done all that it has been told until now. The event is the copy's end."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(of, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """What the GPU is told from now on comes after it."""
        torch.cuda.current_stream(self.device).wait_event(event)


class _Copy:
    """One tensor on the host, perhaps still on the device, or on its way back."""

    def __init__(self, host: Tensor, x: Tensor, queue: CopyQueue | None, rooms: Rooms) -> None:
        self.host, self.device, self.queue, self.rooms = host, x.device, queue, rooms
        self.still: Tensor | None = None
        self.left: torch.cuda.Event | None = None
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def let_go(self) -> None:
        """Have no more of it on the device than what is on its way back."""
        if self.still is not None and self.queue is not None and self.left is not None:
            self.queue.wait(self.left)  # its memory is used again by what comes now
        self.still = None

    def __del__(self) -> None:
        self.let_go()
        if self.queue is not None:
            if self.back is not None and self.arrived is not None:
                self.queue.wait(self.arrived)  # never asked for: a backward that did not come to its end
            self.rooms.give(self.host)


class HostCopies:
    """The hooks for `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, ahead: int = 2, *, made: Callable[[Tensor], None] | None = None) -> None:
        self.ahead = ahead  # copies under way before they are asked for, and tensors that are leaving
        self.made = made  # told of each tensor that lies in host memory
        self.out: list[ref[_Copy]] = []  # in the order of the forward; autograd has the copies themselves
        self.leaving: deque[ref[_Copy]] = deque()
        self.queues: dict[torch.device, CopyQueue | None] = {}
        self.rooms = Rooms()

    def pack(self, x: Tensor) -> Tensor | _Copy:
        if not x.is_floating_point() or x.numel() < 2:
            return x
        x = x.detach()
        host, queue = self.on_host(x), self.queue(x.device)
        if self.made is not None:
            self.made(host)
        copy = _Copy(host, x, queue, self.rooms)
        if queue is None:
            host.copy_(x)
        else:
            copy.still, copy.left = x, queue.copy(host, x)
            self.leaving.append(ref(copy))
            while len(self.leaving) > self.ahead:
                if (oldest := self.leaving.popleft()()) is not None:
                    oldest.let_go()
        self.out.append(ref(copy))
        return copy

    def unpack(self, packed: Tensor | _Copy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self.out = [one for one in self.out if one() not in (None, packed)]
        back = packed.still
        if back is None:
            self._start(packed)
            back, packed.back = packed.back, None
            if packed.queue is not None and packed.arrived is not None:
                packed.queue.wait(packed.arrived)
        packed.let_go()
        for one in self.out[-self.ahead :]:
            if (coming := one()) is not None:
                self._start(coming)
        assert back is not None
        return back

    def on_host(self, x: Tensor) -> Tensor:
        """Room for x."""
        if self.queue(x.device) is None:
            return torch.empty(x.shape, dtype=x.dtype)
        return self.rooms.take(x.nbytes).view(x.dtype).view(x.shape)

    def queue(self, device: torch.device) -> CopyQueue | None:
        if device not in self.queues:
            self.queues[device] = CopyQueue(device) if device.type == "cuda" else None
        return self.queues[device]

    def _start(self, copy: _Copy) -> None:
        if copy.back is not None or copy.still is not None:
            return
        if copy.queue is None:
            copy.back = copy.host.clone()
            return
        copy.back = torch.empty(copy.host.shape, dtype=copy.host.dtype, device=copy.device)
        # behind the copy to the host, which is on the same stream
        copy.arrived = copy.queue.copy(copy.back, copy.host)
