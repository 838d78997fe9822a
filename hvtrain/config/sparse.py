"""Attention that is not exact, and what of it can be refused before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from hvtrain.errors import ConfigError


@dataclass(frozen=True)
class SparseConfig:
    """Attention that leaves out pairs of video tokens: faster where there are many, and NOT exact. What it
    does to the quality of the official models was not measured by us. Text tokens and the video attend
    each other fully"""

    pattern: Literal["none", "tiles", "radial"] = "none"
    """none: exact; tiles: each tile attends a window of tiles around it (sliding tile attention); radial:
    the farther apart two frames are, the nearer together tokens must be within them"""
    tile: tuple[int, int, int] = (6, 8, 8)
    """Of tiles: tokens of one along time, height and width"""
    window: tuple[int, int, int] = (3, 3, 3)
    """Of tiles: how many tiles of each axis a tile attends, itself among them"""
    block: int = 128
    """Of radial: consecutive tokens that are computed together"""
    width: float = 1.0
    """Of radial: how many times as far as in the paper tokens see"""
    exact_steps: int = 0
    """The first so many sampling steps are exact, in previews too; training has no such steps"""
    exact_layers: int = 0
    """The first so many blocks are exact"""
    kernel: Literal["auto", "flex", "gather"] = "auto"
    """flex: PyTorch's flex_attention, on CUDA; gather: parallel.kernel on the keys of each tile; auto:
    flex on CUDA, else gather"""

    OWN: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "none": (), "tiles": ("tile", "window"), "radial": ("block", "width")
    }

    @property
    def trained(self) -> dict[str, object]:
        """What changes a training, as files tell it: nothing where attention is exact."""
        names = ("pattern", *self.OWN[self.pattern], "exact_layers") if self.pattern != "none" else ()
        return {name: getattr(self, name) for name in names}

    @property
    def sampled(self) -> dict[str, object]:
        """What changes a video."""
        return {**self.trained, "exact_steps": self.exact_steps} if self.trained else {}


def check_values(cfg: SparseConfig, *, ring: int) -> None:
    """Raises ConfigError."""
    for key, least in {"exact_steps": 0, "exact_layers": 0, "block": 1}.items():
        if getattr(cfg, key) < least:
            raise ConfigError(f"sparse.{key} is {getattr(cfg, key)}, expected {least} or more")
    for key, three in {"tile": cfg.tile, "window": cfg.window}.items():
        if min(three) < 1:
            raise ConfigError(
                f"sparse.{key} is {list(three)}, expected three numbers of 1 or more: time, height, width"
            )
    if not cfg.width > 0:
        raise ConfigError(f"sparse.width is {cfg.width}, expected more than 0")
    if cfg.pattern != "none" and ring > 1:
        raise ConfigError(
            f"sparse.pattern '{cfg.pattern}' cannot be used with parallel.ring {ring}: around a ring no rank "
            "sees whole windows; share a sample by parallel.ulysses alone, or set it to none"
        )
