"""LoRA files: written under the sd-scripts / musubi-tuner names, read under anyone's.

A file names each adapted Linear in one of many spellings: `lora_unet_` + the official name with underscores,
`diffusion_model.` or `transformer.` + the official name, ComfyUI's or diffusers' own names
for the same layer. All of them end in a name that a model's key maps know, so a reader only
looks for the longest such ending.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from hvtrain.adapters.dora import DoraLinear
from hvtrain.adapters.layer import Delta
from hvtrain.adapters.lora import LoraLinear
from hvtrain.adapters.table import ADAPTERS, kinds_of
from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.dialects import DIALECTS, Dialect, Shapes, gather, known_names, same_layer
from hvtrain.lorafiles.metadata import (
    SD_SUM_KEY,
    SUM_KEY,
    PeftAlpha,
    json_entry,
    other_architecture,
)
from hvtrain.lorafiles.pairs import LoraPair, unfold_alpha
from hvtrain.lorafiles.whole import relatives, split, warn
from hvtrain.models.foreign import lora_looks_like
from hvtrain.models.spec import ModelSpec
from hvtrain.weights.containers import Weights, open_weights
from hvtrain.weights.stream import data_sum

PARTS_KEY = "hvtrain.parts"  # metadata: ranks of the blocks that a joined pair was stacked from, by layer
# metadata: the alphas that were multiplied into `up`, by the file's layer names
FOLDED_KEY = "hvtrain.folded_alpha"
RESCALED_KEY = "hvtrain.dora"  # metadata: whose division by lengths of rows a DoRA was rewritten for
# beginnings of metadata keys that describe a file's bytes: never copied to another file
STALE = ("sshs_", SUM_KEY)
_ENDINGS = {".alpha": "alpha"} | {
    ending: part
    for kind in ADAPTERS.values()
    for ending, part in ({f".{name}": part for part, name in kind.PARTS.items()} | dict(kind.ENDINGS)).items()
}
_OTHER_KINDS = {"hada_t": "convolution LoHa", "lokr_t": "convolution LoKr", "lora_mid": "convolution LoRA",
                "diff": "full-difference"}  # fmt: skip


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in memory: one pair for each adapted layer, by the layer's official name. Another kind of
    adapter is an exact pair too; what the file itself holds of such a layer is in `others`."""

    path: Path
    pairs: dict[str, LoraPair]
    metadata: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, Delta] = field(default_factory=dict)
    # what is added to whole parameters, by official name
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def delta(self, name: str) -> Delta:
        """A layer's adapter as the file holds it."""
        pair = self.pairs[name]
        return self.others.get(name) or Delta(LoraLinear, {"down": pair.down, "up": pair.up}, pair.alpha)

    @property
    def about_pairs(self) -> dict[str, str]:
        """Its metadata for a file of the pairs, which is a LoRA's."""
        if not self.others:
            return self.metadata
        largest = max(self.pairs.values(), key=lambda pair: pair.rank)
        numbers = {"ss_network_dim": str(largest.rank), "ss_network_alpha": str(float(largest.alpha))}
        return {**self.metadata, "ss_network_module": "networks.lora", "ss_network_args": "{}", **numbers}

    def summary(self) -> str:
        deltas = [self.delta(name) for name in self.pairs]
        ranks = sorted({delta.rank for delta in deltas})
        scales = sorted({round(delta.scale, 6) for delta in deltas})
        kinds = "".join(
            f"{label}, " for label in sorted({delta.kind.LABEL for delta in self.others.values()})
        )
        whole = f", {len(self.whole)} whole tensors" if self.whole else ""
        return (
            f"{self.path.name}: {kinds}{len(self.pairs)} layers, rank {_span(ranks)}, alpha/rank "
            f"{_span(scales)}{whole}"
        )


def _span(values: list) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def check_sum(weights: Weights) -> None:
    """Raise CheckpointError if a file's bytes are not those that it was written
    with; see `edited` of `read_lora`.

    Other programs' checksums only make a warning: many tools rewrite a file and keep its metadata.
    """
    said = frozenset(weights.metadata[key] for key in (SUM_KEY, SD_SUM_KEY) if weights.metadata.get(key))
    if said and len(weights.files) == 1 and weights.files[0].suffix in (".safetensors", ".sft"):
        _compare(weights.files[0], weights.files[0].stat().st_mtime_ns, said, SUM_KEY in weights.metadata)


@lru_cache(maxsize=64)  # sizes of several models may be tried on a file
def _compare(path: Path, changed_ns: int, said: frozenset[str], ours: bool) -> None:
    if data_sum(path) in said:
        return
    if ours:
        raise CheckpointError(
            f"{path}: damaged: its tensors are not those that its checksum ({SUM_KEY}) was taken of; copy it "
            "again, or make it again from the run's checkpoint. If another program changed it and you trust "
            f"that, `hvtrain lora convert {path} --edited --to musubi --output NEW` gives it a new checksum"
        )
    print(
        f"warning: {path}: its tensors do not fit its {SD_SUM_KEY}: damaged, or rewritten by another program",
        file=sys.stderr, flush=True
    )  # fmt: skip


