"""The one error of the shard library: a shard set, tar or sample that cannot be used."""


class ShardError(Exception):
    """Names the file (tar, key, byte range) at fault, what was found and how to mend it.

    One line of printable letters: what it quotes may come from anyone and shall not steer a terminal.
    """

    def __init__(self, text: object) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)))
