"""What every diffusion transformer is made of: tokens, attention, blocks and the one forward.

Model code is single-device. How tokens are split over ranks (`sequence`), how a module attends
(`module.attend`) and how a block is run (`run_block`) are attributes that functions over the
model set; see parallel/apply.py.

Shape legend of the whole package: B batch, C latent channels, T/H/W latent frames/height/width, S image
tokens, L text tokens, N heads, D head dim, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn


class Joint(NamedTuple):
    """One of q, k, v or the output of joint attention. Image and text stay apart until the kernel."""

    img: Tensor  # [B S N D]
    txt: Tensor  # [B L N D]


class Grid(NamedTuple):
    """Patches of a video along each axis."""

    t: int
    h: int
    w: int


class Rope(NamedTuple):
    """Rotary tables of the image tokens, each angle twice in a row (interleaved pairs); fp32 or fp64."""

    cos: Tensor  # [S D]
    sin: Tensor  # [S D]


@dataclass(frozen=True)
class Tokens:
    """What flows from block to block. `img`, `rope` and `per_token` are split together over sequence-parallel
    ranks; all else is whole on each of them."""

    img: Tensor  # [B S E]
    rope: Rope
    n_img: int  # valid image tokens of the whole sequence, all ranks together
    grid: Grid
    txt: Tensor  # [B L E], zero or garbage beyond txt_len; L may be 0
    txt_len: tuple[int, ...]
    # [B ...]: conditioning vectors, contexts to cross-attend
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    # [B S ...] or [1 S ...]: which modulation a token takes
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    # the grid, where the tokens are in a sparse pattern's order and attention may leave pairs out
    sparse: Grid | None = None


@dataclass(frozen=True)
class ModelInput:
    """Everything that a forward needs; made by a model's make_input only, which may add fields of its own."""

    x: Tensor  # [B C T H W]: the noised latents and whatever channels the model takes beside them
    t: Tensor  # [B], fp32, as the model counts it
    # the flavor's condition fields, batched; ragged ones padded with zeros to the longest
    cond: Mapping[str, Tensor]
    lengths: Mapping[str, tuple[int, ...]]  # of each ragged field, by sample
    loss_mask: Tensor | None = None  # [B 1 T 1 1], 0 where the velocity is not to be learnt
    # all pairs of tokens attend, also where attention is sparse
    exact: bool = field(default=False, kw_only=True)


class TokenSplit(Protocol):
    """How image tokens are spread over ranks; scatter before the blocks, gather after the head."""

    def scatter(self, tokens: Tokens) -> Tokens: ...

    def gather(self, img: Tensor, n_img: int) -> Tensor: ...  # [B S_local c] -> [B S c]


class _Local:
    def scatter(self, tokens: Tokens) -> Tokens:
        return tokens

    def gather(self, img: Tensor, n_img: int) -> Tensor:
        return img


LOCAL: TokenSplit = _Local()


class TokenOrder(Protocol):
    """Another order of the image tokens, for the blocks alone."""

    def arrange(self, tokens: Tokens) -> Tokens: ...

    def restore(self, img: Tensor, grid: Grid) -> Tensor: ...  # [B S c], of all ranks


class Attend(Protocol):
    """All attention of a model. Every module that attends has one as `attend`, and parallelize() sets it."""

    def joint(
        self, q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int,
        sparse: Grid | None = None
    ) -> Joint:
        """Over the first n_img image tokens of all ranks and the valid text; padding comes back as zeros.
        `sparse` is that of the tokens."""
        ...

    def cross(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...]) -> Tensor:
        """q [B S N D], whatever part of a sequence this rank holds, over the first lengths[b] of k and v [B L
        N D], which every rank holds whole. A sample of length 0 gets zeros."""
        ...


def run_plain(block: nn.Module, tokens: Tokens) -> Tokens:
    return block(tokens)


class DiT(nn.Module):
    """A diffusion transformer: embed -> blocks -> patches, with the token split around the blocks."""

    arch: Any
    blocks: Sequence[nn.Module]  # in the order of execution; each takes and returns Tokens
    sequence: TokenSplit = LOCAL
    order: TokenOrder | None = None  # of sparse attention
    # Whether blocks know a token's place by its rope and per_token alone, and hand
    # tokens.sparse on to `joint`.
    may_be_sparse: ClassVar[bool] = False
    run_block: Callable[[nn.Module, Tokens], Tokens] = staticmethod(run_plain)

    def forward(self, inp: ModelInput) -> Tensor:
        """Velocity [B C T H W]."""
        tokens, order = self.embed(inp), None if inp.exact else self.order
        tokens = self.sequence.scatter(tokens if order is None else order.arrange(tokens))
        for block in self.blocks:
            tokens = self.run_block(block, tokens)
        patches = self.sequence.gather(self.to_patches(tokens), tokens.n_img)
        if order is not None:
            patches = order.restore(patches, tokens.grid)
        return self.unpatchify(patches, tokens.grid)

    def embed(self, inp: Any) -> Tokens:
        """The model's own ModelInput."""
        raise NotImplementedError

    def to_patches(self, tokens: Tokens) -> Tensor:
        """[B S c]: the values of each token's patch."""
        raise NotImplementedError

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        raise NotImplementedError
