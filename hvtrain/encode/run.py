"""`hvtrain encode`: clips and captions into a shard set, on all ranks."""

from __future__ import annotations

import gc
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from hvtrain.config import EncodeConfig
from hvtrain.config.parts import MASK
from hvtrain.config.rules import check_encode
from hvtrain.encode.clips import Rejected, find_clips
from hvtrain.encode.columns import ColumnKind, Tools, check_images, columns_of, kind_of
from hvtrain.encode.dataset import Dataset, read_dataset_file
from hvtrain.encode.encoders import Encode, Fields
from hvtrain.encode.folder import Filled, Folder, carried, claim, finish
from hvtrain.encode.identity import remember, remembered, signature
from hvtrain.encode.progress import Meter
from hvtrain.encode.samples import (
    PROBES,
    PlannedChunk,
    PlannedSample,
    Probes,
    cut_chunks,
    plan_clips,
    share_out,
    without_doubles,
)
from hvtrain.encode.writer import JOURNAL, REJECTED, ColumnWriter, Known, copier, note, read_rejected
from hvtrain.errors import DataError
from hvtrain.models import find
from hvtrain.models.parts import files_of, open_text
from hvtrain.parallel.context import ParallelContext, shutdown, start
from shards.atomic import atomic_path, write_text
from shards.schema import EMPTY_TEXT, Made


def run(cfg: EncodeConfig, ctx: ParallelContext | None = None) -> None:
    """Encode what is missing and write the manifest."""
    check_encode(cfg)
    spec = find(cfg.model.name)
    flavor = spec.flavor(cfg.model.flavor)
    order = columns_of(spec)
    asked = {name: kind_of(name, spec, flavor) for name in cfg.columns}
    datasets = read_dataset_file(cfg.dataset, flavor)
    if flavor.sees and "text" in asked:
        open_text(spec, cfg.model, "meta", flavor)  # its vision tower may be missing
    own = ctx is None
    ctx = ctx or start()
    folder = Folder(Path(cfg.output), ctx)
    tools = Tools(spec, flavor, cfg.model, ctx.device, cfg.dtype, cfg.seed, cfg.batch_size, cfg.workers)

    claim(folder, order)
    known = Known(folder.root)
    kept = {name: kind_of(name, spec, flavor) for name in carried(folder.root, known.manifest, asked, spec)}
    found = _look(folder, datasets, fps=flavor.defaults.fps, workers=cfg.workers)
    samples, refused = _usable(found, folder.root, asked=asked, strict=cfg.strict)
    check_images(samples, flavor, asked | kept)
    # Cut before the hopeless leave: one that turns out bad later does not move the others to other tars.
    hopeless = {row.digest for row in refused if row.digest}
    chunks = [
        c.without({s.key for s in c.samples if s.state in hopeless})
        for c in cut_chunks(samples, samples_per_tar=cfg.samples_per_tar)
    ]
    if ctx.is_main:
        n = sum(len(c.samples) for c in chunks)
        print(f"{len(found)} clips, {n} samples in {len(chunks)} tars, {ctx.world} process(es)", flush=True)
    kinds = sorted((asked | kept).values(), key=lambda kind: order.index(kind.name))
    old = {name: known.manifest.made_by(name) for name in kept if known.manifest}
    filled, chunks, rejected = _columns(folder, kinds, old, tools, chunks, known, strict=cfg.strict)
    refused += rejected
    counts = [
        [int(ctx.all_reduce_sum(n)) for n in (f.tally.encoded, f.tally.copied, f.tally.kept)] for f in filled
    ]
    n = finish(folder, filled, chunks, refused)
    if ctx.is_main:
        rest = "" if any(n[0] + n[1] for n in counts) else "nothing to do, all of it was there; "
        rest += "; ".join(
            f"{f.kind.name}: {a} encoded, {b} copied, {c} kept" for f, (a, b, c) in zip(filled, counts)
        )
        print(f"{folder.root}: {n} samples; {rest}", flush=True)
        if refused:
            listed = folder.root / REJECTED
            print(f"{len(refused)} not usable, see {listed}; the first: {refused[0].reason}", flush=True)
    if own:
        shutdown()


# --- planning -----------------------------------------------------------------------------------------------


