"""Samples into tensors: pixels through the VAE or another encoder, captions through the text encoders. In
order, a few samples at a time."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hvtrain.config.parts import MASK
from hvtrain.encode.clips import Rejected
from hvtrain.encode.media import read_windows
from hvtrain.encode.samples import Picture, PlannedSample
from hvtrain.errors import DataError
from hvtrain.models.spec import PictureEncoder, TextEncoders, Vae
from hvtrain.rng import generator

Fields = dict[str, Tensor]
Outcome = tuple[PlannedSample, "Fields | str"]  # the tensors, or why there are none
Encode = Callable[[Sequence[PlannedSample]], Iterator[Outcome]]  # in the samples' order

DECODE_BYTES = 256 << 20  # pixels of one decoding job: windows of a long clip are decoded together up to this
CAPTIONS = 32  # samples whose captions are encoded together


@dataclass(frozen=True)
class Shot:
    """One of the pictures that a sample's column is made of."""

    sample: PlannedSample
    number: int
    picture: Picture


@dataclass(frozen=True)
class Latents:
    """Pictures through the VAE: NAME, NAME_1, ... `given`: they are these frames of a clip of the sample's
    length that is grey otherwise."""

    vae: Vae
    name: str
    dtype: torch.dtype
    seed: int
    given: tuple[int, ...] = ()
    fault: ClassVar[str] = "the VAE makes NaN or infinite latents of it; try model.vae_dtype=float32"

    def __call__(self, pixels: Tensor, shots: Sequence[Shot]) -> list[Fields]:
        video = _signed(pixels.to(self.vae.device))  # as bytes: a quarter of the traffic
        if self.given:
            whole = video.new_zeros(*video.shape[:2], len(shots[0].sample.clip.frames), *video.shape[3:])
            whole[:, :, list(self.given)] = video
            video = whole
        # A generator per key: the posterior's sample does not depend on batches or ranks.
        draws = [generator(self.seed, stream=self._stream(shot)) for shot in shots]
        latents = self.vae.encode(video.to(self.vae.dtype), generator=draws).to("cpu", self.dtype)
        return [{self._name(shot): x.clone()} for shot, x in zip(shots, latents)]

    def _name(self, shot: Shot) -> str:
        return f"{self.name}_{shot.number}" if shot.number else self.name

    def _stream(self, shot: Shot) -> str:
        name = self._name(shot)
        return f"posterior/{shot.sample.key}" if name == "latents" else f"posterior/{name}/{shot.sample.key}"


@dataclass(frozen=True)
class Looks:
    """Each frame of a picture through an encoder of the model's own; the fields of several are joined."""

    eye: PictureEncoder
    device: torch.device
    dtype: torch.dtype
    key: str  # of the config

    @property
    def fault(self) -> str:
        return f"{self.key} makes NaN or infinite values of it; try model.dtype=float32"

    def __call__(self, pixels: Tensor, shots: Sequence[Shot]) -> list[Fields]:
        frames = _signed(pixels.to(self.device)).transpose(1, 2)  # [B F 3 H W]
        n = frames.shape[1]
        seen = self.eye.encode(frames.flatten(0, 1))
        return [
            {
                name: torch.cat([one[name] for one in seen[i : i + n]]).to("cpu", self.dtype)
                for name in seen[i]
            }
            for i in range(0, len(seen), n)
        ]


