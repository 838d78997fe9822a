"""How programs name a LoRA's tensors, and its pairs between the official layers and
theirs, by the model's key maps."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from hvtrain.errors import CheckpointError
from hvtrain.lorafiles.pairs import LoraPair, cut_rows, join_rows
from hvtrain.models.spec import ModelSpec
from hvtrain.registry import Registry
from hvtrain.weights.keymap import KeyMap, Rule

Shapes: TypeAlias = Mapping[str, tuple[int, int]]  # official layer name -> [out, in]


@dataclass(frozen=True)
class Dialect:
    """What a program expects of a LoRA file."""

    name: str
    about: str
    # before a layer's name; several: one for each of a model's experts, in their order
    prefixes: tuple[str, ...]
    keys: str = "official"  # the model's key map that names the layers
    flat: bool = False  # with underscores instead of dots
    down: str = "lora_A"
    up: str = "lora_B"
    # where it is; "rank": nowhere, it is taken to be the rank
    alpha: Literal["tensor", "metadata", "rank"] = "tensor"
    folds: bool = False  # alpha / rank is multiplied into `up` unless asked otherwise

    def prefix(self, expert: int = 0) -> str:
        return self.prefixes[min(expert, len(self.prefixes) - 1)]

    def tensors(
        self, pairs: Mapping[str, LoraPair], *, expert: int = 0, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Pairs of its own layers under its names, in their own dtype or in another."""
        out = {}
        for name, pair in pairs.items():
            stem = self.prefix(expert) + (name.replace(".", "_") if self.flat else name)
            out[f"{stem}.{self.down}.weight"] = pair.down.to("cpu", dtype or pair.down.dtype)
            out[f"{stem}.{self.up}.weight"] = pair.up.to("cpu", dtype or pair.up.dtype)
            if self.alpha == "tensor":
                out[f"{stem}.alpha"] = torch.tensor(float(pair.alpha))
        return out


MUSUBI = Dialect("musubi", "musubi (sd-scripts)", ("lora_unet_",), flat=True, down="lora_down", up="lora_up")
DIALECTS: Registry[Dialect] = Registry("dialect", ((d.name, d) for d in (
    MUSUBI,
    Dialect("comfyui", "comfyui", ("diffusion_model.",)),
    # Every version of diffusers loads a folded alpha rightly; those since 0.34 read it from the metadata too.
    Dialect(
        "diffusers", "diffusers", ("transformer.", "transformer_2."), keys="diffusers", alpha="metadata",
        folds=True
    ),
    Dialect("diffusion-pipe", "diffusion-pipe", ("diffusion_model.",), alpha="rank", folds=True),
)))  # fmt: skip


def spelling(stems: Iterable[str], *, alphas: bool) -> str:
    """Whose names these are; `alphas`: whether the file has alpha tensors."""
    first = next(iter(stems), "")
    found = [d for d in DIALECTS.values() if first.startswith(d.prefixes)]
    names = [d.about for d in found if d.alpha == "tensor" or not alphas] or [d.about for d in found]
    return " or ".join(names) or ("PEFT" if first.startswith("base_model.model.") else "official names")


def key_map(spec: ModelSpec, dialect: str) -> KeyMap:
    return Registry("dialect", spec.key_maps).find(dialect, key=spec.name)


def pieces(key: KeyMap, module: str, n_out: int) -> dict[str, torch.Tensor]:
    """The dialect's layers that make up an official one, each with its rows' places among the n_out official
    rows; one that is a fusion of several official layers has these rows among its own
    (weights.keymap.Rule.share)."""
    rule = key.rule_of_official(module)
    if rule is None:
        if not key.passthrough:
            raise CheckpointError(f"the dialect has no name for the layer '{module}'")
        return {module: torch.arange(n_out)}
    return dict(zip(rule.dialect, _rows(rule, n_out), strict=True))


def _rows(rule: Rule, n_out: int) -> list[torch.Tensor]:
    rows = torch.arange(n_out)
    if rule.swap:  # a rule either swaps or cuts
        return [torch.cat(rows.chunk(2)[::-1])]
    return list(rows.split(rule.split(n_out))) if len(rule.dialect) > 1 else [rows]


