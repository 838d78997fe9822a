"""The loader over real sets: any ranks, any workers, URLs, several captions, a million samples."""

import itertools
import time
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import ShardError, open_set
from shards.loader import BatchLoader
from shards.order import epoch_order, stream
from shards.reader import Sample, ShardSet
from shards.schema import Chunk, Manifest, TarFile, load_manifest, save_manifest
from shards.verify import verify
from tests.shards.sets import make_set


class Numbers(ShardSet):
    """A set whose samples are their own index: the manifest is real, the tars are not."""

    def __init__(self, root):
        super().__init__(root)

    def get(self, index, columns=None):
        chunk, key = self.place(index)
        return Sample(key, {"latents": torch.tensor([index])}, {"bucket": chunk.bucket})


chunks = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=chunks, batch=st.integers(1, 4), dp=st.sampled_from([1, 2, 3, 4, 7]), workers=st.integers(0, 4),
    seed=st.integers(0, 9), cursor=st.integers(0, 40),
)
def test_every_key_once_per_epoch_for_random_manifests(tmp_path, rows, batch, dp, workers, seed, cursor):
    manifest = Manifest(("latents",), tuple(
        Chunk(bucket, tuple(f"k{i}_{j}" for j in range(n)), {}, repeats) for i,
        (bucket, n, repeats) in enumerate(rows)
    ))
    save_manifest(tmp_path, manifest)
    found = Numbers(tmp_path)
    n = manifest.n_samples
    options = {"batch_size": batch, "dp_size": dp, "seed": seed, "workers": workers}

    def global_order(start, n_rounds):
        """Samples in the order of the stream, how far the cursor went by each round, the keys
        of each rank in each round."""
        ranks = [iter(BatchLoader(found, dp_rank=r, cursor=start, **options)) for r in range(dp)]
        order, cursors, rounds = [], [], []
        for _ in range(n_rounds):
            around = [next(rank) for rank in ranks]
            assert len({(b.cursor, b.epoch) for b in around}) == 1
            assert all(len({m["bucket"] for m in b.meta}) == 1 for b in around)
            order += [int(i) for b in around for i in b.tensors["latents"]]
            cursors.append(around[0].cursor - start)
            rounds.append([b.keys for b in around])
        for rank in ranks:
            rank.close()
        return order, cursors, rounds

    order, cursors, rounds = global_order(0, 2 * n // dp + 2)
    # samples that all ranks together took, round by round
    each = [sum(map(len, around)) for around in rounds]
    assert cursors == list(itertools.accumulate(each)) and cursors[-1] == len(order)
    for epoch in range(len(order) // n):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    # Continued at any cursor, on another number of ranks: the same stream.
    one = BatchLoader(found, batch_size=batch, seed=seed, cursor=cursor)
    rest = [int(i) for b in itertools.islice(one, 4) for i in b.tensors["latents"]]
    whole = [
        int(i) for b in itertools.islice(BatchLoader(found, batch_size=batch, seed=seed), 50)
        for i in b.tensors["latents"]
    ]
    assert rest == whole[cursor : cursor + len(rest)]


def test_each_rank_takes_its_own_turns_whoever_reads_ahead(tmp_path):
    """Rank r of n has micro-batches r, r + n, ...: sequence-parallel peers, which share a
    dp_rank, have the same, others not."""
    found = make_set(tmp_path)
    groups = found.groups()
    everyone = [m.samples for m in itertools.islice(stream(groups, batch_size=2, seed=1), 18)]
    for rank in range(3):
        wanted = [tuple(found.keys[i] for i in samples) for samples in everyone[rank::3]]
        for workers in (0, 3):
            loader = BatchLoader(found, batch_size=2, dp_rank=rank, dp_size=3, seed=1, workers=workers)
            assert [b.keys for b in itertools.islice(loader, 6)] == wanted


@pytest.mark.parametrize("dp", [1, 2])
def test_processes_read_what_threads_read(tmp_path, dp):
    found = make_set(tmp_path, sizes=((5, 3), (4, 5)))
    options = {"batch_size": 2, "dp_rank": dp - 1, "dp_size": dp, "seed": 2, "cursor": 3}
    threads = itertools.islice(BatchLoader(found, workers=2, **options), 9)
    processes = BatchLoader(found, workers=2, worker_type="process", **options)
    for a, b in zip(threads, processes, strict=False):
        assert a.keys == b.keys and a.cursor == b.cursor and a.epoch == b.epoch
        assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert processes.state() == a.cursor


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"workers": 1, "worker_type": "process"}])
def test_only_the_columns_asked_for_are_read(tmp_path, options):
    """Those that a set has: one that is optional may be in one set and not in another. The
    other's tar is not even opened."""
    found = make_set(tmp_path)
    for chunk in found.manifest.chunks:
        text = tmp_path / chunk.tars["text"].path
        text.write_bytes(bytes(text.stat().st_size))
    loader = BatchLoader(found, batch_size=2, columns=("latents", "image"), **options)
    assert set(next(iter(loader)).tensors) == {"latents"}
    with pytest.raises(ShardError):
        next(iter(BatchLoader(found, batch_size=2, **options)))


def test_batches_are_the_samples(tmp_path):
    found = make_set(tmp_path)
    batch = next(iter(BatchLoader(found, batch_size=3, seed=1, workers=1)))
    for row, key in enumerate(batch.keys):
        sample = found.get(found.keys.index(key))
        assert torch.equal(batch.tensors["latents"][row], sample.tensors["latents"])


