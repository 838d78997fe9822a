"""A run's shard sets, compared with what its flavor takes: fields, shapes and, by fingerprint,
the weights that encoded them.

Shards of another VAE or text encoder have the right shapes and the wrong values. A fingerprint is of a file's
headers and samples: the same weights in another layout or dtype are another file, which `data.allow_foreign`
is for. Columns that another program encoded have none to compare.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

from torch import Tensor

from hvtrain.config import ModelConfig, asset
from hvtrain.errors import ConfigError, DataError
from hvtrain.models.parts import keys_of, text_fingerprints
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.weights.containers import fingerprint, open_weights
from shards import ShardSet, open_set

ANYWAY = "set data.allow_foreign=true if you know that they are the same weights"
Groups = Mapping[str, Sequence[ShardSet]]  # by the config's key that names them


def open_shards(paths: Sequence[str], flavor: Flavor, *, key: str, masked: bool = False) -> list[ShardSet]:
    """Open shard sets and compare a sample of each with what the model needs; `masked`: and the loss, a mask
    of the latents' cells. Raises DataError and ShardError."""
    sets = [open_set(path) for path in paths]
    for found in sets:
        if not len(found):
            raise DataError(f"{key}: {found.name} holds no samples; encode some clips into it")
        tensors = found.some().tensors
        if "latents" not in tensors:
            raise DataError(f"{key}: {found.name} lacks the field 'latents'; encode column 'latents'")
        if tensors["latents"].shape[0] != flavor.latent.channels:
            raise DataError(
                f"{key}: {found.name} holds latents of {tensors['latents'].shape[0]} channels, flavor "
                f"'{flavor.name}' takes {flavor.latent.channels}; encode the clips with this model's VAE"
            )
        cells = (1, *tensors["latents"].shape[1:])
        if masked and ("mask" not in tensors or tuple(tensors["mask"].shape) != cells):
            held = f"holds one of shape {tuple(tensors['mask'].shape)}" if "mask" in tensors else "lacks it"
            raise DataError(
                f"{key}: flow.masked needs the field 'mask' of shape {cells}, {found.name} {held}; encode "
                "column 'mask'"
            )
        optional = {field.name for field in flavor.cond if field.optional}
        _check_fields(tensors, flavor, f"{key}: {found.name}", columns=flavor.columns, may_lack=optional)
    return sets


def check_empty_text(sets: Sequence[ShardSet], flavor: Flavor) -> None:
    """Of the set whose empty caption stands in for dropped ones."""
    where, held = f"{sets[0].name}: its empty caption", sets[0].some().tensors
    optional = {field.name for field in flavor.cond if field.optional and field.name not in held}
    _check_fields(sets[0].empty_text, flavor, where, columns=("text",), may_lack=optional)


def check_image_share(share: float | None, sets: Sequence[ShardSet], flavor: Flavor) -> None:
    """Raises ConfigError for a flavor that has no choice, DataError for a set without images."""
    if share is None:
        return
    if not (flavor.mixes or flavor.image_optional):
        why = "is always told by an image" if flavor.beyond_text else "takes none"
        raise ConfigError(f"data.image_share is {share:g}, but '{flavor.name}' {why}: leave it null")
    for found in sets if share else ():
        if lacking := [c for c in flavor.columns if c not in found.manifest.columns]:
            raise DataError(
                f"data.image_share is {share:g}, but {found.name} has no column '{lacking[0]}'; encode it, "
                "or give 0"
            )


def drops_captions(sets: Sequence[ShardSet], share: float) -> bool:
    """Whether any sample's caption may be dropped: a set can say so of its own."""
    own = [chunk.caption_dropout for found in sets for chunk in found.manifest.chunks]
    return any(share if rate is None else rate for rate in own)


def _check_fields(
    tensors: Mapping[str, Tensor], flavor: Flavor, where: str, *, columns: Iterable[str],
    may_lack: Container[str],
) -> None:
    for field in flavor.cond:
        if field.column not in columns or (field.name not in tensors and field.name in may_lack):
            continue
        again = f"encode column '{field.column}' with this model's encoders"
        if field.name not in tensors:
            raise DataError(f"{where} lacks the field '{field.name}'; {again}")
        shape = tensors[field.name].shape
        if not field.fits(shape):
            raise DataError(
                f"{where} holds '{field.name}' of shape {tuple(shape)}, flavor '{flavor.name}' takes "
                f"{field}; {again}"
            )


def check_encoders(
    groups: Groups, columns: Iterable[str], model: ModelConfig, spec: ModelSpec, flavor: Flavor | None = None
) -> None:
    """Compare what made the columns of all sets with the config's own encoders, where it has them, else with
    each other. Raises DataError."""
    for column in columns:
        every = [(key, s, s.manifest.made_by(column)) for key, sets in groups.items() for s in sets]
        made = [(key, s, name) for key, s, by in every if (name := by.encoder)]
        others = [(key, s, by) for key, s, by in every if by.model not in ("", spec.name)]
        if not made and not others:
            continue
        part, own = _own(column, model, spec, flavor)
        for key, found, by in others:  # models may share an encoder
            if by.encoder not in own:
                raise DataError(
                    f"{key}: column '{column}' of {found.name} was made for {by.model}, this run trains "
                    f"{spec.name}; encode the clips with its {part}, or {ANYWAY}"
                )
        for key, found, name in made:
            if own and name not in own:
                raise DataError(
                    f"{key}: column '{column}' of {found.name} was made by other weights ({name[:12]}) than "
                    f"{part} ({own[0][:12]}); encode it with these, or {ANYWAY}"
                )
            if not own and name != made[0][2]:
                raise DataError(
                    f"{key}: column '{column}' of {found.name} was made by other weights ({name[:12]}) than "
                    f"that of {made[0][1].name} ({made[0][2][:12]}); encode both with the same {part}, or "
                    f"{ANYWAY}"
                )


def _own(column: str, m: ModelConfig, spec: ModelSpec, flavor: Flavor | None) -> tuple[str, tuple[str, ...]]:
    """The config's keys, and what the fingerprint may be; empty where they are not set."""
    if column == "text":
        return keys_of(spec, column), text_fingerprints(spec, m, flavor)
    if spec.column(column) is not None:
        return keys_of(spec, column), ()
    return "model.vae", (fingerprint(open_weights(asset(m.vae))),) if m.vae else ()
