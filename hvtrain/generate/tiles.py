"""A large video's tiles over the ranks that share it: each decodes every n-th of them, and
the first puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hvtrain.models.video_vae import Make, Tile, VideoVae
from hvtrain.parallel.context import ParallelContext


class Tiles(NamedTuple):
    """What a VAE cuts latents into, and how one becomes pixels."""

    make: Make
    cuts: list[Tensor]


def cut(vae: VideoVae, latents: Tensor) -> Tiles:
    """Scaled latents [1 C T h w]; nothing is decoded."""
    cuts: list[Tensor] = []
    makes: list[Make] = []

    def note(make: Make, z: Tensor) -> Tensor:
        cuts.append(z)
        makes.append(make)
        return z.new_zeros(_pixels(vae, z))

    with made_by(vae, note):
        vae.decode(latents)
    return Tiles(makes[0], cuts)


@torch.no_grad()
def decode_own(tiles: Tiles, ctx: ParallelContext) -> list[Tensor]:
    """This rank's share."""
    return [tiles.make(z).contiguous() for z in tiles.cuts[ctx.sp_rank :: ctx.sp]]


def collect(own: list[Tensor], tiles: Tiles, vae: VideoVae, ctx: ParallelContext) -> list[Tensor]:
    """All in order on the first rank; on the others nothing. Collective among the
    ranks that share the video."""
    if ctx.sp_rank:
        for tile in own:
            dist.send(tile, group=ctx.sp_group, group_dst=0)
        return []
    every = []
    for i, z in enumerate(tiles.cuts):
        tile, who = own[i // ctx.sp], i % ctx.sp
        if who:
            tile = own[0].new_empty(_pixels(vae, z))
            dist.recv(tile, group=ctx.sp_group, group_src=who)
        every.append(tile)
    return every


def join(every: list[Tensor], vae: VideoVae, latents: Tensor) -> Tensor:
    """vae.decode(latents), to the bit, from its tiles."""
    following = iter(every)
    with made_by(vae, lambda make, z: next(following)):
        return vae.decode(latents)


def _pixels(vae: VideoVae, z: Tensor) -> tuple[int, ...]:
    """The shape that latents [B C T h w] become."""
    (n, _, t, h, w), (st, sh, sw) = z.shape, vae.stride
    return n, 3, (t - 1) * st + 1, h * sh, w * sw


@contextmanager
def made_by(vae: VideoVae, tile: Tile) -> Iterator[None]:
    before, vae.tile = vae.tile, tile
    try:
        yield
    finally:
        vae.tile = before