def _look(
    folder: Folder, datasets: Sequence[Dataset], *, fps: float, workers: int
) -> list[list[PlannedSample | Rejected]]:
    """What each clip gives. Every rank opens its share of the files."""
    clips = [clip for dataset in datasets for clip in find_clips(dataset)]
    probes, ctx = Probes(folder.root), folder.ctx
    shares = ctx.gather_objects(
        plan_clips(clips[ctx.rank :: ctx.world], probes, target_fps=fps, workers=workers)
    )
    new = ctx.gather_objects(probes.new)
    if ctx.is_main and any(new):
        for part in new:
            probes.seen |= part
        write_text(folder.root / PROBES, json.dumps(probes.seen))
    return [shares[i % ctx.world][i // ctx.world] for i in range(len(clips))]


def _usable(
    found: Sequence[Sequence[PlannedSample | Rejected]], root: Path, *, asked: Container[str], strict: bool
) -> tuple[list[PlannedSample], list[Rejected]]:
    """The samples, and what is refused: with a digest, one of the samples that an
    earlier run could not encode."""
    refused = [row for rows in found for row in rows if isinstance(row, Rejected)]
    samples = without_doubles([row for rows in found for row in rows if isinstance(row, PlannedSample)])
    for column, lacks in (("control", lambda s: not s.controls), (MASK, lambda s: s.mask is None)):
        if column in asked:
            refused += [
                Rejected(str(s.clip.path), f"{s.clip.path}: has no {column}, and column '{column}' needs one")
                for s in samples if lacks(s)
            ]
            samples = [s for s in samples if not lacks(s)]
    known = {row.digest: row for row in read_rejected(root) if row.digest}
    hopeless = [known[s.state] for s in samples if s.state in known]
    refused += hopeless
    if refused and strict:
        raise DataError(
            f"{refused[0].reason} (strict; {len(refused)} cannot be used, `hvtrain data check` lists them)"
        )
    if len(hopeless) == len(samples):
        raise DataError(f"no sample can be made of this dataset; the first reason: {refused[0].reason}")
    return samples, refused


# --- encoding -----------------------------------------------------------------------------------------------


def _columns(
    folder: Folder, kinds: Sequence[ColumnKind], old: Mapping[str, Made], tools: Tools,
    chunks: list[PlannedChunk], known: Known, *, strict: bool,
) -> tuple[list[Filled], list[PlannedChunk], list[Rejected]]:
    """Each column; what is left of the chunks, and which samples of all ranks could not be made. `old`: what
    made the columns that are not encoded now."""
    ctx, rejected = folder.ctx, []
    mine = share_out(chunks, rank=ctx.rank, world=ctx.world)

    def refuse(row: Rejected) -> None:
        if strict:
            raise DataError(f"{row.reason} (strict)")
        rejected.append(row)
        note(folder.file(f".{REJECTED}"), row.row())

    meter = Meter(
        folder.root, rank=ctx.rank, world=ctx.world, samples=sum(len(c.samples) for c in chunks) * len(kinds),
        cost=sum(c.cost for c in chunks) * len(kinds),
    )
    filled: list[Filled] = []
    try:
        for kind in kinds:
            meter.column = kind.name
            if kind.name in old:
                made, encode = old[kind.name], copier(kind.name, folder.root)
            else:
                made, encode = (
                    _open(folder, kind, tools, [chunks[n] for n in mine if chunks[n].samples], known)
                )
            writer = ColumnWriter(
                kind, folder.root, made.fingerprint, encode, known, folder.file(JOURNAL), refuse
            )
            filled.append(
                Filled(kind, made, {n: writer.write(chunks[n], meter.advance) for n in mine}, writer.tally)
            )
            del encode, writer
            gc.collect()  # one encoder in memory at a time
            lost = {key for part in ctx.gather_objects(filled[-1].lost(chunks)) for key in part}
            chunks = [c.without(lost) for c in chunks]
    finally:
        meter.close()
    return filled, chunks, [row for part in ctx.gather_objects(rejected) for row in part]


def _open(
    folder: Folder, kind: ColumnKind, tools: Tools, chunks: Sequence[PlannedChunk], known: Known
) -> tuple[Made, Encode]:
    """The column's encoder. It is not loaded if no rank would use it. `chunks`: this rank's."""
    root, spec, model = folder.root, tools.spec, tools.model
    signed = signature(files_of(spec, model, kind.name), kind.settings(tools))
    name = remembered(root, kind.name, signed)
    missing = name is None or any(known.entry(kind.tar_name(c, name)) is None for c in chunks)
    missing = missing or (kind.pictures is None and not (root / EMPTY_TEXT).is_file())
    encode = copier(kind.name, root)
    if folder.ctx.any(missing):  # asked of all: the ranks go on together
        encoder = kind.open(kind, tools)
        encode, name = encoder.encode, encoder.fingerprint
        if folder.ctx.is_main:
            if encoder.empty is not None:
                _save_empty(root, encoder.empty())
            remember(root, kind.name, signed, name)
    parts = tuple(n for n, part in spec.parts.items() if kind.name in part.makes and model.file(n))
    return Made(str(name), spec.name, parts), encode


def _save_empty(root: Path, fields: Fields | str) -> None:
    if isinstance(fields, str):
        raise DataError(fields)
    with atomic_path(root / EMPTY_TEXT) as temporary:
        save_file(fields, str(temporary))
