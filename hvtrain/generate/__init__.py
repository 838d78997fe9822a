"""`hvtrain generate`: from prompts to videos."""

from __future__ import annotations

from pathlib import Path

from hvtrain.config import GenerateConfig
from hvtrain.parallel.context import ParallelContext


def run(cfg: GenerateConfig, ctx: ParallelContext | None = None) -> list[Path]:
    """Make the videos that are not there yet; the files of all, in order. Collective: every rank calls it."""
    from hvtrain.generate import pipeline

    return pipeline.run(cfg, ctx)
