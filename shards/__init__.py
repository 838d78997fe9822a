"""The shard format: webdataset tars of latents and embeddings, with a manifest. A library that knows no
model.

Importing it costs nothing: what needs torch is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.errors import ShardError
    from shards.feed import pipeline
    from shards.reader import Sample, ShardSet, open_set

__all__ = ["Sample", "ShardError", "ShardSet", "open_set", "pipeline"]
_HOMES = {
    "Sample": "reader", "ShardSet": "reader", "open_set": "reader", "ShardError": "errors", "pipeline": "feed"
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    return getattr(import_module(f"shards.{_HOMES[name]}"), name)
