"""`hvtrain encode`: clips and captions into a shard set, on all ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.config import EncodeConfig
from hvtrain.config.rules import check_encode
from hvtrain.errors import DataError
from hvtrain.parallel.context import ParallelContext, shutdown, start

COLUMNS = ("latents", "image", "control", "text")  # in this order: what cannot be decoded is known before text is encoded


@dataclass
class _Job:
    """A run on one rank."""

    cfg: EncodeConfig
    ctx: ParallelContext
    root: Path
    spec: Any
    chunks: list = field(default_factory=list)  # of all ranks
    mine: list[int] = field(default_factory=list)
    encoders: dict[str, str] = field(default_factory=dict)
    written: dict[str, dict[int, Any]] = field(default_factory=dict)  # column -> chunk number -> Written
    rejected: list = field(default_factory=list)  # by this rank, while encoding

    @property
    def file(self) -> Callable[[str], Path]:
        """This rank's own file of a kind."""
        return lambda name: self.root / f"{name}.{self.ctx.rank}"


def run(cfg: EncodeConfig, ctx: ParallelContext | None = None) -> None:
    """Encode what is missing and write the manifest."""
    check_encode(cfg)
    from hvtrain.models import find

    own = ctx is None
    ctx = ctx or start()
    job = _Job(cfg, ctx, Path(cfg.output), find(cfg.model.name))
    _claim(job)
    refused = _plan(job)
    summary = _columns(job)
    _finish(job, refused, summary)
    if own:
        shutdown()


# --- planning ---------------------------------------------------------------------------------------------------------


