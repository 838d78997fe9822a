"""`hvtrain init`: what is asked for, and of all else the fastest that fits, as a commented config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hvtrain.config import TrainConfig, asset, build
from hvtrain.config.load import override
from hvtrain.config.origins import COMMAND_LINE, effective
from hvtrain.config.write import commented, nested
from hvtrain.errors import ConfigError
from hvtrain.fit.estimate import candidate, shape_of
from hvtrain.fit.run import Asked, memory_bytes, sections
from hvtrain.fit.search import USABLE, nearest
from hvtrain.models.spec import Flavor
from shards import open_set
from shards.errors import ShardError

_WHY = {
    "run.recompute": "the first of none, selective, full, offload that fits: each is slower than the one "
    "before",
    "run.blocks_to_swap": "so many blocks wait in host memory",
    "parallel.ulysses": "GPUs that share the heads of one sample",
    "parallel.ring": "GPUs that share its tokens",
    "zero.stage": "3 shares the weights too; 2 is faster where it fits",
    "zero.offload_optimizer": "the optimizer's state in host memory",
    "zero.offload_param": "each GPU's part of the weights in host memory",
    "model.quantize": "the frozen weights in float8",
}
# also where they are the defaults
_SHOWN = ("parallel.ulysses", "parallel.ring", "zero.stage", "run.recompute")
_FULL = {"adapter.type": "none", "optim.lr": 1e-5}
_LORA = {"adapter.type": "lora", "adapter.rank": 32, "adapter.alpha": 32.0, "optim.lr": 1e-4}


def begin(
    items: Sequence[str], *, model: str, flavor: str | None, dit: str | None, data: str | None, whole: bool,
    gpus: int, memory_gib: float | None, size: Mapping[str, int] | None,
) -> tuple[str, str]:
    """The YAML, and one line of what it needs. `items`: key=value, which stay as they are. Raises ConfigError
    where nothing fits, and for a file that is not there."""
    if plain := [item for item in items if "=" not in item]:
        raise ConfigError(f"'{plain[0]}': expected key=value, as in adapter.rank=16")
    if dit is not None and not Path(asset(dit)).exists():
        raise ConfigError(f"--dit {dit} does not exist; without it the config is made for --flavor")
    asked = {"model.name": model, "model.flavor": flavor, "model.dit": dit, **(_FULL if whole else _LORA)}
    given = effective(TrainConfig, None, [*(override(k, v) for k, v in asked.items()), *items])
    cfg, own = (
        given.config, [key for key in given.values if any(item.partition("=")[0] == key for item in items)]
    )
    about = candidate(cfg.model)
    largest = size or _largest([data] if data else cfg.data.shards, about.flavor) or {}
    shape, memory = (
        shape_of(about.flavor, batch=cfg.data.batch_size, **largest),
        memory_bytes(Asked(memory_gib=memory_gib))
    )
    wanted = sections(cfg)
    if "run.recompute" not in own:
        wanted = replace(wanted, run=replace(cfg.run, recompute="none"))
    found = nearest(wanted, about, shape, gpus, memory)
    what = f"{about.spec.name} {about.flavor.name} at {shape.width} x {shape.height} x {shape.frames} frames"
    if found is None:
        raise ConfigError(
            f"nothing makes {what} fit into {gpus} GPU(s) of {memory / 2**30:.3g} GiB: give more or larger "
            "GPUs (--gpus, --memory), or smaller clips (--size)"
        )
    changes = {
        key: yaml.safe_load(text) for key, _, text in (change.partition("=") for change in found.changes)
    }
    needs = (
        f"{found.estimate.budget.total / 2**30:.1f} GiB of {USABLE * memory / 2**30:.1f} usable on each of "
        f"{gpus} GPU(s)"
    )
    values = {
        "model.name": model, "model.flavor": about.flavor.name, "model.dit": dit,
        "data.shards": [data] if data else [], "data.batch_size": cfg.data.batch_size,
        **{k: v for k, v in asked.items() if not k.startswith("model.")},
        **{key: given.values[key] for key in _SHOWN}, "run.recompute": wanted.run.recompute,
        "run.output_dir": f"runs/{Path(data or model).name}", "run.steps": 2000, "run.precision": "bf16",
        **{key: given.values[key] for key in own}, **changes,
    }  # fmt: skip
    notes = _notes(values, own, asked)
    build(TrainConfig, nested(values), where="init")
    start = f"hvtrain {f'launch --nproc {gpus} ' if gpus > 1 else ''}train THIS_FILE"
    head = [f"{start}; `hvtrain config train` explains every key", f"{what}: {needs}"]
    return commented(values, notes, TrainConfig, head=head), f"{what} needs {needs}"


def _notes(values: Mapping[str, Any], own: Sequence[str], asked: Mapping[str, Any]) -> dict[str, str]:
    notes = {
        "model.dit": "the DiT's file" if values["model.dit"] else "give the DiT's file: training needs it",
        "data.shards": "what `hvtrain encode` wrote"
        if values["data.shards"] else "give what `hvtrain encode` wrote",
        "model.flavor": "`hvtrain models` lists them",
        "adapter.type": "none: all weights"
        if values["adapter.type"] == "none" else "none would train all weights",
        "adapter.rank": "8 to 128", "adapter.alpha": "the LoRA counts alpha / rank", "optim.lr": "the peak",
        "run.output_dir": "a directory for this run; the same command again continues it",
        "run.steps": "or epochs", **{key: why for key, why in _WHY.items() if key in values},
    }  # fmt: skip
    return {**notes, **dict.fromkeys(own, COMMAND_LINE)}


def _largest(shards: Sequence[str], flavor: Flavor) -> dict[str, int] | None:
    """Width, height and frames of the samples with the most tokens; None where there is no shard set yet."""
    sizes = []
    for path in shards:
        try:
            buckets = open_set(path).groups()
        except (ShardError, OSError):
            continue
        sizes += [
            dict(zip(("frames", "height", "width"), map(int, bucket.split("x")), strict=True))
            for bucket in buckets
        ]
    return max(sizes, key=lambda one: flavor.latent.n_tokens(flavor.latent.shape(**one)), default=None)
