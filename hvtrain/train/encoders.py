"""Shards of another VAE or text encoder have the right shapes and the wrong values: only the manifests' fingerprints tell.

A fingerprint is of a file's headers and samples: the same weights in another layout or dtype are another file, which
`data.allow_foreign` is for. Columns that another program encoded have none to compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hvtrain.config import ModelConfig, asset
from hvtrain.errors import DataError
from hvtrain.models.parts import keys_of, text_fingerprints
from hvtrain.models.spec import ModelSpec
from hvtrain.weights.containers import fingerprint, open_weights
from shards import ShardSet

ANYWAY = "set data.allow_foreign=true if you know that they are the same weights"


def check_encoders(
    groups: Mapping[str, Sequence[ShardSet]], columns: Iterable[str], model: ModelConfig, spec: ModelSpec
) -> None:
    """Compare what made the columns of all sets (by the config's key that names them) with the config's own encoders, where it
    has them, else with each other. Raises DataError."""
    for column in columns:
        every = [(key, s, s.manifest.made_by(column)) for key, sets in groups.items() for s in sets]
        made = [(key, s, name) for key, s, by in every if (name := by.encoder)]
        others = [(key, s, by) for key, s, by in every if by.model not in ("", spec.name)]
        if not made and not others:
            continue
        part, own = _own(column, model, spec)
        for key, found, by in others:  # models may share an encoder
            if by.encoder not in own:
                raise DataError(
                    f"{key}: column '{column}' of {found.name} was made for {by.model}, this run trains {spec.name}; encode the "
                    f"clips with its {part}, or {ANYWAY}"
                )
        for key, found, name in made:
            if own and name not in own:
                raise DataError(
                    f"{key}: column '{column}' of {found.name} was made by other weights ({name[:12]}) than {part} "
                    f"({own[0][:12]}); encode it with these, or {ANYWAY}"
                )
            if not own and name != made[0][2]:
                raise DataError(
                    f"{key}: column '{column}' of {found.name} was made by other weights ({name[:12]}) than that of "
                    f"{made[0][1].name} ({made[0][2][:12]}); encode both with the same {part}, or {ANYWAY}"
                )


def _own(column: str, m: ModelConfig, spec: ModelSpec) -> tuple[str, tuple[str, ...]]:
    """The config's keys, and what the fingerprint may be; empty where they are not set."""
    if column == "text":
        return keys_of(spec, column), text_fingerprints(spec, m)
    if spec.column(column) is not None:
        return keys_of(spec, column), ()
    return "model.vae", (fingerprint(open_weights(asset(m.vae))),) if m.vae else ()
