"""What a sampling is asked for."""

from __future__ import annotations

from hvtrain.config import GenerateConfig
from hvtrain.config.rules.values import SAMPLED, check_exists, check_files, check_given, check_sampling
from hvtrain.config.sparse import check_values
from hvtrain.errors import ConfigError


def check_generate(cfg: GenerateConfig) -> None:
    if cfg.model.experts is not None:
        raise ConfigError(
            f"model.experts is '{cfg.model.experts}': it is for training, sampling takes all of them; leave "
            "it out"
        )
    if cfg.slices is not None:
        check_exists(cfg.slices, "slices")
    elif cfg.loraid or cfg.lora_multiplier:
        raise ConfigError(
            "loraid and lora_multiplier choose among the slices of a run: give slices, its directory"
        )
    if len(cfg.lora_multiplier) > 1 and len(cfg.lora_multiplier) != len(cfg.loraid):
        raise ConfigError(
            f"lora_multiplier has {len(cfg.lora_multiplier)} values for {len(cfg.loraid)} slices in loraid; "
            "give one each, or one"
        )
    if (cfg.prompt is None) == (cfg.prompt_file is None):
        raise ConfigError("give either prompt or prompt_file")
    if cfg.prompt_file is not None:
        check_exists(cfg.prompt_file, "prompt_file")
    check_given(cfg.output, "output", "the .mp4 file to write (a directory with prompt_file)")
    check_files(cfg.model, columns=SAMPLED, dit=True, needed_for="generation")
    for lora in cfg.lora:
        check_exists(lora.path, "lora.path")
    if cfg.blocks_to_swap < 0:
        raise ConfigError(f"blocks_to_swap is {cfg.blocks_to_swap}, expected 0 or more")
    if cfg.shard_weights and cfg.blocks_to_swap:
        raise ConfigError(
            "shard_weights and blocks_to_swap both say where the blocks' weights are; choose one"
        )
    if cfg.shard_weights and cfg.parallel.ulysses * cfg.parallel.ring == 1:
        how = "parallel.ulysses or parallel.ring, with hvtrain launch --nproc N"
        raise ConfigError(
            f"shard_weights: cuts them over the ranks that share a video; have them share one ({how})"
        )
    if cfg.batch_size <= 0:
        raise ConfigError(f"batch_size is {cfg.batch_size}, expected more than 0")
    check_values(cfg.sparse, ring=cfg.parallel.ring)
    check_sampling(cfg)
