"""The record of an architecture: data and a few functions that the rest of the program
calls without knowing its name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hvtrain.config.parts import Part, parts_of
from hvtrain.config.sampling import Sampling
from hvtrain.errors import ConfigError
from hvtrain.models.dit import DiT, Grid, ModelInput
from hvtrain.registry import Registry
from hvtrain.weights.keymap import KeyMap

Shapes = Mapping[str, tuple[int, ...]]
Parts = Mapping[str, str]  # name of a part -> its file or directory


# --- sizes --------------------------------------------------------------------------------------------------


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

    def grid(self, shape: Sequence[int]) -> Grid:
        """Of the image tokens of latents [C T H W]."""
        return Grid(*(n // p for n, p in zip(shape[-3:], self.patch, strict=True)))

    def n_tokens(self, shape: Sequence[int]) -> int:
        """Image tokens of latents [C T H W]."""
        return math.prod(self.grid(shape))

    @property
    def unit(self) -> tuple[int, int]:
        """Height and width in pixels are multiples of these."""
        return self.stride_h * self.patch[1], self.stride_w * self.patch[2]

    def check_size(
        self, *, width: int | None = None, height: int | None = None, frames: int | None = None
    ) -> None:
        """Raises ConfigError for a size that the latents cannot hold, with one
        near it; None is not asked for."""
        for name, value, unit in (("width", width, self.unit[1]), ("height", height, self.unit[0])):
            if value is not None and (value <= 0 or value % unit):
                near = max(unit, (value + unit // 2) // unit * unit)
                raise ConfigError(f"{name} is {value}, expected a multiple of {unit}, for example {near}")
        n = self.stride_t
        if frames is not None and (frames < 1 or (frames - 1) % n):
            near = max(frames - 1, 0) // n * n + 1
            raise ConfigError(f"frames is {frames}, expected {n}n + 1, for example {near} or {near + n}")


@dataclass(frozen=True)
class Field:
    """A tensor that a sample must bring along: `dims` without the batch, None for a length that varies.

    The first of them None makes it ragged: a batch pads it with zeros to its
    longest, and says each one's length.
    """

    name: str
    dims: tuple[int | None, ...]
    dtype: torch.dtype
    column: str  # the shard column that holds it
    optional: bool = False
    longest: int | None = None  # of a ragged one: what the encoder cuts at

    @property
    def ragged(self) -> bool:
        return bool(self.dims) and self.dims[0] is None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether one sample's tensor has this shape."""
        return (
            len(shape) == len(self.dims) and all(want in (None, have) for want, have in zip(self.dims, shape))
        )

    def __str__(self) -> str:
        return " x ".join("any" if n is None else str(n) for n in self.dims)


# --- what a model is made of --------------------------------------------------------------------------------


class Vae(Protocol):
    """Video in [-1, 1] to scaled latents and back, without gradients."""

    channels: int
    stride: tuple[int, int, int]
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str) -> Vae: ...

    def encode(self, video: Tensor, *, generator: Any = None) -> Tensor:
        """[B 3 F H W] -> [B C T h w] float32; without a generator (or one a clip) the posterior's mode."""
        ...

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """[B C T h w] -> [B 3 F H W] float32."""
        ...