@dataclass(frozen=True)
class Masks:
    """Pictures to how much of each latent cell is white, 0 to 1: a cell spans so many frames and
    pixels, the first one frame."""

    stride_t: int
    stride_h: int
    stride_w: int
    fault: ClassVar[str] = "makes no mask"

    def __call__(self, pixels: Tensor, shots: Sequence[Shot]) -> list[Fields]:
        light = pixels.float().mean(-1) / 255  # [B F H W]
        cells = F.avg_pool2d(light, (self.stride_h, self.stride_w))  # frames as channels
        first, rest = (
            cells[:, :1],
            cells[:, 1:].unflatten(1, ((cells.shape[1] - 1) // self.stride_t, self.stride_t)).mean(2)
        )
        return [{MASK: mask[None].bfloat16()} for mask in torch.cat([first, rest], dim=1)]  # [1 T h w]


@dataclass(frozen=True)
class PixelEncoder:
    """Pictures, decoded ahead by threads, in batches of one shape."""

    pictures: Callable[[PlannedSample], Sequence[Picture]]
    make: Latents | Looks | Masks  # uint8 [B F H W 3] and whose they are -> the fields of each
    batch_size: int
    workers: int

    def __call__(self, samples: Sequence[PlannedSample]) -> Iterator[Outcome]:
        shots = [Shot(s, i, p) for s in samples for i, p in enumerate(self.pictures(s))]
        left, waiting = Counter(shot.sample.key for shot in shots), deque(samples)
        done: dict[str, Fields | str] = {}
        for shot, result in self._encoded(shots):
            key = shot.sample.key
            left[key] -= 1
            before = done.get(key, {})
            done[key] = (
                before if isinstance(before, str) else result if isinstance(result, str) else before | result
            )
            while waiting and not left[waiting[0].key]:
                yield waiting[0], done.pop(waiting.popleft().key)

    @torch.no_grad()
    def _encoded(self, shots: Sequence[Shot]) -> Iterator[tuple[Shot, Fields | str]]:
        batch: list[tuple[Shot, np.ndarray]] = []
        for shot, pixels in self._decoded(shots):
            if isinstance(pixels, str):
                yield shot, pixels
                continue
            if batch and (len(batch) == self.batch_size or batch[0][1].shape != pixels.shape):
                yield from self._flush(batch)
                batch = []
            batch.append((shot, pixels))
        if batch:
            yield from self._flush(batch)

    def _flush(self, batch: Sequence[tuple[Shot, np.ndarray]]) -> Iterator[tuple[Shot, Fields | str]]:
        shots = [shot for shot, _ in batch]
        for shot, fields in zip(shots, self.make(torch.from_numpy(np.stack([p for _, p in batch])), shots)):
            sound = all(x.isfinite().all() for x in fields.values())
            yield shot, fields if sound else f"{shot.picture.path}: {self.make.fault}"

    def _decoded(self, shots: Sequence[Shot]) -> Iterator[tuple[Shot, np.ndarray | str]]:
        units = _units(shots)
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            ahead: deque[tuple[list[Shot], Future]] = deque()
            try:
                for unit in units:
                    ahead.append((unit, pool.submit(_decode, unit)))
                    # One per thread and one in hand: enough to keep the VAE busy,
                    # little enough to fit in memory.
                    if len(ahead) > max(1, self.workers):
                        first, future = ahead.popleft()
                        yield from zip(first, future.result())
                while ahead:
                    first, future = ahead.popleft()
                    yield from zip(first, future.result())
            finally:
                for _, future in ahead:
                    future.cancel()


def _units(shots: Sequence[Shot]) -> Iterator[list[Shot]]:
    """Neighbours that come from one file at one size."""
    unit: list[Shot] = []
    for shot in shots:
        same = unit and (unit[0].picture.path, unit[0].picture.size) == (shot.picture.path, shot.picture.size)
        if unit and (not same or sum(j.picture.n_bytes for j in unit) + shot.picture.n_bytes > DECODE_BYTES):
            yield unit
            unit = []
        unit.append(shot)
    if unit:
        yield unit


def _decode(unit: Sequence[Shot]) -> list[np.ndarray | str]:
    first = unit[0].picture
    try:
        return list(read_windows(first.path, [shot.picture.frames for shot in unit], size=first.size))
    except DataError as error:
        if len(unit) == 1:
            return [str(error)]
    # the early windows of a damaged file may be sound
    return [result for shot in unit for result in _decode([shot])]


@dataclass(frozen=True)
class TextEncoder:
    """Captions through the text encoders; windows of one clip share theirs, unless the
    encoders see each one's picture."""

    text: TextEncoders
    dtype: torch.dtype
    seen: Callable[[PlannedSample], Sequence[Picture]] | None = None
    workers: int = 1
    cache: OrderedDict[tuple[str, Picture | None], Fields | str] = field(default_factory=OrderedDict)

    @torch.no_grad()
    def __call__(self, samples: Sequence[PlannedSample]) -> Iterator[Outcome]:
        for i in range(0, len(samples), CAPTIONS):
            part = [(s, self.seen(s)[0] if self.seen else None) for s in samples[i : i + CAPTIONS]]
            self._encode(list(dict.fromkeys((c, picture) for s, picture in part for c in s.captions)))
            for s, picture in part:
                found = [self.cache[c, picture] for c in s.captions]
                faults = [f for f in found if isinstance(f, str)]
                yield (
                    s,
                    f"{s.clip.path}: {faults[0]}"
                    if faults else _numbered([f for f in found if not isinstance(f, str)])
                )

    def _encode(self, captions: Sequence[tuple[str, Picture | None]]) -> None:
        """Make sure that these are in the cache, which otherwise keeps the last ones only."""
        new = [c for c in captions if c not in self.cache]
        pixels = self._decoded([picture for _, picture in new if picture is not None])
        self.cache.update({(c, p): why for c, p in new if isinstance(why := pixels.get(p), str)})
        new = [(c, p) for c, p in new if not isinstance(pixels.get(p), str)]
        shown = ([pixels[p] for _, p in new],) if self.seen else ()
        for one, fields in zip(new, self.text.encode([c for c, _ in new], *shown) if new else []):
            self.cache[one] = self.stored(fields, one[0])
        for one in captions:
            self.cache.move_to_end(one)
        while len(self.cache) > max(2 * CAPTIONS, len(captions)):
            self.cache.popitem(last=False)

    def _decoded(self, pictures: Sequence[Picture]) -> dict[Picture | None, Tensor | str]:
        """[3 H W] in [-1, 1] of each, or why there is none."""

        def read(picture: Picture) -> Tensor | str:
            try:
                (pixels,) = read_windows(picture.path, [picture.frames[:1]], size=picture.size)
            except DataError as error:
                return str(error)
            return _signed(torch.from_numpy(pixels[None]))[0, :, 0]

        unique = list(dict.fromkeys(pictures))
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            return dict(zip(unique, pool.map(read, unique)))

    def stored(self, fields: Mapping[str, Tensor], caption: str) -> Fields | str:
        if not all(t.isfinite().all() for t in fields.values()):
            return f"the text encoder makes NaN or infinite embeddings of the caption {caption[:80]!r}"
        return {name: t.to("cpu", self.dtype).contiguous() for name, t in fields.items()}


def _numbered(captions: Sequence[Fields]) -> Fields:
    """The first caption's fields under their names, those of caption i as NAME.i."""
    return {
        f"{name}.{i}" if i else name: t for i, fields in enumerate(captions) for name, t in fields.items()
    }


def rejected(sample: PlannedSample, reason: str) -> Rejected:
    """Known again by a re-run, until the file, its window or its caption changes."""
    return Rejected(str(sample.clip.path), reason, sample.state)


def _signed(pixels: Tensor) -> Tensor:
    """uint8 [B F H W 3] -> float32 [B 3 F H W] in [-1, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1
