"""What every model is made of: tokens, blocks and the one forward; and the record that describes an architecture.

Model code is single-device. How tokens are split over ranks (`sequence`), how a block attends (`block.attend`) and how
a block is run (`run_block`) are attributes that functions over the model set; see parallel/apply.py.

Shape legend of the whole package: B batch, C latent channels, T/H/W latent frames/height/width, S image tokens,
L text tokens, N heads, D head dim, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hvtrain.registry import Registry

if TYPE_CHECKING:
    from hvtrain.weights.keymap import KeyMap


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
    """Rotary tables of the image tokens, fp32, each angle twice in a row (interleaved pairs)."""

    cos: Tensor  # [S D]
    sin: Tensor  # [S D]


@dataclass(frozen=True)
class Tokens:
    """What flows from block to block. `img`, `rope` and `first` are split together over sequence-parallel ranks."""

    img: Tensor  # [B S E]
    txt: Tensor  # [B L E], zero or garbage beyond txt_len
    txt_len: tuple[int, ...]
    vec: Tensor  # [B E], the conditioning vector
    rope: Rope
    n_img: int  # valid image tokens of the whole sequence, all ranks together
    grid: Grid
    first: Tensor | None = None  # bool [S]: tokens that take the modulation of vec0
    vec0: Tensor | None = None  # [B E]


@dataclass(frozen=True)
class ModelInput:
    """Everything that a forward needs; made by a model's make_input only."""

    x: Tensor  # [B C T H W]
    t: Tensor  # [B], 0..1000, fp32
    text: Tensor  # [B L E]
    text_len: tuple[int, ...]
    cond: Mapping[str, Tensor] = field(default_factory=dict)  # "pooled" [B P], "guidance" [B] (times 1000), ...
    loss_mask: Tensor | None = None  # [B 1 T 1 1], 0 where the velocity is not to be learnt
    token_replace: bool = False  # the first latent frame is clean: its tokens take the modulation of t = 0


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


class Attend(Protocol):
    """Joint attention over the first n_img image tokens of all ranks and the valid text; padding comes back as zeros."""

    def __call__(self, q: Joint, k: Joint, v: Joint, *, txt_len: tuple[int, ...], n_img: int) -> Joint: ...


def run_plain(block: nn.Module, tokens: Tokens) -> Tokens:
    return block(tokens)


class DiT(nn.Module):
    """A diffusion transformer: embed -> blocks -> head, with the token split around the blocks."""

    arch: Any
    sequence: TokenSplit = LOCAL
    run_block: Callable[[nn.Module, Tokens], Tokens] = staticmethod(run_plain)

    def forward(self, inp: ModelInput) -> Tensor:
        """Velocity [B C T H W]."""
        tokens = self.sequence.scatter(self.embed(inp))
        for block in self.blocks:
            tokens = self.run_block(block, tokens)
        patches = self.sequence.gather(self.head(tokens), tokens.n_img)
        return self.unpatchify(patches, tokens.grid)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order of execution; each takes and returns Tokens and has an `attend`."""
        raise NotImplementedError

    def embed(self, inp: ModelInput) -> Tokens:
        raise NotImplementedError

    def head(self, tokens: Tokens) -> Tensor:
        """[B S c]: the values of each token's patch."""
        raise NotImplementedError

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class LatentGeometry:
    """What the VAE makes of a video: channels, and how many pixels or frames one latent cell spans."""

    channels: int
    stride_t: int
    stride_h: int
    stride_w: int
    patch: tuple[int, int, int]

    def shape(self, *, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C T H W] of a clip of stride_t * n + 1 frames."""
        t = (frames - 1) // self.stride_t + 1
        return self.channels, t, height // self.stride_h, width // self.stride_w

    def n_tokens(self, shape: Sequence[int]) -> int:
        """Image tokens of latents [C T H W]."""
        t, h, w = (n // p for n, p in zip(shape[-3:], self.patch, strict=True))
        return t * h * w


@dataclass(frozen=True)
class CondField:
    """A condition that a sample must bring along: `dims` without the batch, None for a varying length."""

    name: str
    dims: tuple[int | None, ...]
    dtype: torch.dtype
    column: str  # the shard column that holds it
    optional: bool = False


@dataclass(frozen=True)
class Defaults:
    """What a model is meant to be sampled with, and trained with."""

    steps: int
    shift: float
    guidance: float | None  # embedded in the model; None: it embeds none
    fps: int
    frames: int
    height: int
    width: int
    negative_prompt: str
    cfg_scale: float = 1.0  # true classifier-free guidance; 1 is off
    training_shift: float | None = None  # where it is not the one of sampling


@dataclass(frozen=True)
class Flavor:
    """One set of weights of an architecture: its sizes, its latents, what it is conditioned on and does."""

    name: str
    about: str
    arch: Any  # a frozen dataclass of the architecture's folder
    latent: LatentGeometry
    cond: tuple[CondField, ...]
    tasks: tuple[str, ...]  # the first is what it is trained on
    defaults: Defaults

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a shard set, those that training reads."""
        return tuple(dict.fromkeys(("latents", *(field.column for field in self.cond))))

    @property
    def beyond_text(self) -> list[str]:
        """Conditions that no prompt gives."""
        return [field.name for field in self.cond if field.column != "text"]


