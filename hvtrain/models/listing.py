"""The architectures as text: a table of all, and every parameter of one. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hvtrain.errors import ConfigError
from hvtrain.models import all_specs, find
from hvtrain.models.dit import DiT
from hvtrain.models.spec import ModelSpec, Shapes
from hvtrain.weights.source import shapes_of


def table() -> str:
    """One line per flavor: sizes, latents and what it is; then one per file that a model is made of."""
    rows = [("MODEL", "FLAVOR", "PARAMETERS", "BLOCKS", "LATENTS", "TASKS", "")]
    for spec in all_specs():
        sizes: dict[object, tuple[int, int]] = {}  # flavors share architectures, and building takes a moment
        for flavor in spec.flavors.values():
            if flavor.arch not in sizes:
                model = _on_meta(spec, flavor.arch)
                sizes[flavor.arch] = sum(p.numel() for p in model.parameters()), len(model.blocks)
            n, blocks = sizes[flavor.arch]
            latent = flavor.latent
            cell = f"{latent.channels} x {latent.stride_t}x{latent.stride_h}x{latent.stride_w}"
            tasks = ", ".join(flavor.tasks)
            rows.append((spec.name, flavor.name, f"{n:,}", str(blocks), cell, tasks, flavor.about))
    files = [("MODEL", "FILE", "")]
    for spec in all_specs():
        files += [(spec.name, f"model.{name}", part.about) for name, part in spec.parts.items()]
    return f"{_aligned(rows)}\n\n{_aligned(files)}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def keys(name: str, flavor: str | None = None, part: str | None = None) -> Iterator[str]:
    """"key TAB shape" (3072x16x1x2x2) of every tensor of a flavor (the first unless named), as in its
    official file: of the DiT, or another part. Raises ConfigError for a part whose keys are not known."""
    spec = find(name)
    chosen = spec.flavor(flavor)
    dits = ("dit", *(expert.part for expert in chosen.experts))
    if part is None or part in dits:
        shapes: Shapes = shapes_of(_on_meta(spec, chosen.arch))
    elif part in spec.part_shapes:
        shapes = spec.part_shapes[part](chosen)
    else:
        known = ", ".join(dict.fromkeys([*dits, *spec.part_shapes]))
        raise ConfigError(f"models keys --part {part}: of {spec.name} the keys of {known} can be listed")
    for key, shape in shapes.items():
        yield f"{key}\t{'x'.join(map(str, shape))}"


def _on_meta(spec: ModelSpec, arch: object) -> DiT:
    with torch.device("meta"):
        return spec.build(arch)
