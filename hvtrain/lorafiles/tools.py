"""`hvtrain lora`: look at LoRA files of any dialect, convert, extract, resize."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hvtrain.config import asset
from hvtrain.errors import CheckpointError, ConfigError, suggest
from hvtrain.lorafiles.convert import converted, dora_for_comfyui
from hvtrain.lorafiles.dialects import DIALECTS, spelling
from hvtrain.lorafiles.experts import names_of, number_of
from hvtrain.lorafiles.files import FOLDED_KEY, PARTS_KEY, LoraFile, read_lora, split_ending
from hvtrain.lorafiles.lowrank import Approximation, factor, rank_for, shrink, singular_values
from hvtrain.lorafiles.metadata import EXPERT_KEY, LORA_FLAVOR_KEY, lora_metadata, of_flavor
from hvtrain.lorafiles.runs import CONFIG, lora_in
from hvtrain.lorafiles.write import check_output, kept, write_lora
from hvtrain.models import all_specs
from hvtrain.models.load import identify, whole_model
from hvtrain.models.spec import ModelSpec
from hvtrain.models.targets import layers_of, lora_targets
from hvtrain.weights.containers import open_weights


@dataclass(frozen=True)
class Recognised:
    """A LoRA file and the architecture whose layers it adapts."""

    lora: LoraFile
    spec: ModelSpec
    sizes: str  # whose layer sizes fit: a flavor, or the model file
    # [out, in] of its Linear layers
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)


def open_any(
    path: str | Path, *, dit: str | None = None, edited: bool = False, expert: str | None = None,
    decomposed: bool = False
) -> Recognised:
    """Read a LoRA without its model: by the flavors' layer sizes, or by those of a model file; `edited` and
    `decomposed` as in `read_lora`. The directory of a finished run stands for its result; `expert` names
    whose LoRA is meant in a file of several.

    Raises CheckpointError with the reason of the nearest architecture.
    """
    path = lora_of(path, expert)
    candidates = [(spec, f.arch, f.name) for spec in all_specs() for f in spec.flavors.values()]
    if dit is not None:
        found = identify(asset(dit))
        candidates = [(found.spec, found.arch, str(dit))]
    if expert is not None:
        known = {name for spec, _, _ in candidates for name in names_of(spec)}
        candidates = [c for c in candidates if expert in names_of(c[0])]
        if not candidates:
            raise ConfigError(f"--expert {expert}: no model has such an expert; {suggest(expert, known)}")
    tried: list[tuple[str, Mapping]] = []
    refusal: CheckpointError | None = None
    for spec, arch, sizes in candidates:
        shapes = layers_of(spec.build, arch)
        if (spec.name, shapes) in tried:  # several flavors have the same layers
            continue
        tried.append((spec.name, shapes))
        try:
            number = number_of(spec, expert, key="--expert")
            lora = read_lora(path, shapes, spec=spec, edited=edited, expert=number, decomposed=decomposed)
            return Recognised(lora, spec, sizes, shapes)
        except CheckpointError as error:
            refusal = refusal or error
    raise refusal or CheckpointError(f"{path}: no architecture is known")


def lora_of(path: str | Path, expert: str | None = None) -> Path:
    """The file itself, or the result of a finished run's directory."""
    return lora_in(path, expert) if Path(path, CONFIG).is_file() else Path(path)


# --- info ---------------------------------------------------------------------------------------------------


def dialect_of(path: str | Path) -> str:
    """Whose spelling the file uses."""
    stems = dict(split_ending(name) for name in open_weights(path))
    return spelling(stems, alphas=any(split_ending(name)[1] == "alpha" for name in open_weights(path)))


def info(path: str | Path, *, dit: str | None = None, expert: str | None = None) -> Iterator[str]:
    """What a file is: dialect, layers, rank, alpha, blocks, LORAID, norms."""
    known = open_any(path, dit=dit, expert=expert, decomposed=True)
    lora, meta = known.lora, known.lora.metadata
    path = lora.path
    kind = " and ".join(sorted({delta.kind.LABEL for delta in map(lora.delta, lora.pairs)}))
    yield f"{path}: {kind} for {known.spec.name} (sizes of {known.sizes}), dialect {dialect_of(path)}"
    ranks = Counter(pair.rank for pair in lora.pairs.values())
    alphas = Counter(round(pair.alpha, 6) for pair in lora.pairs.values())
    yield f"{len(lora.pairs)} layers, rank {_counted(ranks)}, alpha {_counted(alphas)}"
    yield f"{sum(p.up.numel() + p.down.numel() for p in lora.pairs.values()):,} parameters"
    yield f"blocks: {blocks(lora.pairs)}"
    if meta.get("ss_loraid"):
        yield f"LORAID {meta['ss_loraid']}" + (
            f", plan {meta['hvtrain.plan'][:12]}" if "hvtrain.plan" in meta else ""
        )
    if EXPERT_KEY in meta:
        yield f"of the expert {meta[EXPERT_KEY]}"
    if "hvtrain.base" in meta:
        yield f"trained from {meta['hvtrain.base']}"
    norms = {
        name: torch.linalg.vector_norm(singular_values(pair)).item() for name, pair in lora.pairs.items()
    }
    largest = sorted(norms, key=lambda n: -norms[n])[:3]
    total = sum(n * n for n in norms.values()) ** 0.5
    of = "deltas, before the lengths of their rows," if kind == "DoRA" else "deltas"
    yield f"norm of all {of} {total:.4g}; largest: " + ", ".join(f"{n} {norms[n]:.3g}" for n in largest)
    for key in (
        "ss_output_name", "ss_steps", "ss_epoch", "ss_learning_rate", "ss_training_comment", "modelspec.date"
    ):
        if meta.get(key):
            yield f"{key}: {meta[key]}"


