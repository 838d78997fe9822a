"""The one error of the shard library: a shard set, tar or sample that cannot be used."""


class ShardError(Exception):
    """Names the file (tar, key, byte range) at fault, what was found and how to mend it."""