def _plan(job: _Job) -> list:
    """Look at every file, each rank at its share; cut the samples into tars. Returns what was refused."""
    from hvtrain.encode.clips import Rejected, find_clips
    from hvtrain.encode.columns import read_rejected
    from hvtrain.encode.dataset import read_dataset_file
    from hvtrain.encode.encoders import rejected
    from hvtrain.encode.samples import Probes, cut_chunks, plan_clips, share_out, without_doubles

    cfg, ctx = job.cfg, job.ctx
    flavor = job.spec.flavor(cfg.model.flavor) if cfg.model.flavor else next(iter(job.spec.flavors.values()))
    clips = [clip for dataset in read_dataset_file(cfg.dataset) for clip in find_clips(dataset)]
    probes = Probes(job.root)
    mine = plan_clips(clips[ctx.rank :: ctx.world], probes, target_fps=flavor.defaults.fps, workers=cfg.workers)
    shares = ctx.gather_objects(mine)
    _save_probes(probes, ctx)
    found = [row for i in range(len(clips)) for row in shares[i % ctx.world][i // ctx.world]]
    refused = [row for row in found if isinstance(row, Rejected)]
    samples = without_doubles([row for row in found if not isinstance(row, Rejected)])
    if "control" in cfg.columns:
        bare = [s for s in samples if not s.controls]
        refused += [Rejected(str(s.clip.path), f"{s.clip.path}: has no control, and column 'control' needs one") for s in bare]
        samples = [s for s in samples if s.controls]
    known = {row.digest: row for row in read_rejected(job.root) if row.digest}
    hopeless = {s.key: known[r.digest] for s in samples if (r := rejected(s, "")).digest in known}
    refused += hopeless.values()
    _judge(job, refused, n_samples=len(samples) - len(hopeless))
    # Cut before the hopeless leave: one that turns out bad later does not move the others to other tars.
    job.chunks = [c.without(set(hopeless)) for c in cut_chunks(samples, samples_per_tar=cfg.samples_per_tar)]
    job.mine = share_out(job.chunks, rank=ctx.rank, world=ctx.world)
    if ctx.is_main:
        n = sum(len(c.samples) for c in job.chunks)
        print(f"{len(clips)} clips, {n} samples in {len(job.chunks)} tars, {ctx.world} process(es)", flush=True)
    return refused


def _judge(job: _Job, refused: Sequence, *, n_samples: int) -> None:
    if refused and job.cfg.strict:
        raise DataError(f"{refused[0].reason} (strict; {len(refused)} cannot be used, `hvtrain data check` lists them)")
    if not n_samples:
        raise DataError(f"no sample can be made of this dataset; the first reason: {refused[0].reason}")


def _save_probes(probes: Any, ctx: ParallelContext) -> None:
    import json

    from shards.atomic import write_text

    new = ctx.gather_objects(probes.new)
    if ctx.is_main and any(new):
        for part in new:
            probes.seen |= part
        write_text(probes.path, json.dumps(probes.seen))


# --- encoding ---------------------------------------------------------------------------------------------------------


def _columns(job: _Job) -> str:
    """Write each column; a summary."""
    from hvtrain.encode.columns import JOURNAL, REJECTED, ColumnWriter, Known, copier, note
    from hvtrain.encode.progress import Meter

    cfg, ctx, root = job.cfg, job.ctx, job.root
    known = Known(root)
    others = [c for c in (known.manifest.columns if known.manifest else ()) if c not in cfg.columns]
    columns = sorted([*cfg.columns, *others], key=COLUMNS.index)
    total = [c for c in job.chunks if c.samples]
    meter = Meter(
        root, rank=ctx.rank, world=ctx.world, samples=sum(len(c.samples) for c in total) * len(columns),
        cost=sum(c.cost for c in total) * len(columns),
    )

    def refuse(row: Any) -> None:
        if cfg.strict:
            raise DataError(f"{row.reason} (strict)")
        job.rejected.append(row)
        note(job.file(f".{REJECTED}"), row.row())

    parts, n_new = [], 0
    try:
        for column in columns:
            if column in others:
                assert known.manifest is not None
                encode, job.encoders[column] = copier(column, root), known.manifest.encoders[column]
            else:
                encode, job.encoders[column] = _open(job, column, known)
            writer = ColumnWriter(
                column, root, job.encoders[column], encode, known, job.file(JOURNAL), refuse
            )
            meter.column = column
            job.written[column] = {n: writer.write(job.chunks[n], meter.advance) for n in job.mine}
            t = writer.tally
            counts = [int(ctx.all_reduce_sum(n)) for n in (t.encoded, t.copied, t.kept)]
            parts.append(f"{column}: {counts[0]} encoded, {counts[1]} copied, {counts[2]} kept")
            n_new += counts[0] + counts[1]
            lost = {key for part in ctx.gather_objects(_lost(job, column)) for key in part}
            job.chunks = [c.without(lost) for c in job.chunks]
            for column_before, rows in job.written.items():
                shrinker = ColumnWriter(
                    column_before, root, job.encoders[column_before], encode, known, job.file(JOURNAL), refuse
                )
                job.written[column_before] = {n: shrinker.shrink(w, job.chunks[n]) for n, w in rows.items()}
            del encode, writer
            gc.collect()  # one encoder in memory at a time
    finally:
        meter.close()
    return ("" if n_new else "nothing to do, all of it was there; ") + "; ".join(parts)


def _lost(job: _Job, column: str) -> list[str]:
    """Samples of this rank that the column could not make."""
    return [
        s.key
        for number, written in job.written[column].items()
        for s in job.chunks[number].samples
        if s.key not in {w.key for w in written.samples}
    ]


def _open(job: _Job, column: str, known: Any) -> tuple[Callable, str]:
    """The column's encoder and its fingerprint. It is not loaded if no rank would use it."""
    from hvtrain.encode.columns import copier
    from hvtrain.encode.identity import remember, remembered, signature
    from hvtrain.models.parts import files_of
    from shards.schema import EMPTY_TEXT

    cfg, m = job.cfg, job.cfg.model
    files = files_of(job.spec, m, column)
    if column == "text":
        signed = signature(files, (m.fp8_text, m.dtype, cfg.dtype))
    else:
        signed = signature(files, (m.vae_dtype, m.vae_tiling, cfg.dtype, cfg.seed))
    name = remembered(job.root, column, signed)
    chunks = [job.chunks[n] for n in job.mine if job.chunks[n].samples]
    missing = name is None or any(known.entry(c.tar_name(column, name)) is None for c in chunks)
    missing = missing or (column == "text" and not (job.root / EMPTY_TEXT).is_file())
    if not job.ctx.any(missing):  # asked of all: the ranks go on together
        return copier(column, job.root), str(name)
    encode, name = _OPENERS[column](job)
    if job.ctx.is_main:
        remember(job.root, column, signed, name)
    return encode, name


def _open_pixels(column: str) -> Callable[[_Job], tuple[Callable, str]]:
    def open_column(job: _Job) -> tuple[Callable, str]:
        import torch

        from hvtrain.encode.encoders import PixelEncoder
        from hvtrain.models.parts import open_vae

        cfg = job.cfg
        vae = open_vae(job.spec, cfg.model, job.ctx.device)
        encoder = PixelEncoder(column, vae, getattr(torch, cfg.dtype), cfg.batch_size, cfg.workers, cfg.seed)
        return encoder, f"{vae.fingerprint}/{cfg.dtype}/{cfg.seed}"

    return open_column


def _open_text(job: _Job) -> tuple[Callable, str]:
    import torch
    from safetensors.torch import save_file

    from hvtrain.encode.encoders import TextEncoder
    from hvtrain.models.parts import open_text
    from shards.atomic import atomic_path
    from shards.schema import EMPTY_TEXT

    cfg = job.cfg
    text = open_text(job.spec, cfg.model, job.ctx.device)
    encoder = TextEncoder(text, getattr(torch, cfg.dtype))
    if job.ctx.is_main:
        empty = encoder.stored(text.encode([""])[0], "")
        if isinstance(empty, str):
            raise DataError(empty)
        with atomic_path(job.root / EMPTY_TEXT) as temporary:
            save_file(empty, str(temporary))
    return encoder, f"{text.fingerprint}/{cfg.dtype}"


_OPENERS: dict[str, Callable[[_Job], tuple[Callable, str]]] = {
    **{column: _open_pixels(column) for column in COLUMNS if column != "text"}, "text": _open_text,
}


# --- the directory ----------------------------------------------------------------------------------------------------


def _claim(job: _Job) -> None:
    """Refuse a directory that holds other things; remove what a killed run left half-written."""
    from hvtrain.encode.columns import REJECTED
    from hvtrain.encode.progress import PROGRESS
    from shards.schema import EMPTY_TEXT, MANIFEST

    problem, root = None, job.root
    if job.ctx.is_main:
        known = {MANIFEST, EMPTY_TEXT, REJECTED, *_OPENERS}
        if root.exists() and not root.is_dir():
            problem = f"output: {root} is a file; give a directory"
        here = [p.name for p in root.iterdir()] if root.is_dir() else []
        strangers = [name for name in here if name not in known and not name.startswith(".")]
        if strangers:
            problem = f"output: {root} holds other files ('{sorted(strangers)[0]}'); choose an empty or new directory"
        if problem is None:
            try:
                root.mkdir(parents=True, exist_ok=True)
                for left in [*root.glob(".*.tmp"), *root.glob("*/.*.tmp"), *root.glob(f"{PROGRESS}.*")]:
                    left.unlink()
            except OSError as error:
                problem = f"output: {root} cannot be written ({error.strerror})"
    problem = job.ctx.gather_objects(problem)[0]
    if problem:
        raise DataError(problem)


def _finish(job: _Job, refused: list, summary: str) -> None:
    """Write the manifest, then remove the tars that only the runs before it made."""
    from hvtrain.encode.columns import JOURNAL, REJECTED, Known, open_again
    from shards.atomic import write_text
    from shards.writer import remove_tar

    ctx, root = job.ctx, job.root
    everyone = ctx.gather_objects(job.written)
    refused += [row for part in ctx.gather_objects(job.rejected) for row in part]
    if ctx.is_main:
        written = {c: {n: w for part in everyone for n, w in part[c].items()} for c in job.encoders}
        before = set(Known(root).tars)
        names = _save(job, written)
        write_text(root / REJECTED, "".join(row.row() + "\n" for row in refused))
        for name in before - names:
            remove_tar(root / name)
        for left in [*root.glob(f"{JOURNAL}.*"), *root.glob(f".{REJECTED}.*")]:
            left.unlink()
        if not refused:
            (root / REJECTED).unlink()
        print(f"{root}: {open_again(root)} samples; {summary}", flush=True)
        if refused:
            print(f"{len(refused)} not usable, see {root / REJECTED}; the first: {refused[0].reason}", flush=True)
    ctx.barrier()


def _save(job: _Job, written: dict[str, dict[int, Any]]) -> set[str]:
    """The manifest of all columns; the names of its tars."""
    from hvtrain.encode.samples import dataset_hash
    from shards.schema import Chunk, Manifest, save_manifest

    rows = []
    for number, chunk in enumerate(job.chunks):
        if not chunk.samples:
            continue
        first, keys = chunk.samples[0], tuple(s.key for s in chunk.samples)
        tars = {column: found[number].tar for column, found in written.items()}
        rows.append(Chunk(chunk.bucket, keys, tars, first.repeats, first.caption_dropout))
    if not rows:
        raise DataError(f"every sample was refused; the first reason: {job.rejected[0].reason if job.rejected else 'see above'}")
    every = [s for c in job.chunks for s in c.samples]
    save_manifest(job.root, Manifest(tuple(written), tuple(rows), job.encoders, dataset_hash(every, job.encoders)))
    return {tar.path for row in rows for tar in row.tars.values()}
