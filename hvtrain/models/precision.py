"""The one autocast of the program."""

from __future__ import annotations

import torch


def autocast(device_type: str, *, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """Without autocast's cache: it would keep a second copy of every float32 weight until the end of the forward pass (26 GB of a
    13B model that is fully trained), and each weight is used once."""
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
