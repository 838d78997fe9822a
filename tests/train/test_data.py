"""What a run does with its data: damaged samples, URLs, several readers."""

import json
import shutil
from dataclasses import replace

import pytest

from hvtrain.errors import ConfigError
from hvtrain.train import run as train
from shards import ShardError, open_set
from shards.schema import save_manifest
from shards.writer import write_tar
from tests.shards.test_corruption import damage
from tests.train.shardset import config, make_shards


def losses(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def bad_samples(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["data/bad_samples"] for row in rows if "data/bad_samples" in row]


def test_a_damaged_sample_stops_the_run_or_is_skipped_and_counted(tmp_path, capsys):
    shards = make_shards(tmp_path / "shards")
    damage(shards, "clip3")
    with pytest.raises(
        ShardError, match=r"latents/0\.tar: clip3\.safetensors \(bytes \d+ to \d+\) is damaged"
    ):
        train.run(config(shards, tmp_path / "stops"))
    train.run(config(shards, tmp_path / "skips", "data.on_bad_sample=skip"))
    assert bad_samples(tmp_path / "skips")[-1] == 1.0 and len(losses(tmp_path / "skips")) == 6
    assert "skipped: " in capsys.readouterr().err


def test_a_url_and_any_reader_train_like_the_directory(tmp_path):
    import fsspec

    shards = make_shards(tmp_path / "shards")
    train.run(config(shards, tmp_path / "a", "data.workers=0"))
    train.run(config(f"file://{shards}", tmp_path / "b", "data.workers=2"))
    train.run(config(shards, tmp_path / "c", "data.workers=2", "data.worker_type=process"))
    fsspec.filesystem("memory").put(str(shards), "/sets/one", recursive=True)
    train.run(config("memory://sets/one", tmp_path / "d"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "c") == losses(
        tmp_path / "d"
    )
    with pytest.raises(ShardError, match="no such file"):
        train.run(config("memory://sets/none", tmp_path / "e"))


def test_a_password_in_an_address_is_kept_nowhere(tmp_path, capsys):
    import fsspec

    fsspec.filesystem("memory").put(
        str(make_shards(tmp_path / "shards")), "/me:S3CRET@host/set", recursive=True
    )
    train.run(config("memory://me:S3CRET@host/set", tmp_path / "run", "run.steps=1"))
    said = capsys.readouterr()
    kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (
        {path.suffix for path in kept} >= {".yaml", ".safetensors", ".jsonl"}
        and any("events" in p.name for p in kept)
    )
    assert (
        not [path for path in kept if b"S3CRET" in path.read_bytes()] and "S3CRET" not in said.out + said.err
    )
    assert "memory://host/set" in (tmp_path / "run/config.yaml").read_text()


def test_a_missing_tar_is_noticed_before_the_first_step(tmp_path):
    shards = make_shards(tmp_path / "shards")
    (shards / "text/0.tar").unlink()
    with pytest.raises(ShardError, match=r"text/0\.tar: the manifest lists this tar but it is missing"):
        train.run(config(shards, tmp_path / "run", "data.on_bad_sample=skip"))
    assert not (tmp_path / "run").exists()


def test_nan_latents_are_named_or_skipped(tmp_path):
    shards = make_shards(tmp_path / "shards")
    rows = []
    for i in range(10):
        tensors = {n: t.clone() for n, t in open_set(shards).get(i, ("latents",)).tensors.items()}
        if i in (0, 3):
            tensors["latents"].view(-1)[i] = float("nan")
        rows.append((f"clip{i}", tensors, {}))
    manifest = open_set(shards).manifest
    tars = {**manifest.chunks[0].tars, "latents": write_tar(shards, "latents/0.tar", rows)}
    save_manifest(shards, replace(manifest, chunks=(replace(manifest.chunks[0], tars=tars),)))
    with pytest.raises(ShardError, match=r"latents/0\.tar: clip[03]: 'latents' holds NaN or infinite values"):
        train.run(config(shards, tmp_path / "stops"))
    train.run(config(shards, tmp_path / "skips", "data.on_bad_sample=skip"))
    assert bad_samples(tmp_path / "skips")[-1] == 2.0 and len(losses(tmp_path / "skips")) == 6


def test_split_shards_train_together_like_a_set_of_their_own(tmp_path):
    """Slices get their data by `shards split`; all parts together are the whole again."""
    from shards import edit, ways

    shards = make_shards(tmp_path / "shards")
    edit.split(str(shards), tmp_path / "parts", ways.by_number(2))
    both = f"[{tmp_path / 'parts/01'}, {tmp_path / 'parts/02'}]"
    train.run(config(both, tmp_path / "a"))
    assert len(losses(tmp_path / "a")) == 6
    assert sorted(
        open_set(tmp_path / "parts/01").keys + open_set(tmp_path / "parts/02").keys
    ) == sorted(open_set(shards).keys)


def test_a_moved_set_continues_and_a_wrong_option_is_named(tmp_path):
    shards = make_shards(tmp_path / "shards")
    train.run(config(shards, tmp_path / "run", "run.steps=3"))
    shutil.move(shards, tmp_path / "moved")
    train.run(config(tmp_path / "moved", tmp_path / "run", "run.steps=6"))
    with pytest.raises(ConfigError, match=r"data\.on_bad_sample"):
        config(shards, tmp_path / "x", "data.on_bad_sample=ignore")


def test_touched_files_save_and_quit(tmp_path, capsys):
    """A file counts once; `quit` leaves with everything saved, and the next start finishes."""
    shards = make_shards(tmp_path / "shards")
    run = tmp_path / "run"
    train.run(config(shards, run, "run.steps=1"))
    (run / "save").touch()
    (run / "quit").touch()
    assert train.run(config(shards, run, "run.steps=6")) == 75
    assert "stopped on request" in capsys.readouterr().out
    assert not (run / "save").exists() and not (run / "quit").exists()
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == [
        "step-00000001", "step-00000002"
    ]
    assert train.run(config(shards, run, "run.steps=6")) == 0
    (run / "save").touch()
    train.run(config(shards, run, "run.steps=8", "run.keep_last=0"))
    assert (run / "lora-step00000007.safetensors").exists() and len(losses(run)) == 8


def test_a_checkpoint_without_room_is_refused_before_it_is_written(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from hvtrain.errors import CheckpointError
    from hvtrain.train import checkpoint

    shards, run = make_shards(tmp_path / "shards"), tmp_path / "run"
    train.run(config(shards, run, "run.steps=2"))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        CheckpointError, match=r"0.00 MiB free, step 4 needs \d\.\d\d MiB for its checkpoint and its result"
    ):
        train.run(config(shards, run, "run.steps=4"))
    monkeypatch.undo()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert train.run(config(shards, run, "run.steps=4")) == 0