def read_lora(
    path: str | Path, shapes: Shapes, *, spec: ModelSpec | None = None, edited: bool = False,
    expert: int | None = None, decomposed: bool = False, foreign: bool = False,
) -> LoraFile:
    """A LoRA file for a model whose Linear layers have these official names and [out, in] shapes.

    With `spec`, names of the model's other dialects are understood too, and a refusal says what the file
    looks like. `edited`: do not compare its checksum. `expert`: which LoRA is meant of a file that holds one
    for each expert. `decomposed`: the caller has the weights that what a DoRA adds depends on; otherwise one
    is refused. `foreign`: also take differences of whole tensors, as distilled ones hold, and leave out
    layers that only other flavors have.
    """
    path = Path(path)
    weights, names = open_weights(path), known_names(spec, shapes)
    tensors = {name: weights.get(name) for name in weights}
    tensors, whole = split(tensors) if foreign else (tensors, {})
    if whose := weights.metadata.get(RESCALED_KEY):
        raise CheckpointError(f"{path}: a DoRA rewritten for {whose}; give the file that it was made of")
    stems = _of_expert(path, _group(path, tensors), expert)
    if foreign and spec is not None:
        stems = _without_relatives(path, stems, names, spec)
    found = _resolve(path, stems, names, weights.metadata, spec)
    if not edited:
        check_sum(weights)
    folded = _folded_alphas(path, weights.metadata)
    peft = PeftAlpha.parse(path, weights.metadata, DIALECTS["diffusers"].prefix(expert or 0))
    deltas = {name: _delta(path, stem, stems[stem], peft) for name, stem in found.items()}
    if not decomposed and any(delta.kind is DoraLinear for delta in deltas.values()):
        raise CheckpointError(
            f"{path}: is a DoRA: what it adds to a weight depends on the weight, so it cannot be cut, joined "
            "or converted by itself; `hvtrain merge --dit MODEL` merges it, `hvtrain generate` and "
            "adapter.init_from take it"
        )
    given = {name: _pair(path, found[name], delta) for name, delta in deltas.items()}
    given = {
        name: unfold_alpha(pair, folded[name]) if name in folded else pair for name, pair in given.items()
    }
    pairs = gather(path, given, spec, shapes)
    parts = json_entry(path, weights.metadata, PARTS_KEY)
    for name, pair in pairs.items():
        pair.check_shape(path, name, shapes[name])
        told = parts.get(name)
        # the tensors decide
        if isinstance(told, list) and all(isinstance(rank, int) and rank >= 0 for rank in told):
            pairs[name] = replace(pair, parts=tuple(told))  # of other kinds none are told
    held = {name: same_layer(name, shapes[name][0], deltas, spec) for name in pairs}
    others = {name: deltas[own] for name, own in held.items() if own and deltas[own].kind is not LoraLinear}
    return LoraFile(path, pairs, dict(weights.metadata), others, whole)


def _folded_alphas(path: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    folded = json_entry(path, metadata, FOLDED_KEY)
    for name, alpha in folded.items():
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
            raise CheckpointError(
                f"{path}: damaged: its metadata '{FOLDED_KEY}' gives '{name}' the alpha {alpha!r}"
            )
    return folded


def split_ending(key: str) -> tuple[str, str]:
    """The layer's part of a tensor name, and which part of its adapter the tensor is: "down",
    "up", "alpha", ... ("" if none)."""
    for ending, kind in _ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), kind
    return key, ""


