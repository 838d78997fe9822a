"""Saved activations in pinned host memory: copied out behind the forward pass, and back ahead of the backward.

On CUDA both copies run on a stream of their own; the backward asks for the last tensors first, so asking for one
starts the copies of those saved before it. On a CPU the same calls copy within host memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def page_locked(n_bytes: int) -> Tensor:
    """Host memory that a GPU copies from at full speed, for good. Of this size: PyTorch's own allocator rounds up to a power of
    two, which of a block of 283 MB would be 512."""
    memory = torch.empty(n_bytes, dtype=torch.uint8)
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), n_bytes, 0))
    if not failed:
        return memory
    log.warning("%d MB of host memory could not be locked in place (CUDA error %d); rounded up instead", n_bytes >> 20, failed)
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


class _Copy:
    """One tensor on the host, perhaps on its way back."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host, self.device = host, device
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class HostCopies:
    """The hooks for `torch.autograd.graph.saved_tensors_hooks`."""

    def __init__(self, ahead: int = 2, *, made: Callable[[Tensor], None] | None = None) -> None:
        self.ahead = ahead  # copies under way before they are asked for
        self.made = made  # told of each tensor that lies in host memory
        self.out: list[_Copy] = []  # in the order of the forward
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def pack(self, x: Tensor) -> Tensor | _Copy:
        if not x.is_floating_point() or x.numel() < 2:
            return x
        host = self.on_host(x)
        if self.made is not None:
            self.made(host)
        if x.device.type == "cuda":
            stream = self._stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(stream)  # its memory is not used again before the copy is done
        else:
            host.copy_(x)
        self.out.append(_Copy(host, x.device))
        return self.out[-1]

    def unpack(self, packed: Tensor | _Copy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._start(packed)
        if packed in self.out:
            self.out.remove(packed)
        for coming in self.out[-self.ahead :]:
            self._start(coming)
        assert packed.back is not None
        if packed.arrived is not None:
            stream = torch.cuda.current_stream(packed.device)
            stream.wait_event(packed.arrived)
            packed.back.record_stream(stream)
        back, packed.back = packed.back, None
        return back

    def on_host(self, x: Tensor) -> Tensor:
        """Room for x."""
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")

    def _start(self, copy: _Copy) -> None:
        if copy.back is not None:
            return
        if copy.device.type != "cuda":
            copy.back = copy.host.clone()
            return
        stream = self._stream(copy.device)  # behind the copy to the host, which is on the same stream
        with torch.cuda.stream(stream):
            copy.back = copy.host.to(copy.device, non_blocking=True)
            copy.arrived = stream.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]
