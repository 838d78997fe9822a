"""`hvtrain encode`: clips and captions into a shard set, on all ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvtrain.config import EncodeConfig, asset
from hvtrain.errors import DataError
from hvtrain.parallel.context import ParallelContext, shutdown, start
from hvtrain.validate import check_encode


def run(cfg: EncodeConfig, ctx: ParallelContext | None = None) -> None:
    """Encode what is missing and write the manifest."""
    check_encode(cfg)
    from hvtrain.encode.dataset import find_clips, read_dataset_file
    from hvtrain.encode.plan import cut_chunks, plan_samples, without_doubles
    from hvtrain.models import find

    own = ctx is None
    ctx = ctx or start()
    root, spec = Path(cfg.output), find(cfg.model.name)
    flavor = spec.flavor(cfg.model.flavor) if cfg.model.flavor else next(iter(spec.flavors.values()))
    clips = [clip for dataset in read_dataset_file(cfg.dataset) for clip in find_clips(dataset)]
    samples = without_doubles(plan_samples(clips, target_fps=flavor.defaults.fps, workers=cfg.workers))
    _claim(root, ctx)
    chunks = cut_chunks(samples, samples_per_tar=cfg.samples_per_tar)
    short = len({c.path for c in clips}) - len({s.path for s in samples})
    if ctx.is_main:
        print(f"{len(clips)} clips, {len(samples)} samples in {len(chunks)} tars, {ctx.world} process(es)", flush=True)
        if short:
            print(f"warning: {short} clips are shorter than every target_frames and give no sample")
    tars, encoders, done = _columns(cfg, spec, root, chunks, ctx)
    if ctx.is_main:
        _finish(root, cfg.columns, chunks, tars, encoders)
        print(f"{root}: {len(samples)} samples; {done}", flush=True)
    ctx.barrier()
    if own:
        shutdown()


def _columns(
    cfg: EncodeConfig, spec: Any, root: Path, chunks: list, ctx: ParallelContext
) -> tuple[dict[str, Any], dict[str, str], str]:
    """Write each column; returns ({tar name: TarFile} of all ranks, fingerprints, a summary)."""
    from hvtrain.encode.pipeline import ColumnWriter, Meter, OldSamples
    from hvtrain.encode.plan import share_out

    mine, old = share_out(chunks, rank=ctx.rank, world=ctx.world), OldSamples(root)
    meter = Meter(sum(len(c.samples) for c in mine) * len(cfg.columns), show=ctx.is_main)
    made: dict[str, Any] = {}
    encoders: dict[str, str] = {}
    parts = []
    try:
        for column in cfg.columns:
            encode, encoders[column] = _OPENERS[column](cfg, spec, root, ctx)
            writer = ColumnWriter(column, root, encoders[column], encode, old)
            for chunk in mine:
                tar = writer.write(chunk, meter.advance)
                made[tar.path] = tar
            counts = [int(ctx.all_reduce_sum(n)) for n in (writer.tally.encoded, writer.tally.copied, writer.tally.kept)]
            parts.append(f"{column}: {counts[0]} encoded, {counts[1]} copied, {counts[2]} kept")
            del encode, writer
            gc.collect()  # one encoder in memory at a time
    finally:
        meter.close()
    everyone = {name: tar for part in ctx.gather_objects(made) for name, tar in part.items()}
    return everyone, encoders, "; ".join(parts)


def _open_latents(cfg: EncodeConfig, spec: Any, root: Path, ctx: ParallelContext) -> tuple[Callable, str]:
    import torch

    from hvtrain.encode.pipeline import LatentEncoder
    from hvtrain.generate.pipeline import open_decoder

    vae = open_decoder(cfg.model, spec, ctx)
    encoder = LatentEncoder(vae, getattr(torch, cfg.dtype), cfg.batch_size, cfg.workers, cfg.seed)
    return encoder, f"{vae.fingerprint}/{cfg.dtype}/{cfg.seed}"


def _open_text(cfg: EncodeConfig, spec: Any, root: Path, ctx: ParallelContext) -> tuple[Callable, str]:
    import torch
    from safetensors.torch import save_file

    from hvtrain.encode.pipeline import TextEncoder
    from shards.atomic import atomic_path
    from shards.schema import EMPTY_TEXT

    m = cfg.model
    text = spec.open_text(
        asset(m.llm or ""), m.llm_tokenizer and asset(m.llm_tokenizer), asset(m.clip or ""),
        m.clip_tokenizer and asset(m.clip_tokenizer), dtype=getattr(torch, m.dtype), device=ctx.device, fp8=m.fp8_llm,
    )
    encoder = TextEncoder(text, getattr(torch, cfg.dtype))
    if ctx.is_main:
        empty = encoder.stored(text.encode([""])[0], "")
        with atomic_path(root / EMPTY_TEXT) as temporary:
            save_file(empty, str(temporary))
    return encoder, f"{text.fingerprint}/{cfg.dtype}"


_OPENERS: dict[str, Callable] = {"latents": _open_latents, "text": _open_text}


def _claim(root: Path, ctx: ParallelContext) -> None:
    """Refuse a directory that holds other things; remove what a killed run left half-written."""
    from shards.schema import EMPTY_TEXT, MANIFEST

    problem = None
    if ctx.is_main:
        known = {MANIFEST, EMPTY_TEXT, *_OPENERS}
        here = [p.name for p in root.iterdir()] if root.exists() else []
        strangers = [name for name in here if name not in known and not name.startswith(".")]
        if strangers:
            problem = f"output: {root} holds other files ('{sorted(strangers)[0]}'); choose an empty or new directory"
        else:
            root.mkdir(parents=True, exist_ok=True)
            for left in [*root.glob(".*.tmp"), *root.glob("*/.*.tmp")]:
                left.unlink()
    problem = ctx.gather_objects(problem)[0]
    if problem:
        raise DataError(problem)


def _finish(root: Path, columns: tuple[str, ...], chunks: list, tars: dict[str, Any], encoders: dict[str, str]) -> None:
    """Write the manifest, then remove the tars that only the one before names."""
    from hvtrain.encode.plan import dataset_hash
    from shards.errors import ShardError
    from shards.schema import Chunk, Manifest, load_manifest, save_manifest

    try:
        before = {tar.path for c in load_manifest(root).chunks for tar in c.tars.values()}
    except ShardError:
        before = set()
    rows = tuple(
        Chunk(
            c.bucket, tuple(s.key for s in c.samples), {col: tars[c.tar_name(col, encoders[col])] for col in columns}, c.repeats
        )
        for c in chunks
    )
    every = [s for c in chunks for s in c.samples]
    save_manifest(root, Manifest(columns, rows, encoders, dataset_hash(every, encoders)))
    for name in before - set(tars):
        (root / name).unlink(missing_ok=True)
