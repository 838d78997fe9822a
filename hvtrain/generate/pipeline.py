"""From prompts to videos in three stages, one model in memory at a time: text encoders, DiT, VAE.

Text is encoded by rank 0 and sent to the others. Sequence-parallel ranks walk through one sampling together and end
with the same latents; data-parallel groups take different videos, and the first rank of each writes them.
"""

from __future__ import annotations

from pathlib import Path

from hvtrain.config import GenerateConfig
from hvtrain.errors import ConfigError
from hvtrain.generate.plan import make_plan
from hvtrain.generate.sample import encode_prompts, sample_all
from hvtrain.generate.write import write_all
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.validate import check_generate


def run(cfg: GenerateConfig, ctx: ParallelContext | None = None) -> list[Path]:
    """Make the videos of a config; their files, in order. Collective: every rank calls it."""
    check_generate(cfg)
    if cfg.precision == "fp32" and cfg.model.dtype != "float32":
        raise ConfigError(f"precision fp32 needs model.dtype float32, it is {cfg.model.dtype}")
    own = ctx is None
    ctx = ctx or start(cfg.parallel.ulysses, cfg.parallel.ring)
    plan = make_plan(cfg, ctx)
    requests = [job.request for batch in plan.jobs for job in batch]
    texts = [r.prompt for r in requests] + [r.negative_prompt for r in requests if r.cfg_scale != 1]
    unique = list(dict.fromkeys(texts))
    conds = dict(zip(unique, encode_prompts(cfg.model, plan.spec, unique, ctx), strict=True))
    mine = plan.jobs[ctx.dp_rank :: ctx.dp]
    latents = sample_all(cfg, plan, mine, conds, ctx)
    if ctx.sp_rank == 0:
        write_all(cfg, plan, mine, latents, ctx)
    ctx.barrier()
    if own:
        shutdown()
    return [job.output for batch in plan.jobs for job in batch]
