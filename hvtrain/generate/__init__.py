"""`hvtrain generate`: from prompts to videos."""

from __future__ import annotations

from hvtrain.config import GenerateConfig
from hvtrain.parallel.context import ParallelContext


def run(cfg: GenerateConfig, ctx: ParallelContext | None = None) -> None:
    from hvtrain.generate import pipeline

    pipeline.run(cfg, ctx)
