"""The shard format: webdataset tars of latents and embeddings, with a manifest. A library that knows no model."""

from shards.errors import ShardError
from shards.reader import Sample, ShardSet, open_set

__all__ = ["Sample", "ShardError", "ShardSet", "open_set"]