class TextEncoders(Protocol):
    """Prompts to the fields of column "text", one by one at their own length, so that
    no prompt depends on its batch.

    Those of a flavor that `sees` take the picture of each prompt too, [3 H W] in [-1, 1]; none is what stands
    in for it where a prompt is dropped or negative: `encode(prompts, pictures)`."""

    fingerprint: str

    def to(self, device: torch.device | str) -> TextEncoders: ...

    def encode(self, prompts: Sequence[str], *pictures: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        """Per prompt its fields without the batch, on the CPU."""
        ...


class PictureEncoder(Protocol):
    """Pictures to the fields of a column of the model's own, as of a vision encoder."""

    fingerprint: str

    def to(self, device: torch.device | str) -> PictureEncoder: ...

    def encode(self, pictures: Tensor) -> list[dict[str, Tensor]]:
        """[B 3 H W] in [-1, 1] -> per picture its fields without the batch, on the CPU."""
        ...


class Enlarger(Protocol):
    """A smaller video's latents to the condition fields of a flavor that enlarges."""

    fingerprint: str

    def __call__(
        self, latents: Tensor, shape: Sequence[int], *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scaled [C T h w] -> fields without the batch, on the CPU, for a video of latents [C T H W]."""
        ...


@dataclass(frozen=True)
class Column:
    """A column that the model has besides the common ones (latents, image,
    control, text): how it is encoded."""

    name: str
    about: str
    parts: tuple[str, ...]  # files that its encoder is made of
    open: Callable[..., PictureEncoder]  # (parts, *, dtype, device)
    source: Literal["image"] = "image"  # what of a sample: its first frame, or the image that it comes with


@dataclass(frozen=True)
class Expert:
    """One of several DiTs that share the noise levels among them."""

    name: str
    part: str  # its file: "dit" or another part
    sigmas: tuple[float, float]  # it predicts for low <= sigma < high; the highest also for 1
    cfg_scale: float | None = None  # None: the flavor's
    named: str = ""  # a pattern of what its file is called, or its directory, in lower case


@dataclass(frozen=True)
class Defaults(Sampling):
    """What a model is meant to be sampled with, and trained with. Guidance None: it embeds none."""

    seed: int = 0
    cfg_scale: float = 1.0
    solver: str = "euler"
    negative_prompt: str = ""
    training_shift: float | None = None  # where it is not the one of sampling
    prompt_prefix: str = ""  # every prompt and caption begins so

    def prompted(self, prompt: str) -> str:
        """As the text encoders read it."""
        return prompt if prompt.startswith(self.prompt_prefix) else self.prompt_prefix + prompt


@dataclass(frozen=True)
class Flavor:
    """One set of weights of an architecture: its sizes, its latents, what it is conditioned on and does."""

    name: str
    about: str
    arch: Any  # a frozen dataclass of the architecture's folder; it has a `head_dim`
    n_heads: int
    latent: LatentGeometry
    cond: tuple[Field, ...]
    tasks: tuple[str, ...]  # the first is what it is trained on
    defaults: Defaults
    experts: tuple[Expert, ...] = ()  # none: one DiT for all noise levels
    unguided: bool = False  # distilled so far that classifier-free guidance breaks it
    image_optional: bool = False  # of one that takes an image: it also makes videos without
    # it can be trained with and without, as those can: cond["image_given"] [B] bool tells
    mixes: bool = False
    enlarges: bool = False  # it makes a larger video of a smaller one
    sees: int = 0  # above 0 its text encoders see the image too, every n-th token of which the DiT reads
    # frames of a clip that its image conditions are made of: 0 the first, -1 the last
    given: tuple[int, ...] = (0,)
    # Where the training shift follows a clip's size: two points (image tokens of all its
    # frames, log of the shift) of a line
    shift_by_tokens: tuple[tuple[float, float], tuple[float, float]] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a shard set, those that training reads."""
        return tuple(dict.fromkeys(("latents", *(field.column for field in self.cond))))

    @property
    def beyond_text(self) -> list[str]:
        """Conditions that no prompt gives."""
        return [field.name for field in self.cond if field.column != "text"]

    def check_file(self, expert: Expert, path: str | Path) -> None:
        """Raises ConfigError where the name of an expert's file, or of its directory, is
        another's: no weight would show it."""
        for name in (Path(path).name.lower(), Path(path).parent.name.lower()):
            said = [e for e in self.experts if e.named and re.search(e.named, name)]
            if said == [expert]:
                return
            if len(said) == 1:
                raise ConfigError(
                    f"model.{expert.part}: {path} is by its name the expert '{said[0].name}', and this is "
                    f"the file of '{expert.name}', which predicts other noise levels; give that, or rename it"
                )

    def expert(self, sigma: float) -> Expert | None:
        """Whose noise level this is; None where there is one DiT for all."""
        return next(
            (e for e in self.experts if e.sigmas[0] <= sigma < e.sigmas[1] or sigma >= e.sigmas[1] >= 1), None
        )


class MakeInput(Protocol):
    """(noised latents [B C T H W], sigma [B], a batch's conditions and, as NAME_len
    [B], their lengths) -> the input.

    `x0` are the clean latents where there are any (training): what a condition
    defaults to is the model's to say.
    """

    def __call__(
        self, x_sigma: Tensor, sigma: Tensor, cond: Mapping[str, Tensor], *, task: str,
        guidance: float | None, x0: Tensor | None = None,
    ) -> ModelInput: ...


@dataclass(frozen=True)
class TinyVae:
    """A VAE that hvtrain/tiny trains at small widths."""

    # (channels, norm_groups, latent_channels) -> untrained, posterior nearly without noise
    build: Callable[..., Any]
    save: Callable[[Any, str], None]  # in half precision
    # video [B 3 F H W] -> mean, log-variance [B C T h w], unscaled
    moments: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Any, Tensor], Tensor]  # unscaled latents -> video
    # (mean [C], deviation [C]): scaled latents get mean 0, deviation 1
    whiten: Callable[[Any, Tensor, Tensor], None]
    encoder: str  # pattern of parameters that hold still while the decoder alone is trained
    branches: str  # pattern of parameters that end a residual branch


