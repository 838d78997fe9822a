"""Damage of any kind is named, by verify and by the reader; training stops, or skips and counts."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

from shards import ShardError, open_set
from shards.loader import BatchLoader
from shards.schema import EMPTY_TEXT, Chunk, Manifest, load_manifest, save_manifest
from shards.verify import verify
from shards.writer import TarWriter, write_tar
from tests.shards.sets import make_set


def read_all(root):
    found = open_set(root)
    for index in range(len(found)):
        found.get(index)


def test_any_flipped_byte_of_a_tar_is_found_by_verify_and_by_the_reader(tmp_path):
    make_set(tmp_path, sizes=((2, 3),))
    path = tmp_path / "latents/000000.tar"
    sound = path.read_bytes()
    # headers, their checksums, JSON, tensors, padding
    places = [*range(0, len(sound), 37), 148, 155, len(sound) - 1]
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        faults = list(verify(tmp_path))
        assert faults and all("latents/000000.tar" in fault for fault in faults), (place, faults)
        with pytest.raises(ShardError, match=r"latents/000000\.tar"):
            read_all(tmp_path)
    path.write_bytes(sound)
    assert list(verify(tmp_path)) == []


def test_verify_names_key_and_bytes_of_a_damaged_tensor(tmp_path):
    found = make_set(tmp_path)
    tar = found.tar(found.manifest.chunks[0], "latents")
    member = tar.members["clip0_1.safetensors"]
    path = tmp_path / "latents/000000.tar"
    data = bytearray(path.read_bytes())
    data[member.offset + member.size - 1] ^= 1
    path.write_bytes(data)
    (fault,) = verify(tmp_path)
    assert f"clip0_1.safetensors (bytes {member.offset} to {member.offset + member.size})" in fault


def test_truncated_missing_and_swapped_tars_are_named(tmp_path):
    make_set(tmp_path, sizes=((3, 4), (3, 4)))  # two tars of equal size
    one, two = tmp_path / "text/000000.tar", tmp_path / "latents/000001.tar"
    sound = one.read_bytes()
    one.write_bytes(sound[:-600])
    assert any("text/000000.tar" in f and "the manifest says" in f for f in verify(tmp_path))
    with pytest.raises(ShardError, match=r"text/000000\.tar.*the manifest says"):
        read_all(tmp_path)
    one.unlink()
    assert any("text/000000.tar" in f and "missing" in f for f in verify(tmp_path))
    with pytest.raises(ShardError, match=r"text/000000\.tar.*missing"):
        read_all(tmp_path)
    one.write_bytes(sound)
    other = tmp_path / "latents/000000.tar"
    assert other.stat().st_size == two.stat().st_size
    shutil.move(other, tmp_path / "x")
    shutil.move(two, other)
    shutil.move(tmp_path / "x", two)
    assert {f.split(":")[0] for f in verify(tmp_path)} >= {str(other), str(two)}
    with pytest.raises(ShardError, match=r"latents/00000[01]\.tar.*swapped"):
        read_all(tmp_path)


def test_every_missing_or_cut_tar_is_noticed_when_the_set_is_opened(tmp_path):
    make_set(tmp_path, sizes=((3, 4), (3, 4), (2, 2)))
    (tmp_path / "latents/000001.tar").unlink()
    with (tmp_path / "text/000002.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        ShardError,
        match=r"latents/000001\.tar: .* missing.* \(1 more tars are missing or have another size\)"
    ):
        open_set(tmp_path)
    faults = list(verify(tmp_path))
    assert len(faults) == 2 and "latents/000001.tar" in faults[0] and "text/000002.tar" in faults[1]
    manifest = load_manifest(tmp_path)
    (first, *rest) = manifest.chunks
    short = replace(first, tars={"latents": first.tars["latents"]})
    save_manifest(tmp_path, replace(manifest, chunks=(short, *rest)))
    with pytest.raises(ShardError, match="no column 'text' for the 3 samples from clip0_0"):
        open_set(tmp_path)


def test_a_column_without_its_tar_and_a_missing_empty_caption_are_named(tmp_path):
    make_set(tmp_path)
    (tmp_path / EMPTY_TEXT).unlink()
    assert any(EMPTY_TEXT in fault for fault in verify(tmp_path))
    shutil.rmtree(tmp_path / "text")
    assert sum("text/00000" in fault for fault in verify(tmp_path)) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_named_by_verify_and_by_the_reader(tmp_path, value, dtype):
    sample = torch.ones(2, 1, 2, 3).to(dtype)
    sample.view(-1)[7] = torch.tensor(value).to(dtype)
    # as large as it may be: their sum is infinite
    sound = torch.full((2, 1, 2, 3), torch.finfo(dtype).max).to(dtype)
    rows = [
        ("good", {"latents": sound, "n": torch.ones(2, dtype=torch.int32)}, {}),
        ("bad", {"latents": sample}, {})
    ]
    tar = write_tar(tmp_path, "latents/0.tar", rows)
    save_manifest(tmp_path, Manifest(("latents",), (Chunk("b", ("good", "bad"), {"latents": tar}),)))
    (fault,) = verify(tmp_path)
    assert "latents/0.tar: bad (bytes " in fault and "'latents' holds NaN or infinite values" in fault
    assert list(verify(tmp_path, values=False)) == []
    found = open_set(tmp_path)
    assert torch.equal(found.get(0).tensors["latents"].float(), sound.float())
    for _ in range(2):  # not only the first time
        with pytest.raises(ShardError, match=r"latents/0\.tar: bad: 'latents' holds NaN or infinite values"):
            found.get(1)


def test_not_finite_values_and_odd_shapes_are_named(tmp_path):
    found = make_set(tmp_path, sizes=((2, 3),))
    chunk = found.manifest.chunks[0]
    with TarWriter(tmp_path, "latents") as out:
        out.add("clip0_0", {"latents": torch.full((2, 1, 2, 3), float("nan"))}, {})
        out.add("clip0_1", {"latents": torch.zeros(2, 1, 2, 4)}, {})
        entry = out.finish("latents/000000.tar")
    chunk = replace(chunk, tars={**chunk.tars, "latents": entry})
    save_manifest(tmp_path, Manifest(("latents", "text"), (chunk,)))
    faults = list(verify(tmp_path))
    assert any("clip0_0" in f and "NaN" in f and "bytes" in f for f in faults)
    assert any("clip0_1" in f and "(2, 1, 2, 4)" in f for f in faults)


def damage(root, key):
    found = open_set(root)
    chunk = next(c for c in found.manifest.chunks if key in c.keys)
    member = found.tar(chunk, "latents").members[f"{key}.safetensors"]
    with (root / chunk.tars["latents"].path).open("r+b") as file:
        file.seek(member.offset + member.size - 1)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(("workers", "worker_type"), [(0, "thread"), (2, "thread"), (2, "process")])
def test_a_bad_sample_stops_or_is_skipped_and_counted(tmp_path, workers, worker_type):
    make_set(tmp_path, sizes=((4, 3), (2, 5)))
    damage(tmp_path, "clip0_2")
    options = {"batch_size": 2, "workers": workers, "worker_type": worker_type}

    def epoch(**more):
        loader = iter(BatchLoader(open_set(tmp_path), **options, **more))
        return [next(loader) for _ in range(3)]

    with pytest.raises(ShardError, match="clip0_2"):
        epoch()
    batches = epoch(on_bad_sample="skip")
    assert [len(b.keys) for b in batches] == [2, 2, 2] and batches[-1].cursor == 6
    (message,) = [m for b in batches for m in b.bad]
    assert "clip0_2" in message
    keys = [k for b in batches for k in b.keys]
    assert "clip0_2" not in keys and len(set(keys)) == 5  # one of its bucket stands in


def test_a_bucket_without_any_sound_sample_stops_even_when_skipping(tmp_path):
    make_set(tmp_path, sizes=((1, 3),))
    damage(tmp_path, "clip0_0")
    with pytest.raises(ShardError, match="no sound sample"):
        next(iter(BatchLoader(open_set(tmp_path), batch_size=1, on_bad_sample="skip")))
