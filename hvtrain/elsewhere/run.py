"""`hvtrain import TOOL ...`: another trainer's config in ours, with a line for every option of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from hvtrain.config import EncodeConfig, FlowConfig, TrainConfig, build
from hvtrain.config.parts import folders
from hvtrain.config.write import commented, nested
from hvtrain.elsewhere import ai_toolkit, diffusion_pipe, musubi
from hvtrain.elsewhere.dataset import entries
from hvtrain.elsewhere.source import Foreign
from hvtrain.elsewhere.table import KINDS, NOT_CARRIED, Draft, Fate, Table, apply
from hvtrain.errors import ConfigError, suggest
from hvtrain.flow.timesteps import SAMPLER_KEYS, SAMPLERS, parameters
from hvtrain.models import all_specs, find
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.registry import Registry

READERS: Mapping[str, Callable[[Sequence[str]], Foreign]] = {
    "musubi": musubi.read, "diffusion-pipe": diffusion_pipe.read, "ai-toolkit": ai_toolkit.read,
}
FILE = "elsewhere.yaml"
_NOT_FOR_ENCODING = ("dit", "experts", "quantize", "fp8_matmul")


@dataclass(frozen=True)
class Imported:
    """YAML of ours, ready to be written, and what became of every option."""

    train: str
    encode: str | None  # None: no dataset is named
    dataset: str | None  # None: encode reads the tool's own file
    lines: list[Fate] = field(default_factory=list)
    gpus: int = 1

    @property
    def lost(self) -> list[Fate]:
        """What could not be carried over."""
        return [line for line in self.lines if line.kind in NOT_CARRIED]

    def summary(self) -> str:
        return _counted(self.lines)


def convert(
    tool: str, given: Sequence[str], *, model: str | None = None, shards: str | None = None,
    name: str = "lora"
) -> Imported:
    """`given`: files or command lines; `name`: of the files that will hold it. Raises ConfigError for what
    cannot be read, or a model that is not here; a single option that has no equal is only said."""
    source = Registry("tool", READERS).find(tool, key="import")(given)
    own, known = (
        yaml.safe_load((Path(__file__).parent / f"{tool}.yaml").read_text(encoding="utf-8")), _models()
    )
    spec = find(_model(tool, source.called, model, known))
    table = Table.of(own, known[spec.name].get(tool, {}))
    made = apply(source.options, table, spelled=source.spelled, tool=own["called"])
    made.values = {"model.name": spec.name, **made.values}
    flavor = _flavor(made, spec)
    _fit_sampler(made)
    _choose_expert(made, flavor)
    _fit_previews(made, flavor)
    folder = str(made.values.get("run.output_dir") or "runs").rstrip("/")
    run = f"{folder}/{made.values.get('run.name', name)}"
    made.put(
        "run.output_dir", run,
        f"{made.notes.get('run.output_dir', 'yours to choose')}; a run has a directory of its own"
    )
    made.put(
        "data.shards", [shards or f"{folder}/shards"], f"made by `hvtrain encode {name}-encode.yaml`",
        weak=True
    )
    dataset = _dataset(made, source, own, tool, name, flavor)
    encode = _encode(made, spec, flavor, name)
    for key in [key for key in made.values if key.startswith("encode.")]:
        made.take(key)
    _refuse_one_by_one(TrainConfig, made)
    lines = sorted(made.lines, key=lambda line: KINDS.index(line.kind))
    head = [f"From {own['called']} by `hvtrain import {tool}`: {_counted(lines)}.", *map(str, lines)]
    return Imported(
        commented(made.values, made.notes, TrainConfig, head=head), encode, dataset, lines, source.gpus
    )


def _models() -> dict[str, dict[str, Any]]:
    """What the folder of every model that is there says of it elsewhere."""
    found: dict[str, dict[str, Any]] = {}
    there = {spec.name for spec in all_specs()}
    for path in (path for folder in reversed(folders()) for path in sorted(folder.glob(f"*/{FILE}"))):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        found |= {raw["name"]: raw} if raw["name"] in there else {}
    return found


def _model(
    tool: str, called: Sequence[str], asked: str | None, known: Mapping[str, Mapping[str, Any]]
) -> str:
    if asked is not None:
        Registry("model", known).find(asked, key="--model")
        return asked
    names = {name: model for model, raw in known.items() for name in raw.get(tool, {}).get("called", [])}
    for name in filter(None, called):
        if name in names:
            return names[name]
    said = next(filter(None, called), "")
    if said:
        raise ConfigError(
            f"{tool}: no model of hvtrain is called '{said}' there; {suggest(said, names)}, or say --model "
            "NAME"
        )
    raise ConfigError(
        f"{tool}: nothing says which model it is; give --model NAME ({', '.join(sorted(known))})"
    )


def _flavor(made: Draft, spec: ModelSpec) -> Flavor:
    """The one that an option says, else the DiT's path or that of what lies with it, else the first:
    what it needs is in its record."""
    keys = sorted(
        (key for key in made.values if key.startswith("model.")),
        key=lambda key: not key.startswith("model.dit")
    )
    paths = [
        Path(value) for key in keys if "/" in str(value := made.values[key]) or key.startswith("model.dit")
    ]
    told = next(filter(None, map(spec.told_by, paths)), None) if spec.told_by else None
    if "model.flavor" not in made.values and told:
        made.put("model.flavor", told, "by the names of the files")
    return spec.flavor(made.values.get("model.flavor"))


def _choose_expert(made: Draft, flavor: Flavor) -> None:
    """Of a flavor of several DiTs: by the file's name, else by the noise levels. Its
    file goes under its own key."""
    if not flavor.experts:
        return
    values, files = made.values, [e for e in flavor.experts if f"model.{e.part}" in made.values]
    low, high = values.get("flow.min_sigma", 0.0), values.get("flow.max_sigma", 1.0)
    names = "|".join(expert.name for expert in flavor.experts)
    named = re.search(rf"({names})[._-]?noise", str(values.get("model.dit", "")))
    within = [e for e in flavor.experts if e.sigmas[0] <= low and high <= e.sigmas[1]]
    if "model.experts" not in values and len(files) == len(flavor.experts):
        made.put("model.experts", "both", "both files are given")
        made.say(
            "changed", "two experts", "model.experts: both",
            "a LoRA for each, in turns; there one is trained for both"
        )
    elif "model.experts" not in values and (named or len(within) == 1):
        made.put(
            "model.experts", named[1] if named else within[0].name,
            "by the file's name" if named else "by its noise levels"
        )
    if "model.experts" not in values:
        raise ConfigError(
            f"'{flavor.name}' is made of {len(flavor.experts)} DiTs; which of them is "
            f"{values.get('model.dit')}? Neither its name (..high_noise.., ..low_noise..) nor the range of "
            "timesteps says"
        )
    own = next((f"model.{e.part}" for e in flavor.experts if e.name == values["model.experts"]), None)
    if own and own not in values and "model.dit" in values:
        made.put(own, made.take("model.dit"), f"the expert '{values['model.experts']}'")
    previews = [key for key in values if key.startswith("preview.")]
    if previews and not all(f"model.{e.part}" in values for e in flavor.experts):
        for key in previews:
            made.take(key)
        made.say(
            "left out", "samples",
            why="they need all experts' files: give model.dit and the others, and preview.*"
        )


def _fit_sampler(made: Draft) -> None:
    """A parameter that the distribution of noise levels does not take here is refused here."""
    name = made.values.get("flow.timestep_sampling", FlowConfig.timestep_sampling)
    takes = parameters(name) if name in SAMPLERS else SAMPLER_KEYS
    for key in (f"flow.{key}" for key in SAMPLER_KEYS if key not in takes):
        if key in made.values:
            idle, note = made.values[key] in (1.0, getattr(FlowConfig, key[5:])), made.notes[key]
            made.take(key)
            made.lines = [line for line in made.lines if line.option != note]
            if not note.endswith("its default"):
                made.say("meaningless" if idle else "left out", note, why=f"'{name}' takes no {key} here")


def _fit_previews(made: Draft, flavor: Flavor) -> None:
    """Sizes that the latents cannot hold go down to the next that they can."""
    tall, wide = flavor.latent.unit
    for key, unit, rest in (("width", wide, 0), ("height", tall, 0), ("frames", flavor.latent.stride_t, 1)):
        value = made.values.get(f"preview.{key}")
        if (
            isinstance(value, int)
            and (near := max(rest or unit, (value - rest) // unit * unit + rest)) != value
        ):
            made.put(f"preview.{key}", near, made.notes[f"preview.{key}"])
            made.say(
                "changed", f"preview.{key} {value}", f"preview.{key}: {near}",
                f"a size that {flavor.name} can make"
            )


def _dataset(
    made: Draft, source: Foreign, own: Mapping[str, Any], tool: str, name: str, flavor: Flavor
) -> str | None:
    if source.datasets is None:
        return None
    found: list[dict[str, Any]] = []
    for i, options in enumerate(source.datasets, start=1):
        one = apply(options, Table.of(own["dataset"]), spelled=lambda option: option, tool=own["called"])
        made.lines += [replace(line, option=f"dataset {i}: {line.option}") for line in one.lines]
        found += entries(one, unit=flavor.latent.unit)
    if not found:
        return None
    masked = ["mask_directory" in entry for entry in found]
    if all(masked):
        made.put("flow.masked", True, "masks of the datasets")
    elif any(masked):
        found = [{key: value for key, value in entry.items() if key != "mask_directory"} for entry in found]
        made.say(
            "left out", "masks",
            why="where one dataset has them all need them: give white pictures to the others"
        )
    made.put("encode.dataset", f"{name}-dataset.yaml", f"{own['called']}'s datasets")
    text = yaml.safe_dump({"datasets": found}, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"# From {own['called']} by `hvtrain import {tool}`\n{text}"


def _encode(made: Draft, spec: ModelSpec, flavor: Flavor, name: str) -> str | None:
    values = {
        key.removeprefix("encode."): value for key, value in made.values.items() if key.startswith("encode.")
    }
    if "dataset" not in values:
        return None
    skip = {f"model.{key}" for key in (*_NOT_FOR_ENCODING, *(e.part for e in flavor.experts))}
    files = {key: value for key, value in made.values.items() if key.startswith("model.") and key not in skip}
    notes = {key.removeprefix("encode."): note for key, note in made.notes.items()}
    own = Draft({**values, "output": made.values["data.shards"][0], **files}, notes)
    masks = ["mask"] if made.values.get("flow.masked") else []
    if masks or set(flavor.columns) != {"latents", "text"}:
        own.put("columns", [*flavor.columns, *masks], f"what {flavor.name} reads{' and masks' * bool(masks)}")
    _refuse_one_by_one(EncodeConfig, own)
    made.lines += own.lines
    head = [f"hvtrain encode {name}-encode.yaml, then hvtrain train {name}.yaml"]
    return commented(own.values, own.notes, EncodeConfig, head=head)


def _refuse_one_by_one(cls: type, made: Draft) -> None:
    """A value that our config would refuse is taken out, and said: the rest is worth having."""
    name = {"model.name": made.values["model.name"]}
    for key in [key for key in made.values if key != "model.name"]:
        try:
            build(cls, nested(name | {key: made.values[key]}), where="")
        except ConfigError as error:
            made.say("left out", made.notes.get(key, key), why=str(error).removeprefix(": "))
            made.take(key)


def _counted(lines: Sequence[Fate]) -> str:
    n = Counter(line.kind for line in lines)
    return ", ".join(f"{n[kind]} {kind}" for kind in KINDS if n[kind])
