"""The one autocast of the program."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device_type: str, *, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """Without autocast's cache: it would keep a second copy of every float32 weight until the end of the
    forward pass (26 GB of a 13B model that is fully trained), and each weight is used once."""
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def under_autocast(device_type: str) -> bool:
    """The meta device has no autocast to be under, and torch raises when it is asked."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """For what must be computed in the dtype that it comes in. The meta device has no autocast to leave."""
    return (
        autocast(device_type, enabled=False)
        if torch.amp.is_autocast_available(device_type) else nullcontext()
    )
