"""`hvtrain encode`: clips and captions into a shard set, on all ranks."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from hvtrain.config import EncodeConfig
from hvtrain.config.rules import check_encode
from hvtrain.encode.clips import Rejected, find_clips
from hvtrain.encode.columns import ColumnKind, Encoder, Tools, columns_of, kind_of
from hvtrain.encode.dataset import Dataset, read_dataset_file
from hvtrain.encode.encoders import Fields
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
from hvtrain.encode.site import Filled, Site, carried, claim, finish
from hvtrain.encode.writer import JOURNAL, REJECTED, ColumnWriter, Known, copier, note, read_rejected
from hvtrain.errors import DataError
from hvtrain.models import find
from hvtrain.models.parts import files_of
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
    own = ctx is None
    ctx = ctx or start()
    site = Site(Path(cfg.output), ctx)
    tools = Tools(spec, flavor, cfg.model, ctx.device, cfg.dtype, cfg.seed, cfg.batch_size, cfg.workers)

    claim(site, order)
    known = Known(site.root)
    kept = {name: kind_of(name, spec, flavor) for name in carried(site.root, known.manifest, asked, spec)}
    found = _look(site, datasets, fps=flavor.defaults.fps, workers=cfg.workers)
    samples, refused = _usable(found, site.root, needs_control="control" in asked, strict=cfg.strict)
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
    filled, chunks, rejected = _columns(site, kinds, old, tools, chunks, known, strict=cfg.strict)
    refused += rejected
    counts = [[int(ctx.all_reduce_sum(n)) for n in (f.tally.encoded, f.tally.copied, f.tally.kept)] for f in filled]
    n = finish(site, filled, chunks, refused)
    if ctx.is_main:
        rest = "" if any(n[0] + n[1] for n in counts) else "nothing to do, all of it was there; "
        rest += "; ".join(f"{f.kind.name}: {a} encoded, {b} copied, {c} kept" for f, (a, b, c) in zip(filled, counts))
        print(f"{site.root}: {n} samples; {rest}", flush=True)
        if refused:
            listed = site.root / REJECTED
            print(f"{len(refused)} not usable, see {listed}; the first: {refused[0].reason}", flush=True)
    if own:
        shutdown()


# --- planning ---------------------------------------------------------------------------------------------------------


def _look(
    site: Site, datasets: Sequence[Dataset], *, fps: float, workers: int
) -> list[list[PlannedSample | Rejected]]:
    """What each clip gives. Every rank opens its share of the files."""
    clips = [clip for dataset in datasets for clip in find_clips(dataset)]
    probes, ctx = Probes(site.root), site.ctx
    shares = ctx.gather_objects(plan_clips(clips[ctx.rank :: ctx.world], probes, target_fps=fps, workers=workers))
    new = ctx.gather_objects(probes.new)
    if ctx.is_main and any(new):
        for part in new:
            probes.seen |= part
        write_text(site.root / PROBES, json.dumps(probes.seen))
    return [shares[i % ctx.world][i // ctx.world] for i in range(len(clips))]


def _usable(
    found: Sequence[Sequence[PlannedSample | Rejected]], root: Path, *, needs_control: bool, strict: bool
) -> tuple[list[PlannedSample], list[Rejected]]:
    """The samples, and what is refused: with a digest, one of the samples that an earlier run could not encode."""
    refused = [row for rows in found for row in rows if isinstance(row, Rejected)]
    samples = without_doubles([row for rows in found for row in rows if isinstance(row, PlannedSample)])
    if needs_control:
        refused += [
            Rejected(str(s.clip.path), f"{s.clip.path}: has no control, and column 'control' needs one")
            for s in samples if not s.controls
        ]
        samples = [s for s in samples if s.controls]
    known = {row.digest: row for row in read_rejected(root) if row.digest}
    hopeless = [known[s.state] for s in samples if s.state in known]
    refused += hopeless
    if refused and strict:
        raise DataError(f"{refused[0].reason} (strict; {len(refused)} cannot be used, `hvtrain data check` lists them)")
    if len(hopeless) == len(samples):
        raise DataError(f"no sample can be made of this dataset; the first reason: {refused[0].reason}")
    return samples, refused


# --- encoding ---------------------------------------------------------------------------------------------------------


def _columns(
    site: Site, kinds: Sequence[ColumnKind], old: Mapping[str, Made], tools: Tools, chunks: list[PlannedChunk],
    known: Known, *, strict: bool,
) -> tuple[list[Filled], list[PlannedChunk], list[Rejected]]:
    """Each column; what is left of the chunks, and which samples of all ranks could not be made. `old`: what made the columns
    that are not encoded now."""
    ctx, rejected = site.ctx, []
    mine = share_out(chunks, rank=ctx.rank, world=ctx.world)

    def refuse(row: Rejected) -> None:
        if strict:
            raise DataError(f"{row.reason} (strict)")
        rejected.append(row)
        note(site.file(f".{REJECTED}"), row.row())

    meter = Meter(
        site.root, rank=ctx.rank, world=ctx.world, samples=sum(len(c.samples) for c in chunks) * len(kinds),
        cost=sum(c.cost for c in chunks) * len(kinds),
    )
    filled: list[Filled] = []
    try:
        for kind in kinds:
            meter.column = kind.name
            filled.append(_fill(site, kind, tools, old.get(kind.name), chunks, mine, known, meter.advance, refuse))
            lost = {key for part in ctx.gather_objects(filled[-1].lost(chunks)) for key in part}
            chunks = [c.without(lost) for c in chunks]
            gc.collect()  # one encoder in memory at a time
    finally:
        meter.close()
    return filled, chunks, [row for part in ctx.gather_objects(rejected) for row in part]


def _fill(
    site: Site, kind: ColumnKind, tools: Tools, old: Made | None, chunks: Sequence[PlannedChunk], mine: Sequence[int],
    known: Known, advance: Callable[[PlannedSample, bool], None], refuse: Callable[[Rejected], None],
) -> Filled:
    """This rank's part of a column."""
    if old is not None:
        made, encode = old, copier(kind.name, site.root)
    else:
        encoder = _open(site, kind, tools, [chunks[n] for n in mine if chunks[n].samples], known)
        parts = tuple(n for n, part in tools.spec.parts.items() if kind.name in part.makes and tools.model.file(n))
        made, encode = Made(encoder.fingerprint, tools.spec.name, parts), encoder.encode
    writer = ColumnWriter(kind, site.root, made.fingerprint, encode, known, site.file(JOURNAL), refuse)
    return Filled(kind, made, {n: writer.write(chunks[n], advance) for n in mine}, writer.tally)


def _open(site: Site, kind: ColumnKind, tools: Tools, chunks: Sequence[PlannedChunk], known: Known) -> Encoder:
    """The column's encoder. It is not loaded if no rank would use it. `chunks`: this rank's."""
    root = site.root
    signed = signature(files_of(tools.spec, tools.model, kind.name), kind.settings(tools))
    name = remembered(root, kind.name, signed)
    missing = name is None or any(known.entry(kind.tar_name(c, name)) is None for c in chunks)
    missing = missing or (kind.pictures is None and not (root / EMPTY_TEXT).is_file())
    if not site.ctx.any(missing):  # asked of all: the ranks go on together
        return Encoder(copier(kind.name, root), str(name))
    encoder = kind.open(kind, tools)
    if site.ctx.is_main:
        if encoder.empty is not None:
            _save_empty(root, encoder.empty())
        remember(root, kind.name, signed, encoder.fingerprint)
    return encoder


def _save_empty(root: Path, fields: Fields | str) -> None:
    if isinstance(fields, str):
        raise DataError(fields)
    with atomic_path(root / EMPTY_TEXT) as temporary:
        save_file(fields, str(temporary))
