"""The only seeding code: every random draw comes from a generator that is a function of where it is used.

Ranks that share a data-parallel rank (sequence-parallel peers) get equal generators, other ranks different
ones; a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def generator(
    seed: int, *, step: int = 0, micro: int = 0, dp_rank: int = 0, stream: str = "noise"
) -> torch.Generator:
    """A CPU generator for one draw site. `stream` names the use, so that two uses never share numbers."""
    text = f"{seed}/{step}/{micro}/{dp_rank}/{stream}"
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
