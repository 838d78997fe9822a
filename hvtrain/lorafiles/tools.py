"""`hvtrain lora`: look at LoRA files of any dialect, convert, extract, resize."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hvtrain.adapters.lora import linear_shapes
from hvtrain.config import asset
from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.lorafiles.convert import Converted, to_comfy, to_diffusers, to_diffusion_pipe, to_musubi
from hvtrain.lorafiles.files import (
    FOLDED_KEY,
    PARTS_KEY,
    STALE,
    LoraFile,
    check_output,
    read_lora,
    split_ending,
    write_lora,
)
from hvtrain.lorafiles.lowrank import factor, rank_for, shrink, singular_values
from hvtrain.lorafiles.metadata import lora_metadata
from hvtrain.lorafiles.runs import CONFIG, lora_in
from hvtrain.models import all_specs
from hvtrain.models.load import identify, read_tensor, whole_model
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.models.targets import lora_targets
from hvtrain.weights.containers import open_weights

DIALECTS: dict[str, Callable[[LoraFile, ModelSpec, bool], Converted]] = {
    "musubi": lambda lora, spec, fold: to_musubi(lora, fold=fold),
    "comfyui": lambda lora, spec, fold: to_comfy(lora, fold=fold),
    "diffusers": lambda lora, spec, fold: to_diffusers(lora, spec, fold=fold),
    "diffusion-pipe": lambda lora, spec, fold: to_diffusion_pipe(lora),
}


@dataclass(frozen=True)
class Known:
    """A LoRA file and the architecture whose layers it adapts."""

    lora: LoraFile
    spec: ModelSpec
    sizes: str  # whose layer sizes fit: a flavor, or the model file
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)  # [out, in] of its Linear layers


def open_any(path: str | Path, *, dit: str | None = None, edited: bool = False) -> Known:
    """Read a LoRA without its model: by the flavors' layer sizes, or by those of a model file; `edited` as in `read_lora`.
    The directory of a finished run stands for its result.

    Raises CheckpointError with the reason of the nearest architecture.
    """
    path = lora_of(path)
    if dit is not None:
        found = identify(asset(dit))
        shapes = _shapes(found.spec, found.arch)
        return Known(read_lora(path, shapes, spec=found.spec, edited=edited), found.spec, str(dit), shapes)
    refusal: CheckpointError | None = None
    for spec in all_specs():
        sizes: dict[str, Flavor] = {}
        for flavor in spec.flavors.values():  # several flavors have the same layers
            sizes.setdefault(repr(_shapes(spec, flavor.arch)), flavor)
        for flavor in sizes.values():
            shapes = _shapes(spec, flavor.arch)
            try:
                return Known(read_lora(path, shapes, spec=spec, edited=edited), spec, flavor.name, shapes)
            except CheckpointError as error:
                refusal = refusal or error
    raise refusal or CheckpointError(f"{path}: no architecture is known")


def lora_of(path: str | Path) -> Path:
    """The file itself, or the result of a finished run's directory."""
    return lora_in(path) if Path(path, CONFIG).is_file() else Path(path)


def _shapes(spec: ModelSpec, arch: object) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        return linear_shapes(spec.build(arch))


# --- info -----------------------------------------------------------------------------------------------------------


def dialect_of(path: str | Path) -> str:
    """Whose spelling the file uses."""
    stems = [split_ending(name)[0] for name in open_weights(path)]
    first = stems[0] if stems else ""
    if first.startswith("lora_unet_"):
        return "musubi (sd-scripts)"
    if first.startswith("diffusion_model."):
        alphas = any(split_ending(name)[1] == "alpha" for name in open_weights(path))
        return "comfyui" if alphas else "diffusion-pipe or comfyui"
    if first.startswith("base_model.model."):
        return "PEFT"
    return "diffusers" if first.startswith("transformer.") else "official names"


def info(path: str | Path, *, dit: str | None = None) -> Iterator[str]:
    """What a file is: dialect, layers, rank, alpha, blocks, LORAID, norms."""
    known = open_any(path, dit=dit)
    lora, meta = known.lora, known.lora.metadata
    path = lora.path
    yield f"{path}: LoRA for {known.spec.name} (sizes of {known.sizes}), dialect {dialect_of(path)}"
    ranks = Counter(pair.rank for pair in lora.pairs.values())
    alphas = Counter(round(pair.alpha, 6) for pair in lora.pairs.values())
    yield f"{len(lora.pairs)} layers, rank {_counted(ranks)}, alpha {_counted(alphas)}"
    yield f"{sum(p.up.numel() + p.down.numel() for p in lora.pairs.values()):,} parameters"
    yield f"blocks: {blocks(lora.pairs)}"
    if meta.get("ss_loraid"):
        yield f"LORAID {meta['ss_loraid']}" + (f", plan {meta['hvtrain.plan'][:12]}" if "hvtrain.plan" in meta else "")
    if "hvtrain.base" in meta:
        yield f"trained from {meta['hvtrain.base']}"
    norms = {name: torch.linalg.vector_norm(singular_values(pair)).item() for name, pair in lora.pairs.items()}
    largest = sorted(norms, key=lambda n: -norms[n])[:3]
    total = sum(n * n for n in norms.values()) ** 0.5
    yield f"norm of all deltas {total:.4g}; largest: " + ", ".join(f"{n} {norms[n]:.3g}" for n in largest)
    for key in ("ss_output_name", "ss_steps", "ss_epoch", "ss_learning_rate", "ss_training_comment", "modelspec.date"):
        if meta.get(key):
            yield f"{key}: {meta[key]}"


