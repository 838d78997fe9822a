"""`hvtrain merge --reconcile` on several processes makes what one makes, and `distill`
goes on where it was killed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import ParallelConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.merge import run as merge
from hvtrain.train.muon import Muon
from launcher.cli import main
from tests.merge.test_reconcile import config, place, report  # noqa: F401 - a fixture
from tests.parallel.ranks import run_ranks


def asked(folder, name, how):
    keep = (str(folder / "old"),)
    cfg = config(folder, folder / f"{name}.safetensors", 1, 2, how=how, keep=keep, new_noise=True)
    return replace(cfg, dtype="float32")


def runs(folder, jobs):
    """On every rank: (name, way, ulysses, ring) one after the other in one process group."""
    closed, merge.shutdown = merge.shutdown, lambda: None
    try:
        for name, how, ulysses, ring in jobs:
            merge.run(replace(asked(folder, name, how), parallel=ParallelConfig(ulysses=ulysses, ring=ring)))
    finally:
        merge.shutdown = closed


def test_two_ranks_make_what_one_makes(place):  # noqa: F811
    """Clips spread over ranks, in fit and in distill; and one clip on both of
    them, by heads and by a ring."""
    for how in ("fit", "distill"):
        merge.run(asked(place, f"one-{how}", how))
    run_ranks(
        2, runs, place,
        [
            ("dp-fit", "fit", 1, 1), ("dp-distill", "distill", 1, 1), ("u2-distill", "distill", 2, 1),
            ("r2-distill", "distill", 1, 2)
        ]
    )
    base = load_file(place / "one-fit.safetensors")
    for name in ("dp-fit", "dp-distill", "u2-distill", "r2-distill"):
        how = name.partition("-")[2]
        one, two = (load_file(place / f"{n}.safetensors") for n in (f"one-{how}", name))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)
        said, own = (report(place / f"{n}.safetensors") for n in (f"one-{how}", name))
        for key in ("summed", "fidelity"):
            assert own[key] == pytest.approx(said[key], abs=1e-4), (name, key)
        assert not (place / f".{name}.safetensors.reconcile").exists()
    assert any((base[key] != load_file(place / "one-distill.safetensors")[key]).any() for key in base)


def test_a_killed_distillation_goes_on_at_its_step(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("hvtrain.merge.distill._SAVED", 5)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    merge.run(config(place, whole, 1, 2, how="distill"))
    step, calls = Muon.step, []

    def killed(*args, **given):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(*args, **given)

    monkeypatch.setattr(Muon, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        merge.run(config(place, cut, 1, 2, how="distill"))
    merge.run(config(place, cut, 1, 2, how="distill"))
    assert len(calls) == 8 + 12 - 5
    assert cut.read_bytes() == whole.read_bytes()
    assert "distill: step 12/12" in capsys.readouterr().out


def test_a_rate_that_undoes_the_merge_is_named(place, tmp_path):  # noqa: F811
    out = tmp_path / "m.safetensors"
    with pytest.raises(
        CheckpointError,
        match=r"distill took the merge further .* rate of 1 is too high; give reconcile.lr=0.25"
    ):
        merge.run(config(place, out, 1, 2, how="fit+distill", lr=1.0))
    assert not out.exists()


def test_launch_refuses_a_merge_that_computes_nothing(place, tmp_path, capsys):  # noqa: F811
    lora = str(place / "1" / "lora.safetensors")
    arguments = [
        "merge", "--dit", "tiny:dit.safetensors", "--lora", lora, "--output", str(tmp_path / "m.safetensors")
    ]
    assert main(["launch", "--nproc", "2", *arguments]) == 2
    assert (
        "launch: a merge has nothing to share unless it is asked to compute: give --reconcile"
        in capsys.readouterr().err
    )
    with pytest.raises(ConfigError, match="ulysses 2 x ring 1 = 2 does not divide the 1 process"):
        cfg = config(place, tmp_path / "m.safetensors", 1, how="fit")
        merge.run(replace(cfg, parallel=ParallelConfig(ulysses=2)))
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
