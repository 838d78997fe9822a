"""The format: readable by others, exactly once in any layout, refused when damaged or hostile."""

import io
import itertools
import json
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import ShardError, open_set
from shards.loader import BatchLoader
from shards.order import stream
from shards.tar import open_local
from shards.verify import verify
from tests.shards.sets import make_set


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
    names = subprocess.run(
        ["tar", "tf", tmp_path / "text/000000.tar"], capture_output=True, text=True, check=True
    ).stdout
    assert names.split() == [f"clip0_{i}.{kind}" for i in range(3) for kind in ("safetensors", "json")]
    import webdataset

    rows = list(webdataset.WebDataset(str(tmp_path / "latents/000000.tar"), shardshuffle=False))
    assert [r["__key__"] for r in rows] == ["clip0_0", "clip0_1", "clip0_2"]
    assert json.loads(rows[1]["json"])["key"] == "clip0_1"


def test_reads_webdataset_writer(tmp_path):
    import webdataset
    from safetensors.torch import save

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        sink.write(
            {"__key__": "x", "safetensors": save({"latents": torch.arange(4.0)}), "json": {"caption": "c"}}
        )
    tar = open_local(tmp_path / "a.tar", None)
    assert torch.equal(tar.tensors("x")["latents"], torch.arange(4.0)) and tar.meta("x") == {"caption": "c"}


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), batch=st.integers(1, 5),
    ranks=st.sampled_from([1, 2, 3, 4, 7]), seed=st.integers(0, 99), cut=st.integers(0, 60),
)
def test_every_sample_once_per_epoch_on_any_ranks(counts, batch, ranks, seed, cut):
    ends = np.cumsum([0, *counts])
    groups = {f"b{i}": np.arange(a, b) for i, (a, b) in enumerate(itertools.pairwise(ends))}
    n, order = int(ends[-1]), []
    everyone = stream(groups, batch_size=batch, seed=seed)
    while len(order) < 3 * n:
        micro = next(everyone)
        assert len({next(b for b, m in groups.items() if i in m) for i in micro.samples}) == 1
        assert micro.begin == len(order) and micro.epoch == len(order) // n
        order += micro.samples
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    resumed, again = stream(groups, batch_size=batch, seed=seed, cursor=cut), []
    while len(again) < n:
        again += next(resumed).samples
    longer, full = stream(groups, batch_size=batch, seed=seed), []
    while len(full) < cut + 2 * n + batch:
        full += next(longer).samples
    assert again == full[cut : cut + len(again)]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_workers_share_one_stream(tmp_path, ranks, workers):
    found = make_set(tmp_path, sizes=((7, 3), (4, 5)))

    def rounds(n, dp, cursor=0):
        loaders = [
            iter(
                BatchLoader(
                    found, batch_size=2, dp_rank=r, dp_size=dp, seed=3, cursor=cursor, workers=workers
                )
            ) for r in range(dp)
        ]
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


def hostile(path, *members):
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _link():
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def _kind(kind):
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([(tarfile.TarInfo("../a.json"), b"{}")], "points outside"),
        ([(tarfile.TarInfo("/a.json"), b"{}")], "points outside"),
        ([(_link(), b"")], "not a plain file"),
        ([(tarfile.TarInfo("a.json"), b"{}")] * 2, "twice"),
        ([(_kind(tarfile.CHRTYPE), b"")], "not a plain file"),
        ([(_kind(tarfile.LNKTYPE), b"")], "not a plain file"),
        ([(_kind(tarfile.FIFOTYPE), b"")], "not a plain file"),
    ],
)
def test_hostile_tars_are_refused(tmp_path, members, says):
    hostile(tmp_path / "bad.tar", *members)
    with pytest.raises(ShardError, match=says):
        open_local(tmp_path / "bad.tar", None)


def test_header_bomb_is_refused(tmp_path):
    hostile(
        tmp_path / "bomb.tar", (tarfile.TarInfo("a.safetensors"), (1 << 40).to_bytes(8, "little") + b"{}")
    )
    with pytest.raises(ShardError, match="header claims"):
        open_local(tmp_path / "bomb.tar", None).tensors("a")


def test_not_a_set(tmp_path):
    with pytest.raises(ShardError, match="no shard set here"):
        open_set(tmp_path)


def test_a_member_that_claims_gigabytes_is_refused(tmp_path):
    info = tarfile.TarInfo("a.safetensors")
    info.size = 5 << 30
    (tmp_path / "big.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ShardError, match="claims 5368709120 bytes beyond the end|not a readable tar"):
        open_local(tmp_path / "big.tar", None)


def test_tars_outside_the_set_are_refused(tmp_path):
    make_set(tmp_path)
    path = tmp_path / "manifest.json"
    for evil in ("/etc/passwd", "../x.tar"):
        path.write_text(path.read_text().replace("latents/000000.tar", evil))
        with pytest.raises(ShardError, match="outside the set"):
            open_set(tmp_path)
        path.write_text(path.read_text().replace(evil, "latents/000000.tar"))
