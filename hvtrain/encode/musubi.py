"""`hvtrain shards import-musubi`: musubi-tuner's cache directories into a shard set, nothing encoded anew."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hvtrain.encode.clips import Rejected
from hvtrain.encode.columns import kind_of
from hvtrain.encode.folder import stored
from hvtrain.encode.writer import REJECTED
from hvtrain.errors import DataError
from hvtrain.models import all_specs, find
from hvtrain.models.spec import Flavor, ModelSpec
from shards.atomic import write_text
from shards.schema import IMPORTED, Chunk, Made, Manifest, save_manifest
from shards.writer import TarWriter

# {stem}_{start}-{frames}_{w}x{h}_{arch} for videos, {stem}_{w}x{h}_{arch} for images
NAME = re.compile(
    r"(?P<stem>.+?)(_(?P<start>\d{5,})-(?P<frames>\d{3,}))?_\d{4,}x\d{4,}_(?P<arch>\w+?)\.safetensors"
)


@dataclass(frozen=True)
class _Pair:
    """A latent file and the text file of its clip."""

    key: str
    latents: Path
    text: Path
    meta: dict[str, Any]


def run(
    caches: Sequence[str], output: str, *, model: str | None, samples_per_tar: int, strict: bool,
    flavor: str | None = None
) -> Iterator[str]:
    """Yields what to print. `flavor`: whose columns these are; None: the first that reads all of them."""
    root = Path(output)
    if root.exists() and any(root.iterdir()):
        raise DataError(f"output: {root} holds something already; choose a new or empty directory")
    spec = find(model) if model else _model_of(caches)
    if spec.musubi is None:
        raise DataError(f"model {spec.name} has no musubi-tuner cache format")
    refused: list[Rejected] = []

    def refuse(path: Path, reason: str) -> None:
        if strict:
            raise DataError(f"{path}: {reason} (strict)")
        refused.append(Rejected(str(path), f"{path}: {reason}"))

    buckets: dict[str, list[_Pair]] = {}
    g = spec.flavor(flavor).latent
    for pair in _pairs(caches, spec.musubi.short, refuse):
        try:
            shape = _latent_shape(pair.latents)
        except DataError as error:
            refuse(pair.latents, str(error))
            continue
        bucket = f"{(shape[0] - 1) * g.stride_t + 1}x{shape[1] * g.stride_h}x{shape[2] * g.stride_w}"
        buckets.setdefault(bucket, []).append(pair)
    rows: list[Chunk] = []
    for bucket, pairs in sorted(buckets.items()):
        for i in range(0, len(pairs), samples_per_tar):
            rows += _chunk(
                root, bucket, pairs[i : i + samples_per_tar], spec, tuple(rows[0].tars) if rows else (),
                refuse
            )
    if not rows:
        raise DataError(
            f"nothing could be imported; first: {refused[0].reason if refused else 'no cache files'}"
        )
    whose = spec.flavor(flavor) if flavor else _flavor_of(spec, rows[0].tars)
    made_by = f"{IMPORTED}musubi-tuner {spec.musubi.full}"
    made = {
        column: Made(
            made_by, spec.name, fields=stored(root, column, kind_of(column, spec, whose).fields, rows)
        )
        for column in rows[0].tars
    }
    save_manifest(root, Manifest(tuple(made), tuple(rows), made))
    yield (
        f"{root}: {sum(len(r.keys) for r in rows)} samples of {spec.name} {whose.name} in {len(rows)} tars a "
        "column"
    )
    yield "the caches hold no empty caption: data.caption_dropout needs column 'text' encoded by hvtrain"
    if refused:
        write_text(root / REJECTED, "".join(row.row() + "\n" for row in refused))
        yield f"{len(refused)} files not usable, see {root / REJECTED}; the first: {refused[0].reason}"


def _model_of(caches: Sequence[str]) -> ModelSpec:
    shorts = {spec.musubi.short: spec for spec in all_specs() if spec.musubi}
    seen: set[str] = set()
    for folder in caches:
        for path in Path(folder).glob("*.safetensors"):
            match = NAME.fullmatch(path.name)
            if match:
                seen.add(match["arch"])
    known = sorted(seen & set(shorts))
    if len(known) != 1:
        legal = ", ".join(f"'{short}' ({spec.name})" for short, spec in shorts.items())
        raise DataError(
            f"{', '.join(caches)}: latent caches of {sorted(seen) or 'no architecture'} found; known are "
            f"{legal}; give the right directory, or --model"
        )
    return shorts[known[0]]


def _flavor_of(spec: ModelSpec, columns: Collection[str]) -> Flavor:
    """The first whose columns these are, or that reads all of them."""
    order = sorted(spec.flavors.values(), key=lambda flavor: set(flavor.columns) != set(columns))
    return next((flavor for flavor in order if set(flavor.columns) >= set(columns)), order[0])


def _pairs(caches: Sequence[str], short: str, refuse: Callable[[Path, str], None]) -> Iterator[_Pair]:
    for folder in caches:
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such directory")
        for path in sorted(Path(folder).glob(f"*_{short}.safetensors")):
            match = NAME.fullmatch(path.name)
            if not match or match["arch"] != short:
                refuse(path, "not a latent cache's name: expected STEM_START-FRAMES_WxH_ARCH.safetensors")
                continue
            text = path.with_name(f"{match['stem']}_{short}_te.safetensors")
            if not text.is_file():
                refuse(
                    path, f"its text cache {text.name} is missing; run musubi-tuner's text encoder caching"
                )
                continue
            stem = re.sub(r"[^A-Za-z0-9]+", "-", match["stem"]).strip("-")[:60] or "clip"
            tail = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
            start, n = int(match["start"] or 0), int(match["frames"] or 1)
            frames = [start, start + n - 1, n]
            yield _Pair(f"{stem}-{tail}", path, text, {"source": str(path), "frames": frames})


def _latent_shape(path: Path) -> tuple[int, ...]:
    try:
        with safe_open(path, "pt") as file:
            names = [n for n in file.keys() if re.fullmatch(r"latents_\d+x\d+x\d+_\w+", n)]
            if len(names) != 1:
                raise DataError(f"expected one tensor latents_FxHxW_DTYPE, found {sorted(file.keys())}")
            return tuple(file.get_slice(names[0]).get_shape()[1:])
    except (SafetensorError, OSError) as error:
        raise DataError(f"not readable as safetensors ({error})") from None


def _chunk(
    root: Path, bucket: str, pairs: Sequence[_Pair], spec: ModelSpec, columns: tuple[str, ...],
    refuse: Callable[[Path, str], None],
) -> list[Chunk]:
    """`columns`: those of the chunks before; none: the first sound pair's."""
    cache = spec.musubi
    assert cache is not None
    good: list[str] = []
    with ExitStack() as files:
        tars: dict[str, TarWriter] = {}
        for pair in pairs:
            try:
                latents = _converted(pair.latents, cache.latents, cache.full)
                words = _converted(pair.text, cache.text, cache.full)
                found = _by_column({**latents.tensors, **words.tensors}, spec)
                columns = columns or tuple(found)
                if set(found) != set(columns):
                    raise DataError(f"holds {', '.join(found)}, the others {', '.join(columns)}")
            except DataError as error:
                refuse(pair.latents, str(error))
                continue
            for column, fields in found.items():
                if column not in tars:
                    tars[column] = files.enter_context(TarWriter(root, column))
                said = (
                    {"caption": words.meta.get("caption1", "")}
                    if column == "text" else {**pair.meta, "bucket": bucket}
                )
                tars[column].add(pair.key, fields, said)
            good.append(pair.key)
        if not good:
            return []
        digest = hashlib.sha256("\0".join(good).encode()).hexdigest()[:16]
        done = {name: tar.finish(f"{name}/{bucket}-{digest}.tar") for name, tar in tars.items()}
    return [Chunk(bucket, tuple(good), done)]


def _by_column(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, dict[str, Tensor]]:
    homes = {"latents": "latents"} | {
        f.name: f.column for flavor in spec.flavors.values() for f in flavor.cond
    }
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(homes[name], {})[name] = tensor
    return found


@dataclass(frozen=True)
class _Read:
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]


def _converted(path: Path, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], full: str) -> _Read:
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            raw = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path.name}: not readable as safetensors ({error})") from None
    if meta.get("architecture", full) != full:
        raise DataError(f"{path.name}: made for architecture {meta['architecture']!r}, expected {full!r}")
    tensors = convert(raw)
    if not all(t.isfinite().all() for t in tensors.values()):
        raise DataError(f"{path.name}: holds NaN or infinite values")
    return _Read(tensors, meta)
