"""Clips and captions into a shard set."""