def blocks(layers: Sequence[str] | Mapping[str, object]) -> str:
    """double_blocks 0-19, single_blocks 0-39: which blocks the layers are in."""
    found: dict[str, set[int]] = {}
    others: set[str] = set()
    for name in layers:
        match = re.match(r"(.*?blocks)\.(\d+)\.", name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
        else:
            others.add(name)
    spans = [f"{kind} {_spans(sorted(numbers))}" for kind, numbers in found.items()]
    return ", ".join([*spans, *sorted(others)]) or "none"


def _spans(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _counted(values: Counter) -> str:
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({n} layers)" for value, n in sorted(values.items()))


# --- convert, resize, extract ---------------------------------------------------------------------------------------


def convert(path: str, output: str, *, target: str, fold: bool, dit: str | None = None, edited: bool = False) -> str:
    if target not in DIALECTS:
        raise ConfigError(f"--to: no dialect '{target}'; {suggest(target, DIALECTS)}")
    check_output(output, lora_of(path))
    known = open_any(path, dit=dit, edited=edited)
    DIALECTS[target](known.lora, known.spec, fold).save(output)
    return f"{output}: {len(known.lora.pairs)} layers in the dialect of {target}"


def resize(path: str, output: str, *, rank: int | None, energy: float | None, dit: str | None = None) -> Iterator[str]:
    """Cut to a rank, or to the smallest rank per layer that keeps a share of the squared norm."""
    if (rank is None) == (energy is None):
        raise ConfigError("give either --rank or --energy")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy}: expected a share, more than 0 and at most 1")
    check_output(output, lora_of(path))
    known = open_any(path, dit=dit)
    pairs, lost, whole = {}, 0.0, 0.0
    for name, pair in known.lora.pairs.items():
        wanted = rank if rank is not None else rank_for(singular_values(pair), float(energy or 1.0))
        cut = shrink([(pair, 1.0)], rank=wanted)
        pairs[name], lost, whole = cut.pair, lost + (cut.error * cut.norm) ** 2, whole + cut.norm**2
    ranks = Counter(pair.rank for pair in pairs.values())
    largest = max(ranks)
    stale = (*STALE, PARTS_KEY, FOLDED_KEY)
    metadata = {k: v for k, v in known.lora.metadata.items() if not k.startswith(stale)}
    metadata |= {"ss_network_dim": str(largest), "ss_network_alpha": str(float(largest))}
    write_lora(output, pairs, metadata=metadata)
    yield f"{output}: rank {_counted(ranks)}, alpha = rank"
    yield f"lost: {100 * (lost / whole if whole else 0.0) ** 0.5:.3g} % of the norm of all deltas"


def extract(tuned: str, base: str, output: str, *, rank: int) -> Iterator[str]:
    """The difference of two models as a LoRA, layer by layer."""
    if rank < 1:
        raise ConfigError(f"--rank {rank}: expected 1 or more")
    check_output(output, tuned, base)
    new, old = identify(asset(tuned)), identify(asset(base))
    if new.spec.name != old.spec.name or new.arch != old.arch:
        raise CheckpointError(f"{tuned} is {new.spec.name} {new.arch}, {base} is {old.spec.name} {old.arch}: not one model")
    model = whole_model(new)
    whole_model(old)
    targets = set(lora_targets(new.spec, model, include=[".*"]))
    pairs, lost, whole, other = {}, 0.0, 0.0, []
    for name in model.state_dict():
        delta = read_tensor(new, name, dtype=torch.float32) - read_tensor(old, name, dtype=torch.float32)
        module = name.removesuffix(".weight")
        if not delta.any():
            continue
        if module not in targets or not name.endswith(".weight"):
            other.append(name)
            continue
        cut = factor(delta, rank=rank)
        pairs[module], lost, whole = cut.pair, lost + (cut.error * cut.norm) ** 2, whole + cut.norm**2
    if not pairs:
        raise CheckpointError(f"{tuned} and {base} have equal weights in all layers that a LoRA can adapt")
    full = lora_metadata(
        Path(output), {"ss_training_comment": f"extracted: {Path(tuned).name} - {Path(base).name}"},
        architecture=new.spec.name, rank=rank, alpha=rank,
    )
    write_lora(output, pairs, metadata=full)
    yield f"{output}: {len(pairs)} layers, rank {rank}"
    yield f"lost: {100 * (lost / whole) ** 0.5:.3g} % of the norm of all differences"
    if other:
        yield f"{len(other)} changed tensors are not layers that a LoRA adapts and are left out, first '{other[0]}'"