class FlavorOf(Protocol):
    """The flavor for an architecture: named by the user, hinted at by the file, or told by the sizes."""

    def __call__(self, arch: Any, name: str | None, *, hint: str | None = None) -> Flavor: ...


class MakeInput(Protocol):
    def __call__(
        self, x_sigma: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], *, task: str, guidance: float | None
    ) -> ModelInput: ...


@dataclass(frozen=True)
class TinyParts:
    """What the recipes of the embedded models (hvtrain/tiny) need of the architecture that they shrink."""

    build_vae: Callable[..., Any]  # (channels, norm_groups, latent_channels) -> untrained VAE of the official class
    save_vae: Callable[[Any, str], None]
    prompt_template: Callable[[], str]  # what the text encoder reads around a prompt


@dataclass(frozen=True)
class MusubiCache:
    """How musubi-tuner names and fills its cache files for this architecture."""

    short: str  # in file names
    full: str  # in the files' metadata
    latents: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # a latent file's tensors -> our fields
    text: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class ModelSpec:
    """An architecture: data and functions that the rest of the program calls without knowing its name."""

    name: str
    flavors: Mapping[str, Flavor]
    build: Callable[[Any], DiT]  # arch -> model; on the meta device under `with torch.device("meta")`
    init_weights: Callable[[DiT, torch.Generator], None]  # for training from scratch
    arch_from_weights: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, str]], Any]
    flavor_of: FlavorOf
    owns: Callable[[Mapping[str, tuple[int, ...]]], bool]  # official names and shapes -> is it this architecture?
    looks_like: Callable[[Mapping[str, tuple[int, ...]]], str | None]  # what else a file might be
    lora_looks_like: Callable[[Iterable[str]], str | None]  # the same for the layers that a foreign LoRA adapts
    make_input: MakeInput
    open_vae: Callable[..., Any]
    open_text: Callable[..., Any]
    # (llm, llm_tokenizer, clip, clip_tokenizer) -> what the fingerprints of open_text's encoders may be, from headers and samples
    text_fingerprints: Callable[..., tuple[str, ...]]
    key_maps: Mapping[str, KeyMap]  # dialect -> map to and from the official names
    is_lora_target: Callable[[str], bool]  # module name -> trained unless excluded
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of the videos that its authors list
    tiny: TinyParts | None = None
    musubi: MusubiCache | None = None

    def flavor(self, name: str) -> Flavor:
        return Registry("flavor", self.flavors).find(name, key=f"model.flavor of {self.name}")

    def lora_targets(
        self, model: DiT, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> list[str]:
        """Names of the Linear modules that a LoRA adapts, in the model's order; see models/targets.py."""
        from hvtrain.models.targets import lora_targets

        return lora_targets(self, model, include=include, exclude=exclude)
