"""Blocks whose frozen weights live elsewhere and visit the device when their block runs: in pinned host
memory (block swap), or spread over the ranks that share a video.

Each such block is one flat buffer and comes, by one copy or one all-gather, to one of two slots on the
device; while a block computes, the next one is under way on a stream of its own. Nothing goes back: frozen
weights do not change. The order is followed in both directions, so it works in the forward, in the backward
that recomputes, and in sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvtrain.errors import ConfigError
from hvtrain.models.dit import Tokens
from hvtrain.parallel.collectives import all_gather
from hvtrain.parallel.context import ParallelContext
from hvtrain.parallel.pinned import page_locked

SLOTS = 2
_ALIGN = 256


@dataclass(frozen=True)
class _Piece:
    """One tensor of a block, and where it lies in the block's buffer."""

    owner: nn.Module
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def point_at(self, buffer: Tensor | None, device: torch.device) -> None:
        """At the piece's bytes in `buffer`, or at nothing."""
        if buffer is None:
            value = torch.empty(0, dtype=self.dtype, device=device)
        else:
            value = buffer[self.start : self.start + self.n_bytes].view(self.dtype).view(self.shape)
        if self.name in self.owner._parameters:
            self.owner.get_parameter(self.name).data = value
        else:
            self.owner._buffers[self.name] = value


@dataclass
class _Home:
    """A block's weights on the host."""

    pieces: list[_Piece]
    host: Tensor  # uint8 [n_bytes]

    @property
    def n_bytes(self) -> int:
        return self.host.numel()

    def fetch(self, room: Tensor) -> None:
        room.copy_(self.host, non_blocking=True)


@dataclass
class _Spread:
    """A block's weights, of which every rank of a group holds as much."""

    pieces: list[_Piece]
    own: Tensor  # uint8 [n_bytes / ranks], on the device
    group: dist.ProcessGroup

    @property
    def n_bytes(self) -> int:
        return self.own.numel() * self.group.size()

    def fetch(self, room: Tensor) -> None:
        all_gather(room, self.own, self.group)


@dataclass
class _Slot:
    """Room for one block on the device."""

    buffer: Tensor
    block: int | None = None
    arrived: torch.cuda.Event | None = None


class BlockVisits:
    """Has the weights of blocks in place when they are computed. Build it when all that is
    to be trained requires grad."""

    def __init__(self, homes: Mapping[int, _Home | _Spread], device: torch.device) -> None:
        self.device, self.homes, self.away = device, homes, sorted(homes)
        room = max(home.n_bytes for home in homes.values())
        self.slots = [_Slot(torch.empty(room, dtype=torch.uint8, device=device)) for _ in range(SLOTS)]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last = -1

    def wrap(self, blocks: Sequence[nn.Module], run: Callable) -> Callable[[nn.Module, Tokens], Tokens]:
        """A way to run blocks that has a block's weights in place whenever it is computed, also when
        again."""
        index = {id(block): i for i, block in enumerate(blocks)}

        def run_block(block: nn.Module, tokens: Tokens) -> Tokens:
            i = index[id(block)]
            if i not in self.homes:
                return run(block, tokens)

            def in_place(tokens: Tokens) -> Tokens:
                self.enter(i)
                return block(tokens)

            return run(in_place, tokens)

        return run_block

    def enter(self, i: int) -> None:
        """Have block i's weights on the device, and the next one's on their way."""
        slot = self._fetch(i)
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        following = self._following(i)
        self.last = i
        if following != i:
            self._fetch(following, keep=slot)

    def _following(self, i: int) -> int:
        """The next in the direction of travel. A wrong guess costs a wait, nothing else."""
        place, n = self.away.index(i), len(self.away)
        backward = torch.is_grad_enabled() and (i < self.last or (i == self.last and place == n - 1))
        if backward and place > 0:
            return self.away[place - 1]
        if place == n - 1 and torch.is_grad_enabled():
            return i  # the backward begins with this one
        return self.away[(place + 1) % n]

    def _fetch(self, i: int, keep: _Slot | None = None) -> _Slot:
        for slot in self.slots:
            if slot.block == i:
                return slot
        slot = min((s for s in self.slots if s is not keep), key=lambda s: s.block == self.last)
        if slot.block is not None:
            for piece in self.homes[slot.block].pieces:
                piece.point_at(None, self.device)
        home = self.homes[i]
        target = slot.buffer[: home.n_bytes]
        if self.stream is None:
            home.fetch(target)
        else:
            # All that used the slot is in the queue already: a block's backward
            # ends before the next one begins.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                home.fetch(target)
                slot.arrived = self.stream.record_event()
        slot.block = i
        for piece in home.pieces:
            piece.point_at(slot.buffer, self.device)
        return slot


class BlockSwap(BlockVisits):
    """Takes the weights of enough evenly spaced blocks off the device that `n` average blocks' worth of it is
    free, the two slots counted. Build it before the model is moved.

    Raises ConfigError where so many cannot be freed.
    """

    def __init__(self, blocks: Sequence[nn.Module], n: int, device: torch.device) -> None:
        sizes = [_n_bytes(block) for block in blocks]
        homes = {i: _pack(blocks[i], device, pinned=device.type == "cuda") for i in _choose(sizes, n)}
        super().__init__(homes, device)
        self.n_blocks, self.freed = (
            len(blocks), sum(sizes[i] for i in homes) - SLOTS * self.slots[0].buffer.numel()
        )

    def describe(self) -> str:
        return (
            f"{len(self.away)} of {self.n_blocks} blocks in host memory, which frees "
            f"{self.freed / 2**30:.2f} GiB"
        )


