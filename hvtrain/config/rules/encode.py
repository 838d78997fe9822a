"""What an encoding is asked for."""

from __future__ import annotations

from hvtrain.config import EncodeConfig
from hvtrain.config.parts import MASK, parts_of
from hvtrain.config.rules.values import check_exists, check_files, check_given
from hvtrain.errors import ConfigError


def check_encode(cfg: EncodeConfig) -> None:
    check_given(cfg.dataset, "dataset", "a dataset file (TOML or YAML)")
    check_exists(cfg.dataset, "dataset")
    check_given(cfg.output, "output", "a directory for the shard set")
    legal = list(
        dict.fromkeys([*(c for part in parts_of(cfg.model.name).values() for c in part.makes), MASK])
    )
    if not cfg.columns or len(set(cfg.columns)) < len(cfg.columns):
        raise ConfigError(f"columns is {list(cfg.columns)}, expected some of {', '.join(legal)}, each once")
    for column in cfg.columns:
        if column not in legal:
            raise ConfigError(f"columns: no column '{column}'; choose from {', '.join(legal)}")
    check_files(cfg.model, columns=cfg.columns, needed_for="encoding")
    for key, value in {"batch_size": cfg.batch_size, "samples_per_tar": cfg.samples_per_tar}.items():
        if value < 1:
            raise ConfigError(f"{key} is {value}, expected 1 or more")
