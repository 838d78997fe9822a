"""The LoRAs of a generation: files, and slices of a sliced run by their LORAID."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvtrain.config import SampledLora, asset
from hvtrain.errors import ConfigError, suggest
from hvtrain.lorafiles.dialects import Shapes
from hvtrain.lorafiles.experts import check_range, names_of, number_of, trained_range, whose
from hvtrain.lorafiles.files import LoraFile, prefix_number, read_lora
from hvtrain.lorafiles.overlap import by_layer, overlaps
from hvtrain.lorafiles.runs import finished
from hvtrain.lorafiles.tools import blocks
from hvtrain.models.spec import Expert, Flavor, ModelSpec


@dataclass(frozen=True)
class Applied:
    """A LoRA of a generation."""

    lora: LoraFile
    multiplier: float
    expert: str | None = None  # None: of every expert


def on_expert(loras: Sequence[Applied], expert: Expert | None) -> list[tuple[LoraFile, float]]:
    """Those that change this expert's weights, or those of the one DiT."""
    return [
        (one.lora, one.multiplier) for one in loras if expert is None or one.expert in (None, expert.name)
    ]


def open_loras(
    wanted: Sequence[SampledLora], shapes: Shapes, spec: ModelSpec, flavor: Flavor, *, quiet: bool = False,
    bases: Mapping[str, str] | None = None,
) -> list[Applied]:
    """Read them, and say which blocks each holds and whether any two change the same rows.
    `bases`: the fingerprint of each expert's weights. Raises ConfigError for one of other
    noise levels than its expert's."""
    names = [expert.name for expert in flavor.experts]
    for w in wanted:
        if not math.isfinite(w.multiplier):
            raise ConfigError(
                f"the multiplier of {w.path} is {w.multiplier}, expected a finite number; 0 switches it off"
            )
        if w.expert is not None and w.expert not in names:
            hint = suggest(w.expert, names) if names else "leave lora.expert out"
            raise ConfigError(f"lora.expert of {w.path}: '{flavor.name}' has no expert '{w.expert}'; {hint}")
    loras = [one for w in wanted for one in _applied(w, shapes, spec, flavor, bases)]
    if not quiet:
        for one in loras:
            name = f"LORAID {one.lora.metadata['ss_loraid']}, " if one.lora.metadata.get("ss_loraid") else ""
            off = " (off)" if one.multiplier == 0 else ""
            of = f" on {one.expert}" if one.expert else f" on all of {', '.join(names)}" if names else ""
            print(
                f"{one.lora.summary()}, times {one.multiplier:g}{off}{of}; {name}{blocks(one.lora.pairs)}",
                flush=True
            )
        if len(loras) > 1:
            together = [by_layer(on_expert(loras, expert)) for expert in flavor.experts or (None,)]
            shared = max(sum(o.n_rows for o in overlaps(found)) for found in together)
            print(
                f"{shared} rows are changed by more than one" if shared else "no two change the same rows",
                flush=True
            )
    return loras


def _applied(
    w: SampledLora, shapes: Shapes, spec: ModelSpec, flavor: Flavor, bases: Mapping[str, str] | None
) -> Iterator[Applied]:
    """A LoRA for its expert; a file that holds one for each, as several."""
    path, experts = Path(asset(w.path)), {expert.name: expert for expert in flavor.experts}
    both = w.expert is None and bool(experts) and prefix_number(path) == -1
    for wish in names_of(spec) if both else [w.expert]:
        number = number_of(spec, wish, key="lora.expert")
        lora = read_lora(path, shapes, spec=spec, expert=number, decomposed=True, foreign=True)
        own, sure = (wish, True) if both else whose(lora, flavor.experts, bases)
        if sure and wish is not None and own != wish:
            span = trained_range(lora.metadata)
            levels = f", on sigma {span[0]:g} to {span[1]:g}" if span else ""
            raise ConfigError(
                f"lora.expert of {path} is '{wish}', but it was trained as '{own}'{levels}; leave "
                "lora.expert out"
            )
        name = wish or own
        if name is not None and name in experts:
            check_range(lora, experts[name])
        yield Applied(lora, w.multiplier, name)


def of_slices(
    folder: Path, loraid: Sequence[int], multipliers: Sequence[float], experts: Sequence[str] = ()
) -> list[SampledLora]:
    """The finished slices of a sliced run: those with these LORAIDs, or all; of runs that trained
    several experts, each one's."""
    runs = {int(p.name): p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.isdigit()}
    ids = loraid or tuple(runs)
    unknown = [i for i in ids if i not in runs]
    if not runs or unknown:
        found = ", ".join(map(str, runs)) or "none"
        raise ConfigError(f"loraid: {folder} has no slice {unknown[0] if unknown else ''}; found {found}")
    factors = multipliers or (1.0,)
    if len(factors) == 1:
        factors = [*factors] * len(ids)
    chosen = []
    for i, factor in zip(ids, factors, strict=True):
        paths = [finished(runs[i], name) for name in experts or (None,)]
        for path in dict.fromkeys(paths):
            if isinstance(path, str):
                raise ConfigError(f"loraid: slice {i} cannot be applied: {path}")
            chosen.append(SampledLora(str(path), factor))
    return chosen