def test_a_url_reads_like_a_directory(tmp_path):
    local = make_set(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/bucket/set", recursive=True)
    remote = open_set("memory://bucket/set")
    assert remote.keys == local.keys
    for a, b in zip(map(local.get, range(5)), map(remote.get, range(5))):
        assert a.meta == b.meta and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert torch.equal(remote.empty_text["pooled"], local.empty_text["pooled"])
    one = [b.keys for b in itertools.islice(BatchLoader(local, batch_size=2, seed=3), 6)]
    assert one == [b.keys for b in itertools.islice(BatchLoader(remote, batch_size=2, seed=3, workers=2), 6)]
    # Damage and absence are named by their address.
    data = bytearray(memory.cat_file("/bucket/set/latents/000000.tar"))
    at = remote.tar(remote.manifest.chunks[0], "latents").members["clip0_0.safetensors"]
    data[at.offset + at.size - 1] ^= 1
    memory.pipe_file("/bucket/set/latents/000000.tar", bytes(data))
    with pytest.raises(ShardError, match=r"memory://bucket/set/latents/000000\.tar: clip0_0.*damaged"):
        open_set("memory://bucket/set").get(0)  # checksums are compared when a sample is read first
    with pytest.raises(ShardError, match="no such file"):
        open_set("memory://bucket/nothing")
    with pytest.raises(ShardError, match="cannot be opened"):
        open_set("nonsense://bucket/set")


def test_a_caption_is_drawn_per_epoch(tmp_path):
    from shards.schema import EMPTY_TEXT
    from shards.writer import write_tar

    keys = tuple(f"k{i}" for i in range(40))
    fields = {"text": torch.zeros(2, 4), "text.1": torch.ones(3, 4), "text.2": torch.full((1, 4), 2.0)}
    meta = {"caption": "c0", "captions": ["c0", "c1", "c2"]}
    tar = write_tar(tmp_path, "text/0.tar", [(k, fields, meta) for k in keys])
    save_manifest(tmp_path, Manifest(("text",), (Chunk("b", keys, {"text": tar}, caption_dropout=0.5),)))
    assert not (tmp_path / EMPTY_TEXT).exists()

    def epochs(n, **options):
        drawn = {}
        for batch in itertools.islice(
            BatchLoader(open_set(tmp_path), batch_size=1, seed=4, **options), 40 * n
        ):
            (m,), key = batch.meta, batch.keys[0]
            assert m["caption_dropout"] == 0.5 and set(batch.tensors) == {"text", "text_len"}
            assert batch.tensors["text"][0, 0, 0] == int(m["caption"][1])
            drawn.setdefault(key, []).append(m["caption"])
        return drawn

    drawn = epochs(3)
    flat = [c for captions in drawn.values() for c in captions]
    assert {c: flat.count(c) > 20 for c in ("c0", "c1", "c2")} == dict.fromkeys(("c0", "c1", "c2"), True)
    assert any(len(set(captions)) > 1 for captions in drawn.values())
    assert drawn == epochs(3, workers=3)


def test_a_million_samples_open_fast_and_small(tmp_path):
    """The bar: under 3 s and 600 MB for the manifest, 1 s more for the first batch. Times
    here are generous: CI is busy."""
    import tracemalloc

    def chunk(c):
        names = {column: f"{column}/33x544x960-{c:016x}.tar" for column in ("latents", "text")}
        tars = {column: TarFile(name, 2_200_000_000, "0" * 32, "0" * 16) for column, name in names.items()}
        return Chunk(
            f"33x{544 + 16 * (c % 7)}x960",
            tuple(f"a-rather-long-clip-name-{c:04d}-{i:012x}" for i in range(500)), tars
        )

    big = Manifest(("latents", "text"), tuple(map(chunk, range(2000))))
    save_manifest(tmp_path, big)
    begun = time.perf_counter()
    assert load_manifest(tmp_path) == big
    del big
    tracemalloc.start()
    found = Numbers(tmp_path)
    opened = time.perf_counter()
    batch = next(iter(BatchLoader(found, batch_size=4, dp_rank=3, dp_size=8, seed=1)))
    first = time.perf_counter()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1_000_000 and len(batch.keys) == 4
    assert peak < 600e6, f"{peak / 1e6:.0f} MB"
    assert opened - begun < 60 and first - opened < 30


def test_the_order_is_the_same_on_every_machine():
    """Written down once: an order that changed would break every resume."""
    groups = {"a": np.arange(5), "b": np.arange(5, 8)}
    order = epoch_order(groups, batch_size=2, seed=7, epoch=3)
    assert [order.batch(i) for i in range(len(order.starts))] == EXPECTED


EXPECTED = [(2, 0), (3,), (4, 1), (6, 7), (5,)]


def test_verify_needs_a_directory(tmp_path):
    assert any("no such file" in f or "copy the set" in f for f in verify("memory://nowhere"))


def test_a_key_that_repeats_is_one_key(tmp_path):
    found = make_set(tmp_path, sizes=((2, 3),))
    (chunk,) = found.manifest.chunks
    save_manifest(tmp_path, replace(found.manifest, chunks=(replace(chunk, repeats=3),)))
    found = open_set(tmp_path)
    assert len(found) == 6 and found.manifest.n_keys == 2 and found.keys == ["clip0_0", "clip0_1"] * 3