class BlockShards(BlockVisits):
    """Cuts every block's weights over the ranks that share a video; they compute the same block at the same
    time, and gather it then. Build it on all of them, before the model is moved."""

    def __init__(self, blocks: Sequence[nn.Module], ctx: ParallelContext) -> None:
        assert ctx.sp_group is not None
        homes: dict[int, _Home | _Spread] = {}
        for i, block in enumerate(blocks):
            whole = _pack(block, ctx.device, pinned=False, parts=ctx.sp)
            own = whole.host.view(ctx.sp, -1)[ctx.sp_rank].to(ctx.device, copy=True)
            homes[i] = _Spread(whole.pieces, own, ctx.sp_group)
        super().__init__(homes, ctx.device)
        self.ranks = ctx.sp

    def describe(self) -> str:
        kept = sum(home.n_bytes for home in self.homes.values()) / self.ranks
        return f"blocks cut over {self.ranks} ranks, {kept / 2**30:.2f} GiB on each"


class ModelSwap:
    """Keeps the frozen weights of several models of equal size in host memory, and those of one at a time on
    the device too. Nothing is copied back. What a BlockSwap has already taken of a model stays with it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.homes = device, dict[str, _Home]()
        self.buffer: Tensor | None = None
        self.now: str | None = None

    def add(self, key: str, model: nn.Module) -> None:
        """When all that is to be trained requires grad, and before the model is moved."""
        self.homes[key] = _pack(model, self.device, pinned=self.device.type == "cuda")

    def enter(self, key: str) -> None:
        """Have this model's weights on the device, and no other's."""
        if key == self.now:
            return
        if self.now is not None:
            self._point(self.now, None)
        if self.buffer is None:
            room = max(home.host.numel() for home in self.homes.values())
            self.buffer = torch.empty(room, dtype=torch.uint8, device=self.device)
        host = self.homes[key].host
        self.buffer[: host.numel()].copy_(host, non_blocking=True)  # behind all that still uses the buffer
        self._point(key, self.buffer)
        self.now = key

    def _point(self, key: str, buffer: Tensor | None) -> None:
        for piece in self.homes[key].pieces:
            piece.point_at(buffer, self.device)


def resident_bytes(model: nn.Module, visits: BlockVisits | None = None) -> int:
    """Bytes of the model's weights on its device, of the slots and of this rank's part of what is cut up."""
    slots = [slot.buffer for slot in visits.slots] if visits is not None else []
    slots += (
        [home.own for home in visits.homes.values() if isinstance(home, _Spread)]
        if visits is not None else []
    )
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers(), *slots]
    }
    return sum(storages.values())


def _frozen(block: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    found = []
    for module in block.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found += [(module, name, t) for name, t in own if not t.requires_grad]
    return found


def _n_bytes(block: nn.Module) -> int:
    return sum(t.nbytes for _, _, t in _frozen(block))


def swap_savings(blocks: Sequence[nn.Module], n: int) -> int:
    """Bytes that a BlockSwap of n blocks would free; raises ConfigError as it does."""
    sizes = [_n_bytes(block) for block in blocks]
    hosted = _choose(sizes, n)
    return sum(sizes[i] for i in hosted) - SLOTS * max(sizes[i] for i in hosted)


def shard_savings(blocks: Sequence[nn.Module], ranks: int) -> int:
    """Bytes that BlockShards frees on each of so many ranks."""
    sizes = [_n_bytes(block) for block in blocks]
    return sum(sizes) - -(-sum(sizes) // ranks) - SLOTS * max(sizes)


def _choose(sizes: Sequence[int], n: int) -> list[int]:
    """The fewest evenly spaced blocks that free n average blocks' worth."""
    total, n_blocks = sum(sizes), len(sizes)
    if not total:
        raise ConfigError("blocks_to_swap: no block has frozen weights, full fine-tuning has nothing to swap")
    most = 0
    for count in range(SLOTS + 1, n_blocks + 1):
        hosted = [(2 * i + 1) * n_blocks // (2 * count) for i in range(count)]
        freed = sum(sizes[i] for i in hosted) - SLOTS * max(sizes[i] for i in hosted)
        most = max(most, freed * n_blocks // total)
        if freed >= n * total / n_blocks:
            return hosted
    raise ConfigError(
        f"blocks_to_swap: {n} of {n_blocks} blocks cannot be kept off the device, because {SLOTS} have to be "
        f"there at a time; at most {most}"
    )


def _pack(module: nn.Module, device: torch.device, *, pinned: bool, parts: int = 1) -> _Home:
    """The frozen weights of a module in one buffer, of a length that `parts` divides; the
    module is left without them."""
    pieces, values, end = [], [], 0
    for owner, name, t in _frozen(module):
        if t.numel():  # else a BlockVisits has it already
            pieces.append(_Piece(owner, name, end, t.shape, t.dtype))
            values.append(t.detach())
            end += -(-t.nbytes // _ALIGN) * _ALIGN
    end = -(-end // (_ALIGN * parts)) * _ALIGN * parts
    host = page_locked(end) if pinned else torch.empty(end, dtype=torch.uint8)
    for piece, value in zip(pieces, values, strict=True):
        host[piece.start : piece.start + piece.n_bytes].copy_(
            value.cpu().contiguous().view(-1).view(torch.uint8)
        )
        piece.point_at(None, device)
    return _Home(pieces, host)