def blocks(layers: Sequence[str] | Mapping[str, object]) -> str:
    """LIST 0-19, OTHER 0-39: which blocks the layers are in."""
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


# --- convert, resize, extract -------------------------------------------------------------------------------


def convert(
    path: str, output: str, *, target: str, fold: bool | None = None, dit: str | None = None,
    edited: bool = False, expert: str | None = None,
) -> str:
    """To another dialect; `fold` None: as that likes it."""
    dialect = DIALECTS.find(target, key="--to")
    if dialect.alpha == "rank" and fold is False:
        raise ConfigError(f"--keep-alpha: {target} has no alpha in its files; leave the option out")
    check_output(output, lora_of(path, expert))
    known = open_any(path, dit=dit, edited=edited, expert=expert, decomposed=target == "comfyui")
    said, experts = known.lora.metadata.get(EXPERT_KEY), names_of(known.spec)
    if expert is not None and said not in (None, expert):
        raise ConfigError(f"--expert {expert}: {path} was trained as '{said}'; leave the option out")
    expert = expert or said
    number = experts.index(expert) if expert in experts else 0
    lora = replace(known.lora, metadata={**known.lora.metadata, **({EXPERT_KEY: expert} if expert else {})})
    if any(pair.magnitude is not None for pair in lora.pairs.values()):
        if dit is None:
            raise ConfigError(
                "--to comfyui of a DoRA: ComfyUI brings other rows to its lengths, those of the model alone; "
                "give the model, --dit FILE, and the file's lengths will be such that its videos are right"
            )
        found = identify(asset(dit))
        own = dora_for_comfyui(
            lora, lambda name: found.read(f"{name}.weight", dtype=torch.float32), expert=number
        )
    else:
        own = converted(lora, known.spec, dialect, fold=fold, expert=number)
    own.save(output)
    return f"{output}: {len(known.lora.pairs)} layers in the dialect of {target}"


def resize(
    path: str, output: str, *, rank: int | None, energy: float | None, dit: str | None = None,
    expert: str | None = None
) -> Iterator[str]:
    """Cut to a rank, or to the smallest rank per layer that keeps a share of the squared norm."""
    if (rank is None) == (energy is None):
        raise ConfigError("give either --rank or --energy")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy}: expected a share, more than 0 and at most 1")
    check_output(output, lora_of(path, expert))
    lora = open_any(path, dit=dit, expert=expert).lora
    cuts = {
        name: shrink(
            [(pair, 1.0)], rank=rank if rank is not None else rank_for(singular_values(pair), energy or 1.0)
        )
        for name, pair in lora.pairs.items()
    }
    ranks = Counter(cut.pair.rank for cut in cuts.values())
    largest = max(ranks)
    metadata = kept(lora.about_pairs, PARTS_KEY, FOLDED_KEY)
    metadata |= {"ss_network_dim": str(largest), "ss_network_alpha": str(float(largest))}
    write_lora(output, {name: cut.pair for name, cut in cuts.items()}, metadata=metadata)
    yield f"{output}: rank {_counted(ranks)}, alpha = rank"
    yield f"lost: {_lost(cuts):.3g} % of the norm of all deltas"


def _lost(cuts: Mapping[str, Approximation]) -> float:
    """Per cent of the norm of all of them together."""
    whole = sum(cut.norm**2 for cut in cuts.values())
    return 100 * (sum((cut.error * cut.norm) ** 2 for cut in cuts.values()) / whole if whole else 0.0) ** 0.5


def extract(tuned: str, base: str, output: str, *, rank: int) -> Iterator[str]:
    """The difference of two models as a LoRA, layer by layer."""
    if rank < 1:
        raise ConfigError(f"--rank {rank}: expected 1 or more")
    check_output(output, tuned, base)
    new, old = identify(asset(tuned)), identify(asset(base))
    if new.spec.name != old.spec.name or new.arch != old.arch:
        raise CheckpointError(
            f"{tuned} is {new.spec.name} {new.arch}, {base} is {old.spec.name} {old.arch}: not one model"
        )
    model = whole_model(new)
    whole_model(old)
    targets = set(lora_targets(new.spec, model, include=[".*"]))
    cuts, other = {}, []
    for name in model.state_dict():
        delta = new.read(name, dtype=torch.float32) - old.read(name, dtype=torch.float32)
        module = name.removesuffix(".weight")
        if not delta.any():
            continue
        if module not in targets or not name.endswith(".weight"):
            other.append(name)
            continue
        cuts[module] = factor(delta, rank=rank)
    if not cuts:
        raise CheckpointError(f"{tuned} and {base} have equal weights in all layers that a LoRA can adapt")
    about: dict[str, object] = {
        **of_flavor(new.flavor), LORA_FLAVOR_KEY: None,  # told from a file, which may not know it
        "ss_training_comment": f"extracted: {Path(tuned).name} - {Path(base).name}"
    }
    full = lora_metadata(Path(output), about, architecture=new.spec.name, rank=rank, alpha=rank)
    write_lora(output, {name: cut.pair for name, cut in cuts.items()}, metadata=full)
    yield f"{output}: {len(cuts)} layers, rank {rank}"
    yield f"lost: {_lost(cuts):.3g} % of the norm of all differences"
    if other:
        yield (
            f"{len(other)} changed tensors are not layers that a LoRA adapts and are left out, first "
            f"'{other[0]}'"
        )