def _group(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    stems: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        stem, kind = split_ending(key)
        if not kind:
            other = next((label for sign, label in _OTHER_KINDS.items() if f".{sign}" in key), None)
            what = f"holds {other} weights, which are not supported" if other else "is not a LoRA tensor"
            raise CheckpointError(
                f"{path}: '{key}' {what}: give a LoRA file (lora_down/lora_up or lora_A/lora_B), or one of a "
                f"{' or '.join(kind.LABEL for kind in ADAPTERS.values() if kind is not LoraLinear)}"
            )
        stems.setdefault(stem, {})[kind] = tensor
    if not stems:
        raise CheckpointError(f"{path}: holds no LoRA tensors")
    return stems


def _of_expert(
    path: Path, stems: dict[str, dict[str, torch.Tensor]], expert: int | None
) -> dict[str, dict[str, torch.Tensor]]:
    """Those of one expert, where the file holds the LoRAs of several."""
    for dialect in DIALECTS.values():
        held = _prefixes(dialect, stems)
        if len(held) < 2:
            continue
        if expert is None or dialect.prefixes[expert : expert + 1] not in [(prefix,) for prefix in held]:
            raise CheckpointError(
                f"{path}: holds LoRAs of {len(held)} experts ({', '.join(held)}); say which one is meant"
            )
        return {stem: tensors for stem, tensors in stems.items() if stem.startswith(dialect.prefixes[expert])}
    return stems


def _prefixes(dialect: Dialect, stems: Iterable[str]) -> list[str]:
    """Of those that tell experts apart, which occur."""
    stems = list(stems)
    return [prefix for prefix in dialect.prefixes if any(stem.startswith(prefix) for stem in stems)]


def prefix_number(path: Path) -> int | None:
    """Whose LoRA the file is by its tensors' prefix, where that is an expert's own: its
    number; -1 for those of several."""
    stems = {split_ending(name)[0] for name in open_weights(path)}
    for dialect in DIALECTS.values():
        held = _prefixes(dialect, stems)
        if len(held) > 1:
            return -1
        if held and held[0] != dialect.prefixes[0]:
            return dialect.prefixes.index(held[0])
    return None


def _start(stem: str, names: Mapping[str, str]) -> int | None:
    """Where in it a layer's name begins."""
    starts = [0, *(i + 1 for i, letter in enumerate(stem) if letter in "._")]
    return next((i for i in starts if stem[i:] in names), None)


def _without_relatives(
    path: Path, stems: dict[str, dict[str, torch.Tensor]], names: Mapping[str, str], spec: ModelSpec
) -> dict[str, dict[str, torch.Tensor]]:
    strange = [stem for stem in stems if _start(stem, names) is None]
    if not strange or len(strange) == len(stems):
        return stems
    theirs = known_names(spec, relatives(spec.name))
    left = [stem for stem in strange if _start(stem, theirs) is not None]
    if left:
        warn(path.name, left, "layers")
    return {stem: tensors for stem, tensors in stems.items() if stem not in left}


def _resolve(
    path: Path,
    stems: Iterable[str],
    names: Mapping[str, str],
    metadata: Mapping[str, str],
    spec: ModelSpec | None,
) -> dict[str, str]:
    """Layer name -> stem in the file. `names` maps every accepted spelling to the
    layer's name in its dialect."""
    found, strange, prefixes = {}, [], set()
    stems = list(stems)
    for stem in stems:
        start = _start(stem, names)
        if start is None:
            strange.append(stem)
        else:
            prefixes.add(stem[:start])
            found[names[stem[start:]]] = stem
    said = other_architecture(metadata, spec.name) if spec else None
    if strange or said or len(prefixes) > 1:
        raise CheckpointError(_refusal(path, stems, strange, said, prefixes, spec))
    if len(found) < len(stems):
        raise CheckpointError(f"{path}: names a layer twice in two spellings")
    return found


def _refusal(
    path: Path,
    stems: list[str],
    strange: list[str],
    said: str | None,
    prefixes: set[str],
    spec: ModelSpec | None,
) -> str:
    model = f"this {spec.name} model" if spec else "this model"
    if not strange and not said:
        return f"{path}: mixes the prefixes {', '.join(sorted(prefixes))}: not one LoRA of {model}"
    text = f"{path}: a LoRA of another architecture"
    if strange:
        text += (
            f": {len(strange)} of its {len(stems)} layers are not in {model}, first {', '.join(strange[:3])}"
        )
    looks = said or lora_looks_like(stems)
    hint = "its metadata says" if said else "it looks like"
    return f"{text}; {hint} {looks}; give a LoRA for {model}" if looks else text


def _delta(path: Path, stem: str, tensors: Mapping[str, torch.Tensor], peft: PeftAlpha | None) -> Delta:
    held = set(tensors) - {"alpha"}
    kinds = kinds_of(held) or [LoraLinear]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{path}: '{stem}' is a {' and a '.join(sorted(kind.LABEL for kind in kinds))} at once"
        )
    (kind,) = kinds
    forms = kind.FORMS or (tuple(kind.PARTS),)
    form = min(forms, key=lambda form: len(held ^ set(form)))
    if missing := [part for part in form if part not in tensors]:
        raise CheckpointError(f"{path}: '{stem}' has no {missing[0]}-projection: the file is incomplete")
    if held - set(form):
        raise CheckpointError(
            f"{path}: '{stem}' has {', '.join(sorted(held))}: more than make one {kind.LABEL}"
        )
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        raise CheckpointError(f"{path}: '{stem}' holds values that are not finite: the training run diverged")
    parts = {part: tensors[part] for part in form}
    delta = Delta(kind, parts, 0.0)
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise CheckpointError(
                f"{path}: '{stem}' has an alpha of shape {list(tensors['alpha'].shape)}, expected one number"
            )
        alpha = float(tensors["alpha"])
    else:
        alpha = peft.of(stem, delta.rank) if peft else float(delta.rank)
    return replace(delta, alpha=alpha)


def _pair(path: Path, stem: str, delta: Delta) -> LoraPair:
    try:
        return delta.pair()
    except ValueError as error:
        raise CheckpointError(f"{path}: '{stem}' {error}") from None
