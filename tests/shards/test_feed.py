"""shards.pipeline: a set for other people's training code, and `import shards` itself."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
import webdataset

import shards
from shards import ShardError, feed, open_set
from shards.remote import Remote
from shards.schema import save_manifest
from tests.bench import serve
from tests.shards.sets import make_set


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["__key__"]]


def test_a_pass_holds_every_sample_once_in_batches_of_one_bucket(tmp_path):
    found = make_set(tmp_path, sizes=((5, 3), (4, 5), (3, 3)))
    pipe = shards.pipeline(tmp_path, batch_size=2, seed=1)
    first, second = list(pipe), list(pipe)
    assert isinstance(pipe, webdataset.DataPipeline)
    assert sorted(keys(first)) == sorted(keys(second)) == sorted(found.keys) and keys(first) != keys(second)
    assert sorted(len(b["__key__"]) for b in first) == [2] * 6  # 8 of one bucket, 4 of the other
    for batch in first:
        samples = [found.get(found.keys.index(key)) for key in batch["__key__"]]
        assert torch.equal(batch["latents"], torch.stack([s.tensors["latents"] for s in samples]))
        assert batch["text_len"].tolist() == [len(s.tensors["text"]) for s in samples]
        # joined by key
        assert torch.equal(batch["text"][0, : batch["text_len"][0]], samples[0].tensors["text"])
        assert [row["caption"] for row in batch["json"]] == batch["__key__"]
    assert keys(shards.pipeline(tmp_path, batch_size=2, seed=1)) == keys(first)
    assert keys(shards.pipeline(tmp_path, batch_size=2, seed=2)) != keys(first)


def test_the_lines_of_the_documentation_run(tmp_path, capsys):
    make_set(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "shards.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    exec(lines.replace('"SET"', repr(str(tmp_path))))
    # batches of 2, 1 and 2 samples
    assert len(lines.splitlines()) == 3 and len(capsys.readouterr().out.splitlines()) == 3


def test_samples_columns_and_repeats(tmp_path):
    found = make_set(tmp_path, sizes=((3, 3), (2, 5)))
    first, second = found.manifest.chunks
    save_manifest(tmp_path, replace(found.manifest, chunks=(replace(first, repeats=2), second)))
    rows = list(shards.pipeline(tmp_path, batch_size=None, columns=("latents",), buffer=0))
    assert Counter(row["__key__"] for row in rows) == {
        **dict.fromkeys(found.keys[:3], 2), **dict.fromkeys(found.keys[3:], 1)
    }
    assert all(set(row) == {"__key__", "__bucket__", "json", "latents"} for row in rows)
    runs = [
        "".join(row["__key__"][-1] for row in rows if row["__key__"].startswith(c))
        for c in ("clip0", "clip1")
    ]
    assert runs == ["012012", "01"]  # no buffer: as they lie
    further = shards.pipeline(tmp_path, batch_size=2).compose(
        webdataset.map(lambda batch: batch["latents"].shape[0])
    )
    assert sorted(further) == [2, 2, 2, 2]


def test_nodes_and_workers_share_the_tars(tmp_path, monkeypatch):
    found = make_set(tmp_path, sizes=((2, 3),) * 7)
    pipe = pickle.loads(pickle.dumps(shards.pipeline(tmp_path, batch_size=2)))  # travels to a worker
    seen = []
    for rank in range(2):
        for worker in range(2):
            for name, value in {"RANK": rank, "WORLD_SIZE": 2, "WORKER": worker, "NUM_WORKERS": 2}.items():
                monkeypatch.setenv(name, str(value))
            seen.append(keys(pipe))
    assert (
        sorted(key for part in seen for key in part) == sorted(found.keys)
        and [len(s) for s in seen] == [4, 4, 4, 2]
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("NUM_WORKERS", "1")
    pipe = shards.pipeline(tmp_path, batch_size=2, buffer=0)
    first, second = keys(pipe), keys(pipe)
    assert first != second and sorted(first) == sorted(second) != first  # each pass has its own order of tars


def test_in_the_workers_of_torch_s_loader(tmp_path):
    found = make_set(tmp_path, sizes=((2, 3),) * 5)
    torch.manual_seed(5)  # whence the loader draws its workers' seeds
    loader = torch.utils.data.DataLoader(
        shards.pipeline(tmp_path, batch_size=2), batch_size=None, num_workers=2
    )
    first, second = list(loader), list(loader)
    assert sorted(keys(first)) == sorted(keys(second)) == sorted(found.keys) and keys(first) != keys(second)
    assert all(batch["latents"].shape[0] == len(batch["json"]) == len(batch["__key__"]) for batch in first)


def test_a_worker_s_pass_has_its_own_shuffle_too(tmp_path, monkeypatch):
    """A new worker counts no passes: only torch's seed tells one from another. With one tar,
    nothing but the shuffle can."""
    make_set(tmp_path, sizes=((8, 3),))
    pipe, orders = pickle.dumps(shards.pipeline(tmp_path, batch_size=None, seed=1)), []
    for seed in (7, 8, 7):
        monkeypatch.setattr(feed, "get_worker_info", lambda seed=seed: SimpleNamespace(seed=seed))
        orders.append([row["__key__"] for row in pickle.loads(pipe)])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_url_is_one_request_a_tar(tmp_path, monkeypatch):
    local = make_set(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/feed/set", recursive=True)
    ranges, opened = [], []
    read, opens = Remote.read, type(memory).open
    monkeypatch.setattr(
        Remote, "read", lambda self, name, *span: (ranges.append(span), read(self, name, *span))[1]
    )
    monkeypatch.setattr(
        type(memory), "open", lambda self, path, *a, **k: (opened.append(path), opens(self, path, *a, **k))[1]
    )
    here = list(shards.pipeline(tmp_path, batch_size=2, seed=3))
    there = list(shards.pipeline("memory://feed/set", batch_size=2, seed=3))
    assert keys(here) == keys(there) and sorted(keys(there)) == sorted(local.keys)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(here, there) for n in ("latents", "text", "pooled"))
    assert [a["json"] for a in here] == [b["json"] for b in there]
    assert len([p for p in opened if p.endswith(".tar")]) == 4 and not any(ranges)

    data = bytearray(memory.cat_file("/feed/set/latents/000000.tar"))
    at = open_set("memory://feed/set").tar(local.manifest.chunks[0], "latents").members["clip0_1.safetensors"]
    data[at.offset + at.size - 1] ^= 1
    memory.pipe_file("/feed/set/latents/000000.tar", bytes(data))
    with pytest.raises(ShardError, match=r"memory://feed/set/latents/000000\.tar: clip0_1.*damaged"):
        list(shards.pipeline("memory://feed/set"))
    memory.pipe_file("/feed/set/latents/000000.tar", bytes(data[: at.offset]))
    with pytest.raises(ShardError, match=r"memory://feed/set/latents/000000\.tar: .*the tar is cut off"):
        list(shards.pipeline("memory://feed/set"))
    memory.rm("/feed/set/text/000001.tar")
    with pytest.raises(ShardError, match=r"memory://feed/set/text/000001\.tar: no such file"):
        list(shards.pipeline("memory://feed/set", columns=("text",)))


def test_over_http(tmp_path):
    """fsspec's own client, told to stream: a whole tar without asking for its size."""
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with the package aiohttp")
    make_set(tmp_path)
    command = [sys.executable, str(Path(serve.__file__)), str(tmp_path), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            here, there = (list(shards.pipeline(root, batch_size=2, seed=3)) for root in (tmp_path, address))
            assert (
                keys(here) == keys(there)
                and all(torch.equal(a["text"], b["text"]) for a, b in zip(here, there))
            )
            assert open_set(address).get(1).tensors["latents"].equal(
                open_set(tmp_path).get(1).tensors["latents"]
            )
            with pytest.raises(ShardError, match=rf"{address}/nowhere/manifest.json: no such file"):
                open_set(f"{address}/nowhere")
        finally:
            server.kill()


def test_a_sample_of_a_url_is_one_request_a_column(tmp_path, monkeypatch):
    make_set(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/pairs/set", recursive=True)
    found, spans = open_set("memory://pairs/set"), []
    read = Remote.read
    monkeypatch.setattr(
        Remote, "read", lambda self, name, *span: (spans.append(span), read(self, name, *span))[1]
    )
    sample = found.get(0)
    assert sample.meta["caption"] == sample.key and len([s for s in spans if s]) == 2


def test_importing_shards_loads_no_torch():
    """The launcher may use it. What needs torch is loaded when it is asked for."""
    code = (
        "import sys, shards, shards.atomic, shards.schema\n"
        "from shards import ShardError\n"
        "assert not {'torch', 'webdataset', 'fsspec'} & set(sys.modules), sorted(sys.modules)\n"
        "try: shards.nothing\n"
        "except AttributeError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "module 'shards' has no attribute 'nothing'\n", done.stderr
    assert all(getattr(shards, name) is not None for name in shards.__all__)