@dataclass(frozen=True)
class TinyText:
    """An encoder of fixed random features, of text with a tokenizer of its own."""

    part: str  # its key under `model:`, and its directory
    build: Callable[[Any], Any]  # tokenizer -> module
    gains: Mapping[str, float]  # kind of weight -> factor of its deviation
    # what transformers calls special tokens -> them; the first also stands for what
    # is unknown. None: no tokenizer
    specials: Mapping[str, str]
    more_specials: tuple[str, ...] = ()
    atoms: Sequence[str] = ()  # one token each wherever they occur
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # of every text


@dataclass(frozen=True)
class TinyParts:
    """What the recipes of the embedded models (hvtrain/tiny) need of the architecture that they shrink."""

    vae: TinyVae
    text: tuple[TinyText, ...]
    folder: str = ""  # of its files, below hvtrain/tiny/assets and configs/tiny
    n_clips: int = 48  # of the demo's concept, that its LoRA learns from


@dataclass(frozen=True)
class MusubiCache:
    """How musubi-tuner names and fills its cache files for this architecture."""

    short: str  # in file names
    full: str  # in the files' metadata
    latents: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # a latent file's tensors -> our fields
    text: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class ModelSpec:
    """An architecture."""

    name: str
    flavors: Mapping[str, Flavor]
    arch: type  # the frozen dataclass of its sizes
    kind: tuple[str, ...]  # fields of it that tell flavors apart at whatever size
    signature: Callable[[Shapes], bool]  # official names and shapes -> is it this architecture?
    sizes_from: Callable[[Shapes], Any]  # official names and shapes -> arch; raises CheckpointError
    fitted: Callable[[Flavor, Any], Flavor]  # a flavor with exactly a file's sizes
    build: Callable[[Any], DiT]  # arch -> model; on the meta device under `with torch.device("meta")`
    init_weights: Callable[[DiT, torch.Generator], None]  # for training from scratch
    make_input: MakeInput
    open_vae: Callable[..., Vae]  # (path, *, dtype, device, tiling)
    # (parts, *, dtype, device, fp8), and `sees` for a flavor that does
    open_text: Callable[..., TextEncoders]
    # (parts), `sees` too: what open_text's may be, from headers and values
    text_fingerprints: Callable[..., tuple[str, ...]]
    key_maps: Mapping[str, KeyMap]  # dialect -> map to and from the official names
    is_lora_target: Callable[[str], bool]  # module name -> trained unless excluded
    # metadata of LoRAs as others write them, where not its name
    lora_about: Mapping[str, str] = field(default_factory=dict)
    # dialect of LoRAs -> key map, where it is not the dialect's own
    lora_keys: Mapping[str, str] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()  # fields of `arch` that no weight shows: the flavor tells them
    # a file's path -> the flavor that its names speak of, if any
    told_by: Callable[[Path], str | None] | None = None
    may_differ: tuple[str, ...] = ()  # fields of it in which a file of a flavor may differ
    columns: tuple[Column, ...] = ()  # its own, besides the common ones
    # (vae, encoders of its own columns by name, the given frames [n 3 H W] in [-1, 1] or the only one [3 H
    # W], latents' [C T H W]) -> condition fields without the batch: what a flavor needs beyond a prompt
    image_conditions: Callable[..., dict[str, Tensor]] | None = None
    # (parts, flavor, *, device), for flavors that enlarge
    open_enlarger: Callable[..., Enlarger] | None = None
    # (noise [B C T H W], a batch's conditions, *, task, x0) -> where sampling begins, for
    # a task that begins elsewhere
    start: Callable[..., Tensor] | None = None
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of the videos that its authors list
    # of its official files besides the DiT's
    part_shapes: Mapping[str, Callable[[Flavor], Shapes]] = field(default_factory=dict)
    tiny: Callable[[], TinyParts] | None = None
    musubi: MusubiCache | None = None

    @property
    def parts(self) -> Mapping[str, Part]:
        """The files that it is made of, by their key under `model:`."""
        return parts_of(self.name)

    def flavor(self, name: str | None) -> Flavor:
        """By name; None is the first. Raises ConfigError."""
        if name is None:
            return next(iter(self.flavors.values()))
        return Registry("flavor", self.flavors).find(name, key=f"model.flavor of {self.name}")

    def column(self, name: str) -> Column | None:
        """Of its own."""
        return next((column for column in self.columns if column.name == name), None)

    def lora_targets(self, model: DiT, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
        """Names of the Linear modules that a LoRA adapts, in the model's order; see models/targets.py."""
        from hvtrain.models.targets import lora_targets

        return lora_targets(self, model, include=include, exclude=exclude)
