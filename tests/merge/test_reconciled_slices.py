"""From two slices' training to their reconciled merge, by the product's own commands: what
training leaves is all it takes."""

import json
import shutil

import pytest

from hvtrain.errors import ConfigError
from hvtrain.lorafiles.tools import open_any
from hvtrain.train import run as train
from launcher import cli
from launcher.commands import jobs
from launcher.jobs import backends, slices
from launcher.table import parse
from shards import open_set
from tests.train.shardset import config, make_shards


def asked(tmp_path, *more):
    return jobs._slices(parse([
        "slices", "run", "model.dit=tiny:dit.safetensors", "model.dtype=float32", "run.steps=4",
        "--plan", f"{tmp_path}/plan/plan.json", "--data", f"{tmp_path}/parts", "--output", f"{tmp_path}/run",
        *more,
    ]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two slices of the model that ships, each with its own words, and their data gone."""
    root = tmp_path_factory.mktemp("slices")
    assert cli.main(
        ["slices", "plan", "--dit", "tiny:dit.safetensors", "--n", "2", "--output", f"{root}/plan"]
    ) == 0
    for i in (1, 2):
        data = make_shards(root / "parts" / f"0{i}", n=20, seed=i, word=i)
        own = [
            "adapter.type=loraid", f"adapter.plan={root}/plan/plan.json", f"adapter.loraid={i}",
            f"run.name=slice-0{i}"
        ]
        assert train.run(
            config(data, root / "run" / f"0{i}", *own, "run.steps=4", "optim.lr=1e-2", "data.calibration=12")
        ) == 0
        shutil.rmtree(data)
        data.mkdir()  # where it was
    make_shards(root / "parts" / "keep", n=6, seed=9, word=9)
    return root


def test_a_finished_lora_leaves_samples_spread_over_its_data(trained, tmp_path):
    found = open_set(trained / "run" / "01" / "calibration")
    assert open_any(trained / "run" / "01").lora.metadata["hvtrain.flavor"] == "tiny"
    assert found.keys == [f"clip{i}" for i in (0, 2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19)]  # of 20, evenly
    assert sorted(found.get(0).tensors) == ["latents", "pooled", "text"] and found.empty_text
    data = make_shards(tmp_path / "data", n=4)
    assert train.run(config(data, tmp_path / "run", "run.steps=1", "data.calibration=0")) == 0
    assert not (tmp_path / "run" / "calibration").exists()
    assert train.run(config(data, tmp_path / "run", "run.steps=1")) == 0  # nothing to do but to leave them
    assert len(open_set(tmp_path / "run" / "calibration")) == 4


def test_the_merge_job_of_a_sliced_run_reconciles(trained, capsys):
    wanted = asked(trained, "--reconcile", "distill")
    assert wanted.merge[-4:] == ("--reconcile", "distill", "--keep", f"{trained}/parts/keep")
    sizes = {"steps": 15, "batch_size": 8, "states": 8, "held_out": 3, "lr": 1e-3}
    more = [f"reconcile.{key}={value}" for key, value in sizes.items()]
    (trained / "run" / "merge").mkdir()
    assert cli.main(["merge", *more, *wanted.merge]) == 0
    merged = trained / "run" / "merge" / "merged-lora-merge.json"
    said = json.loads(merged.read_text())
    assert said["policy"] == "distill" and said["overlap_rows"] == 0
    names = [f"slice-0{i}.safetensors" for i in (1, 2)]
    assert list(said["fidelity"]) == [*names, "keep"]
    assert (
        all(said["fidelity"][n] < 0.1 for n in names)
        and said["fidelity"]["keep"] < 0.7 * said["summed"]["keep"]
    )
    assert "Distance from what each does alone" in merged.with_suffix(".html").read_text()
    assert (trained / "run" / "merge" / "merged-lora-slices" / "02" / "slice-02.safetensors").is_file()
    assert cli.main([
        "generate", "model.dit=tiny:dit.safetensors", "model.vae=gone", "prompt=x", f"output={trained}/x.mp4",
        f"slices={trained}/run/merge/merged-lora-slices", "loraid=[7]",
    ]) == 2
    capsys.readouterr()


def test_slices_without_a_plan_are_trained_and_kept_in_one_lora(tmp_path):
    """Each an ordinary LoRA of all layers; the merge job takes them as they lie."""
    for i in (1, 2):
        make_shards(tmp_path / "parts" / f"0{i}", n=20, seed=i, word=i)
    wanted = jobs._slices(parse([
        "slices", "run", "model.dit=tiny:dit.safetensors", "model.dtype=float32", "run.steps=4",
        "run.precision=fp32", "optim.lr=1e-2", "adapter.rank=4", "zero.engine=torch", "data.calibration=12",
        "--data", f"{tmp_path}/parts", "--output", f"{tmp_path}/run",
    ]))
    for i in (1, 2):
        assert cli.main(slices.train_arguments(tmp_path / "run", wanted, i)) == 0
    (tmp_path / "run" / "merge").mkdir()
    sizes = {"steps": 10, "batch_size": 8, "states": 8, "held_out": 3, "lr": 1e-3}
    assert cli.main(
        ["merge", *(f"reconcile.{key}={value}" for key, value in sizes.items()), *wanted.merge]
    ) == 0
    merged = tmp_path / "run" / "merge" / "merged-lora.safetensors"
    said = json.loads(merged.with_name("merged-lora-merge.json").read_text())
    assert said["policy"] == "fit+distill" and said["overlap_rows"] > 0
    assert sorted(said["fidelity"]) == ["slice-01.safetensors", "slice-02.safetensors"]
    assert all(said["fidelity"][name] < 0.5 * said["summed"][name] for name in said["fidelity"]), said
    assert (
        merged.is_file()
        and (merged.with_name("merged-lora-calibration") / "02-slice-02" / "manifest.json").is_file()
    )


def test_a_gpu_is_asked_for_where_there_is_one(trained):
    slurm = asked(trained, "--backend", "slurm", "--reconcile", "fit")
    text = backends.merge_script(trained / "run", slurm, ["1"])
    assert "--gpus-per-node=1" in text or "--gpus-per-node 1" in text or "gres" in text
    assert asked(trained).merge[-4:] == (*slurm.merge[-4:-3], "fit+distill", *slurm.merge[-2:])
    plain = asked(trained, "--backend", "slurm", "--reconcile", "none")
    assert (
        plain.merge[-2:] == ("--on-overlap", "sum")
        and "gpus" not in backends.merge_script(trained / "run", plain, ["1"])
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--reconcile", "sum"), "--reconcile sum: expected fit, distill, fit+distill, none"),
        (("--reconcile", "fit", "--merge-as", "none"), "--merge-as none: nothing is merged"),
        (("--keep", "somewhere", "--reconcile", "none"), "--keep is for a merge that reconciles"),
    ],
)
def test_what_cannot_be_meant_is_refused(trained, more, says):
    with pytest.raises(ConfigError, match=says.replace("+", r"\+")):
        asked(trained, *more)