def spread(pairs: Mapping[str, LoraPair], key: KeyMap) -> dict[str, LoraPair]:
    """Official layers' pairs as pairs of the dialect's layers. Undone exactly by `gather`."""
    if not key.rules:
        return dict(pairs)
    out: dict[str, LoraPair] = {}
    fused: dict[str, dict[tuple[int, int], LoraPair]] = {}
    for module, pair in pairs.items():
        rule = key.rule_of_official(module)
        if rule and rule.share:
            fused.setdefault(rule.dialect[0], {})[rule.share] = pair
            continue
        places = pieces(key, module, pair.up.shape[0])
        parts = cut_rows(pair, list(places.values()))
        out.update({name: part for name, part in zip(places, parts, strict=True) if part is not None})
    for name, held in fused.items():
        n = next(iter(held))[1]
        parts = [held.get((i, n)) for i in range(n)]
        out[name] = join_rows(parts, _blocks(n, len(next(iter(held.values())).up)))
    return out


def _blocks(n: int, n_out: int) -> list[torch.Tensor]:
    """The rows of n official layers of n_out rows each in their fusion."""
    return list(torch.arange(n * n_out).chunk(n))


def gather(
    path: Path, pairs: Mapping[str, LoraPair], spec: ModelSpec | None, shapes: Shapes
) -> dict[str, LoraPair]:
    """Pairs of any dialects' layers as pairs of official ones, in the order of `shapes`."""
    keys = list(spec.key_maps.values()) if spec else []
    left, out = _unfused(path, pairs, keys, shapes), {}
    for module, shape in shapes.items():
        if module in left:
            out[module] = left.pop(module)
            continue
        for key in keys:
            rule = key.rule_of_official(module)
            places = pieces(key, module, shape[0]) if rule and not rule.share else {}
            if not any(name in left for name in places):
                continue
            parts = [left.pop(name, None) for name in places]
            for (name, rows), part in zip(places.items(), parts, strict=True):
                if part is not None:
                    part.check_shape(path, name, (len(rows), shape[1]))
            try:
                out[module] = join_rows(parts, list(places.values()))
            except ValueError as error:
                raise CheckpointError(f"{path}: '{module}' {error}") from None
            break
    if left:
        raise CheckpointError(f"{path}: adapts '{next(iter(left))}' twice, under names of two dialects")
    return out


def _unfused(
    path: Path, pairs: Mapping[str, LoraPair], keys: Iterable[KeyMap], shapes: Shapes
) -> dict[str, LoraPair]:
    """With layers that are fusions of several official ones cut into these."""
    left, fusions = dict(pairs), {}
    for key in keys:
        for module, shape in shapes.items():
            rule = key.rule_of_official(module)
            if not (rule and rule.share and rule.dialect[0] in pairs):
                continue
            i, n = rule.share
            name = rule.dialect[0]
            if name not in fusions:
                left.pop(name).check_shape(path, name, (n * shape[0], shape[1]))
                fusions[name] = cut_rows(pairs[name], _blocks(n, shape[0]))
            if module in left:
                raise CheckpointError(f"{path}: adapts '{module}' twice, under names of two dialects")
            if (part := fusions[name][i]) is not None:
                left[module] = part
    return left


def same_layer(module: str, n_out: int, held: Container[str], spec: ModelSpec | None) -> str | None:
    """The one among the names that a file holds that is this official layer, row by row; None
    where it is cut or swapped."""
    if module in held:
        return module
    for key in spec.key_maps.values() if spec else ():
        rule = key.rule_of_official(module)
        places = pieces(key, module, n_out) if rule and not rule.share else {}
        for name, rows in places.items():
            if name in held and torch.equal(rows, torch.arange(n_out)):
                return name
    return None


def known_names(spec: ModelSpec | None, modules: Iterable[str]) -> dict[str, str]:
    """Every spelling of every layer, dotted or with underscores -> the layer's dotted name in its dialect."""
    names: set[str] = set()
    for module in modules:
        names.add(module)
        for key in spec.key_maps.values() if spec else ():
            rule = key.rule_of_official(module)
            names.update(rule.dialect if rule else ())
    return {spelling: name for name in names for spelling in (name.replace(".", "_"), name)}
