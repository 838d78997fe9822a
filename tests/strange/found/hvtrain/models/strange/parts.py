"""A strange VAE, its text encoders and its eye: a matrix or table each."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hvtrain.config import VaeTilingConfig
from hvtrain.errors import CheckpointError, DataError
from hvtrain.models.spec import Parts
from hvtrain.models.strange.arch import CHANNELS, FLAVORS
from hvtrain.weights.containers import fingerprint, open_weights

DEVIATION = 0.02  # of the posterior, everywhere
CELL = 4  # colours of so many by so many places are what a latent cell holds
_PAIR = FLAVORS["pair"]
TABLES = {"words": (64, _PAIR.arch.words_dim), "letters": (32, _PAIR.arch.letters_dim)}
EYE = (3, _PAIR.arch.sight_dim)
LONGEST = {field.name: field.longest for field in _PAIR.cond}


class Table:
    """The one tensor of a file, which says what it is by its name."""

    def __init__(
        self, path: str | Path, name: str, shape: tuple[int, ...], *, dtype: torch.dtype,
        device: torch.device | str
    ):
        weights = open_weights(path)
        if weights.shapes != {name: shape}:
            raise CheckpointError(f"{path}: holds {weights.shapes}, expected '{name}' of {shape}")
        self.fingerprint = fingerprint(weights)
        self.values = weights.get(name).to(device=device, dtype=dtype, copy=True)

    def to(self, device: torch.device | str) -> None:
        self.values = self.values.to(device)


class StrangeVae:
    channels = CHANNELS
    stride = (4, 16, 16)

    def __init__(self, mix: Table) -> None:
        self.mix, self.fingerprint = mix, mix.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        return self.mix.values.dtype

    @property
    def device(self) -> torch.device:
        return self.mix.values.device

    def to(self, device: torch.device | str) -> StrangeVae:
        self.mix.to(device)
        return self

    @torch.no_grad()
    def encode(
        self, video: Tensor, *, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """[B 3 F H W] -> [B 48 T h w]: the first frame alone, then four at a time, each cell's
        colours turned by a matrix."""
        frames, height, width = video.shape[2:]
        if (frames - 1) % 4 or height % 16 or width % 16:
            raise DataError(
                f"a clip of {frames} frames, {width}x{height}: expected 4n + 1 and multiples of 16"
            )
        video = video.to(self.device, torch.float32)
        later = video[:, :, 1:].unflatten(2, (-1, 4)).mean(3)
        coarse = F.avg_pool3d(torch.cat([video[:, :, :1], later], 2), (1, 16 // CELL, 16 // CELL))
        cells = rearrange(coarse, "b c t (h p) (w q) -> b (c p q) t h w", p=CELL, q=CELL)
        latents = torch.einsum("dc,bcthw->bdthw", self.mix.values.float(), cells)
        if generator is None:
            return latents
        draws = [generator] if isinstance(generator, torch.Generator) else generator
        shape = latents.shape if isinstance(generator, torch.Generator) else (1, *latents.shape[1:])
        noise = torch.cat([torch.randn(shape, generator=g) for g in draws])
        return latents + DEVIATION * noise.to(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """[B 48 T h w] -> [B 3 4T-3 16h 16w]."""
        cells = torch.einsum(
            "dc,bdthw->bcthw", self.mix.values.float(), latents.to(self.device, torch.float32)
        )
        coarse = rearrange(cells, "b (c p q) t h w -> b c t (h p) (w q)", p=CELL, q=CELL)
        video = F.interpolate(coarse, scale_factor=(1, 16 // CELL, 16 // CELL))
        video = torch.cat([video[:, :, :1], video[:, :, 1:].repeat_interleave(4, dim=2)], 2)
        return video.clamp(-1, 1) if clamp else video


class StrangeText:
    """Words, and the letters of what a prompt quotes: none in most of them."""

    def __init__(self, words: Table, letters: Table) -> None:
        self.words, self.letters = words, letters
        self.fingerprint = _joined(words.fingerprint, letters.fingerprint)

    def to(self, device: torch.device | str) -> StrangeText:
        self.words.to(device)
        self.letters.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{"words": self._words(p), "letters": self._letters(p)} for p in prompts]

    def _words(self, prompt: str) -> Tensor:
        n = len(self.words.values) - 1
        ids = [0, *(1 + zlib.crc32(word.encode()) % n for word in prompt.split())]
        return _rows(self.words, ids[: LONGEST["words"]])

    def _letters(self, prompt: str) -> Tensor:
        quoted = "".join(re.findall(r'"([^"]*)"', prompt))
        return _rows(self.letters, [ord(c) % len(self.letters.values) for c in quoted[: LONGEST["letters"]]])


class Eye:
    """The mean colours of an image's quarters."""

    def __init__(self, table: Table) -> None:
        self.table, self.fingerprint = table, table.fingerprint

    def to(self, device: torch.device | str) -> Eye:
        self.table.to(device)
        return self

    def encode(self, pictures: Tensor) -> list[dict[str, Tensor]]:
        """[B 3 H W] in [-1, 1] -> "sight" [4 20] of each."""
        quarters = F.adaptive_avg_pool2d(pictures.to(self.table.values), 2).flatten(2).mT  # [B 4 3]
        return [{"sight": (one @ self.table.values).float().cpu()} for one in quarters]


def open_vae(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu",
    tiling: VaeTilingConfig | None = None
) -> StrangeVae:
    """It needs no tiles."""
    return StrangeVae(Table(path, "strange_vae.mix", (CHANNELS, CHANNELS), dtype=dtype, device=device))


def open_text(
    parts: Parts, *, dtype: torch.dtype, device: torch.device | str = "cpu", fp8: bool = False
) -> StrangeText:
    """Tables are no linear layers: `fp8` leaves them alone."""
    return StrangeText(
        *(Table(parts[n], f"strange_{n}", s, dtype=dtype, device=device) for n, s in TABLES.items())
    )


def open_eye(parts: Parts, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Eye:
    return Eye(Table(parts["eye"], "strange_eye", EYE, dtype=dtype, device=device))


def text_fingerprints(parts: Parts) -> tuple[str, ...]:
    return (_joined(*(fingerprint(open_weights(parts[name])) for name in TABLES)),)


def _joined(*prints: str) -> str:
    return hashlib.sha256("/".join(prints).encode()).hexdigest()


def _rows(table: Table, ids: Sequence[int]) -> Tensor:
    return table.values[torch.tensor(ids, dtype=torch.long)].float().cpu()
