"""shards: look at shard sets, check them, and make sets out of sets."""

from __future__ import annotations

import argparse
import sys

from hvtrain.errors import ConfigError
from launcher.table import GROUPS, command

GROUPS["shards"] = "look at shard sets, check them, and make sets out of sets"


def _one_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="directory of a shard set")


def _set_or_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", help="directory or URL of a shard set")


@command(
    "shards info", "what is in a set: samples, columns, buckets, fields", options=_set_or_url, prints=True
)
def _info(args: argparse.Namespace) -> None:
    from shards import info, open_set

    for line in info.lines(open_set(args.set)):
        print(line)


def _verify_options(parser: argparse.ArgumentParser) -> None:
    _one_set(parser)
    parser.add_argument(
        "--fast", action="store_true", help="leave out the search for NaN and infinite values"
    )


@command("shards verify", "read every byte: checksums, shapes, NaN, keys equal across columns",
         options=_verify_options, prints=True)
def _verify(args: argparse.Namespace) -> int:
    from hvtrain.progress import Bar
    from shards.verify import verify

    n, n_bytes = 0, 0

    def count(size: int) -> None:
        nonlocal n_bytes
        n_bytes += size
        bar.update(n_bytes, f"{n_bytes / 2**20:.0f} MiB")

    with Bar("reading", None, to=sys.stderr) as bar:
        for fault in verify(args.set, values=not args.fast, progress=count):
            print(fault, flush=True)
            n += 1
    if not n:
        from shards import open_set

        print(
            f"{args.set}: sound, {open_set(args.set).manifest.n_keys} samples, {n_bytes / 2**20:.0f} MiB read"
        )
    return 1 if n else 0


def _merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sets", nargs="+", metavar="SET", help="two or more shard sets")
    parser.add_argument("--output", required=True, metavar="DIR", help="the set to make")


@command(
    "shards merge", "several sets into one; tars are shared by hard links where the disk allows",
    options=_merge_options
)
def _merge(args: argparse.Namespace) -> None:
    from shards import edit

    if len(args.sets) < 2:
        raise ConfigError("shards merge: give two or more sets")
    found = edit.merge(args.sets, args.output)
    print(f"{args.output}: {found.manifest.n_keys} samples of {len(args.sets)} sets")


def _split_options(parser: argparse.ArgumentParser) -> None:
    _set_or_url(parser)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--n", type=int, metavar="N", help="N sets of equal size, every bucket dealt out evenly")
    about = (
        "a set per pattern (regular expression, case ignored), the first that matches; the others go to rest/"
    )
    how.add_argument("--caption", action="append", metavar="PATTERN", help=about)
    how.add_argument("--folder", action="store_true", help="a set per folder that the clips came from")
    parser.add_argument("--keep", type=int, default=0, metavar="N",
        help="with --caption: N samples of rest go to keep/, for `hvtrain merge --reconcile` (what the base "
        "knows already)")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets 01/, 02/, ... and split.json")


@command("shards split", "one set into several: how slices get their data", options=_split_options)
def _split(args: argparse.Namespace) -> None:
    from shards import edit, ways

    if args.n is not None:
        rule = ways.by_number(args.n)
    else:
        rule = ways.by_folder() if args.folder else ways.by_caption(args.caption)
    for part in edit.split(args.set, args.output, rule, keep=args.keep):
        print(f"{args.output}/{part.name}: {part.samples} samples, {part.rule}")


def _index_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "set", metavar="DIR", help="directory with a folder of tars per column: latents/, text/, ..."
    )
    parser.add_argument(
        "--model", metavar="NAME", help="whose columns they are: its record says which fields vary in length"
    )


@command(
    "shards index", "write the manifest of tars that another program (webdataset) made",
    options=_index_options
)
def _index(args: argparse.Namespace) -> None:
    from shards import edit

    if args.model is None:
        found = edit.index(args.set)
    else:
        from hvtrain.models import find

        flavors = find(args.model, key="--model").flavors.values()
        ragged = {field.name for flavor in flavors for field in flavor.cond if field.ragged}
        found = edit.index(args.set, ragged=ragged, model=args.model)
    print(f"{args.set}: {found.manifest.n_keys} samples in {len(found.manifest.chunks)} tars a column")


def _export_options(parser: argparse.ArgumentParser) -> None:
    _set_or_url(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="gets KEY.safetensors")


@command(
    "shards export", "every sample as a plain safetensors file, captions in its header",
    options=_export_options
)
def _export(args: argparse.Namespace) -> None:
    from shards import edit

    print(f"{args.output}: {edit.export(args.set, args.output)} files")


def _import_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "caches", nargs="+", metavar="DIR",
        help="musubi-tuner cache directories (latents and text encoder outputs)"
    )
    add("--output", required=True, metavar="DIR", help="the set to make")
    add("--model", default=None, metavar="NAME", help="architecture (default: what the files say)")
    add(
        "--flavor", default=None, metavar="NAME",
        help="its flavor (default: the first that reads all columns of the caches)"
    )
    add(
        "--samples-per-tar", type=int, default=512, metavar="N",
        help="samples after which a tar is closed (default: 512)"
    )
    add("--strict", action="store_true", help="stop at the first cache file that cannot be used")


@command("shards import-musubi", "musubi-tuner's latent and text caches into a set", options=_import_options)
def _import(args: argparse.Namespace) -> None:
    from hvtrain.encode import musubi

    if args.samples_per_tar < 1:
        raise ConfigError(f"--samples-per-tar {args.samples_per_tar}: expected 1 or more")
    for line in musubi.run(
        args.caches, args.output, model=args.model, flavor=args.flavor, samples_per_tar=args.samples_per_tar,
        strict=args.strict
    ):
        print(line)
