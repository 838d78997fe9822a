"""The format: readable by others, exactly once in any layout, refused when damaged or hostile."""

import io
import json
import subprocess
import tarfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import ShardError, open_set
from shards.loader import BatchLoader
from shards.order import stream
from shards.reader import open_tar
from shards.schema import Chunk, Manifest, save_manifest
from shards.verify import verify
from shards.writer import write_tar


def make_set(root, *, sizes=((3, 5), (2, 4)), seed=0):
    """A set with one chunk per (samples, latent width)."""
    g = torch.Generator().manual_seed(seed)
    chunks = []
    for c, (n, width) in enumerate(sizes):
        keys = tuple(f"clip{c}_{i}" for i in range(n))
        latents = [(k, {"latents": torch.randn(2, 1, 2, width, generator=g).bfloat16()}, {"key": k}) for k in keys]
        text = [(k, {"text": torch.randn(i + 1, 4, generator=g), "pooled": torch.ones(3)}, {"caption": k})
                for i, k in enumerate(keys)]
        tars = {name: write_tar(root, f"{name}/{c:06d}.tar", rows) for name, rows in (("latents", latents), ("text", text))}
        chunks.append(Chunk(f"1x2x{width}", keys, tars))
    save_manifest(root, Manifest(("latents", "text"), tuple(chunks)))
    return open_set(root)


def test_round_trip_and_collate(tmp_path):
    found = make_set(tmp_path)
    assert len(found) == 5 and list(verify(tmp_path)) == []
    batch = next(iter(BatchLoader(found, batch_size=3, seed=1)))
    order = [found.get(found.keys.index(k)) for k in batch.keys]
    assert torch.equal(batch.tensors["latents"], torch.stack([s.tensors["latents"] for s in order]))
    for row, n, sample in zip(batch.tensors["text"], batch.tensors["text_len"], order):
        assert torch.equal(row[:n], sample.tensors["text"]) and not row[n:].any()


def test_other_tools_read_it(tmp_path):
    make_set(tmp_path)
    names = subprocess.run(["tar", "tf", tmp_path / "text/000000.tar"], capture_output=True, text=True, check=True).stdout
    assert names.split() == [f"clip0_{i}.{kind}" for i in range(3) for kind in ("safetensors", "json")]
    import webdataset

    rows = list(webdataset.WebDataset(str(tmp_path / "latents/000000.tar"), shardshuffle=False))
    assert [r["__key__"] for r in rows] == ["clip0_0", "clip0_1", "clip0_2"]
    assert json.loads(rows[1]["json"]) == {"key": "clip0_1"}


def test_reads_webdataset_writer(tmp_path):
    import webdataset
    from safetensors.torch import save

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        sink.write({"__key__": "x", "safetensors": save({"latents": torch.arange(4.0)}), "json": {"caption": "c"}})
    tar = open_tar(tmp_path / "a.tar")
    assert torch.equal(tar.tensors("x")["latents"], torch.arange(4.0)) and tar.meta("x") == {"caption": "c"}


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), batch=st.integers(1, 5), ranks=st.sampled_from([1, 2, 3, 4, 7]),
    seed=st.integers(0, 99), cut=st.integers(0, 60),
)
def test_every_sample_once_per_epoch_on_any_ranks(counts, batch, ranks, seed, cut):
    buckets = [f"b{i}" for i, n in enumerate(counts) for _ in range(n)]
    n, order = len(buckets), []
    everyone = stream(buckets, batch_size=batch, seed=seed)
    while len(order) < 3 * n:
        micro = next(everyone)
        assert len({buckets[i] for i in micro.samples}) == 1 and micro.begin == len(order)
        order += micro.samples
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    resumed, again = stream(buckets, batch_size=batch, seed=seed, cursor=cut), []
    while len(again) < n:
        again += next(resumed).samples
    longer, full = stream(buckets, batch_size=batch, seed=seed), []
    while len(full) < cut + 2 * n + batch:
        full += next(longer).samples
    assert again == full[cut : cut + len(again)]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_workers_share_one_stream(tmp_path, ranks, workers):
    found = make_set(tmp_path, sizes=((7, 3), (4, 5)))

    def rounds(n, dp, cursor=0):
        loaders = [iter(BatchLoader(found, batch_size=2, dp_rank=r, dp_size=dp, seed=3, cursor=cursor, workers=workers))
                   for r in range(dp)]
        for _ in range(n):
            yield [next(loader) for loader in loaders]

    one = [key for (batch,) in rounds(24, 1) for key in batch.keys]
    got, cursor = [], 0
    for batches in rounds(6, ranks):
        assert len({(b.cursor, b.epoch) for b in batches}) == 1
        got += [key for b in batches for key in b.keys]
        cursor = batches[0].cursor
    assert got == one[: len(got)] and cursor == len(got)
    (resumed,) = next(rounds(1, 1, cursor))  # on another number of ranks
    assert list(resumed.keys) == one[cursor : cursor + len(resumed.keys)]


def test_a_flipped_byte_is_found(tmp_path):
    make_set(tmp_path)
    path = tmp_path / "latents/000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    assert any("latents/000001.tar" in line and "checksum" in line for line in verify(tmp_path))


def test_truncated_and_missing_tars_are_named(tmp_path):
    found = make_set(tmp_path)
    path = tmp_path / "text/000000.tar"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ShardError, match="text/000000.tar.*the manifest says"):
        found.get(0)
    path.unlink()
    with pytest.raises(ShardError, match="text/000000.tar.*missing"):
        found.get(1)


def hostile(path, *members):
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _link():
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([(tarfile.TarInfo("../a.json"), b"{}")], "points outside"),
        ([(tarfile.TarInfo("/a.json"), b"{}")], "points outside"),
        ([(_link(), b"")], "not a plain file"),
        ([(tarfile.TarInfo("a.json"), b"{}")] * 2, "twice"),
    ],
)
def test_hostile_tars_are_refused(tmp_path, members, says):
    hostile(tmp_path / "bad.tar", *members)
    with pytest.raises(ShardError, match=says):
        open_tar(tmp_path / "bad.tar")


def test_header_bomb_is_refused(tmp_path):
    hostile(tmp_path / "bomb.tar", (tarfile.TarInfo("a.safetensors"), (1 << 40).to_bytes(8, "little") + b"{}"))
    with pytest.raises(ShardError, match="header claims"):
        open_tar(tmp_path / "bomb.tar").tensors("a")


def test_not_a_set(tmp_path):
    with pytest.raises(ShardError, match="no shard set here"):
        open_set(tmp_path)
