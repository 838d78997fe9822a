"""What a merge does with several LoRAs where nothing was said of them: reconcile if it can; else add up
and say why, or refuse and say why where they share rows."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import LoraFileConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.merge import choose as choosing
from hvtrain.merge import run as merge
from launcher import cli
from tests.merge.test_reconcile import config, lora
from tests.train.shardset import make_shards

LAYER = "single_blocks.3.linear1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """1 and 2 share a layer and left samples; 3 shares it too, and left none; 4 is of another layer, as 5 is,
    which left none."""
    root = tmp_path_factory.mktemp("choose")
    other = "single_blocks.2.linear1"
    for number, layer in ((1, LAYER), (2, LAYER), (3, LAYER), (4, other), (5, other)):
        lora(root / f"{number}" / "lora.safetensors", seed=number, layers=[layer])
        if number not in (3, 5):
            make_shards(root / f"{number}" / "calibration", n=6, seed=number, word=number)
    make_shards(root / "old", n=4, seed=9, word=9)
    return root


def scalars(folder):
    """Tag -> (step, value) of TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def auto(place, output, *numbers, **more):
    return config(place, output, *numbers, how="auto", states=4, held_out=2, steps=2, **more)


@pytest.mark.parametrize("second", [2, 4], ids=["shared", "disjoint"])
def test_loras_that_left_samples_are_reconciled_by_itself(place, tmp_path, capsys, second):
    """Whether they share rows or not: on each other's clips they answer either way."""
    merge.run(auto(place, tmp_path / "auto.safetensors", 1, second))
    said = capsys.readouterr().out
    assert (
        "reconciled by fit+distill, from the samples beside each (--on-overlap" in said
        and "is held by --keep" in said
    )
    asked = config(
        place, tmp_path / "asked.safetensors", 1, second, how="fit+distill", states=4, held_out=2, steps=2
    )
    merge.run(asked)
    assert "reconciled by" not in capsys.readouterr().out
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("auto", "asked"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    about = json.loads((tmp_path / "auto-merge.json").read_text())
    assert about["policy"] == "fit+distill"
    assert scalars(tmp_path / "auto-merge" / "tensorboard") == {
        f"distance/{name}": [
            (0, pytest.approx(about["summed"][name])), (1, pytest.approx(about["fidelity"][name]))
        ]
        for name in ("1/lora.safetensors", f"{second}/lora.safetensors")
    }


@pytest.mark.parametrize(
    ("numbers", "more", "why"),
    [
        ((1, 3), {}, r"by what each does they cannot be: .*3/lora.safetensors: nothing says what it was "
        r"trained on"),
        (
            (1, 2), {"dit": "", "target": "lora"},
            r"by what each does they cannot be: .* is not given \(--dit\)"
        ),
    ],
)
def test_what_cannot_be_reconciled_is_refused_with_the_reason(place, tmp_path, numbers, more, why):
    output = tmp_path / "m.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"both change \d+ rows of '{LAYER}'.* --on-overlap sum.*{why}"
    ):
        merge.run(replace(auto(place, output, *numbers), **more))
    assert not output.exists()


def test_one_that_is_off_leaves_nothing_to_reconcile(place, tmp_path):
    cfg = auto(place, tmp_path / "m.safetensors", 1, 2, 4)
    cfg = replace(cfg, lora=(*cfg.lora[:2], LoraFileConfig(cfg.lora[2].path, 0.0)))
    with pytest.raises(
        CheckpointError, match=r"by what each does they cannot be: .*4/lora.safetensors is off"
    ):
        merge.run(cfg)


def test_disjoint_ones_that_cannot_be_reconciled_are_added_up_with_the_reason(place, tmp_path, capsys):
    merge.run(auto(place, tmp_path / "m.safetensors", 1, 5))
    said = capsys.readouterr().out
    assert re.search(r"added up, .*cannot be reconciled: .*5/lora.safetensors: nothing says what it", said)
    merge.run(replace(auto(place, tmp_path / "asked.safetensors", 1, 5), on_overlap="sum"))
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("m", "asked"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert "cannot be reconciled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "policy"), [((1, 2), "sum"), ((1, 4), "sum"), ((1,), "error")],
    ids=["shared", "disjoint", "one"]
)
def test_where_nothing_is_to_be_reconciled_nothing_is_computed(place, tmp_path, monkeypatch, numbers, policy):
    monkeypatch.setattr(merge, "start", lambda *a, **b: pytest.fail("it computes"))
    merge.run(replace(auto(place, tmp_path / "m.safetensors", *numbers), on_overlap=policy))
    assert (
        json.loads((tmp_path / "m-merge.json").read_text())["policy"] == policy
        and not (tmp_path / "m-merge").exists()
    )


def test_samples_for_a_merge_that_does_not_reconcile_are_refused(place, tmp_path):
    keep = (str(place / "old"),)
    for numbers, policy, why in (
        ((1, 2), "sum", "--on-overlap decides"), ((1,), "error", "there is one LoRA"),
        ((1, 5), "error", ".*5/lora.safetensors: nothing says")
    ):
        with pytest.raises(
            ConfigError, match=f"^keep is for a merge that reconciles, and .*: {why}.*give --reconcile fit"
        ):
            merge.run(
                replace(auto(place, tmp_path / "m.safetensors", *numbers, keep=keep), on_overlap=policy)
            )
    with pytest.raises(ConfigError, match="^samples is for a merge that reconciles"):
        merge.run(auto(place, tmp_path / "m.safetensors", 1, samples=keep))
    said = list(choosing.Chosen("fit", by_itself=True).lines(True))
    assert len(said) == 1 and "--keep" not in said[0]


def test_none_is_as_ever(place, tmp_path, capsys):
    given = [
        "merge", "--dit", "tiny:dit.safetensors", "--output", f"{tmp_path}/m.safetensors", "--reconcile",
        "none"
    ]
    assert cli.main([*given, "--lora", f"{place}/1", "--lora", f"{place}/2"]) == 2
    capsys.readouterr()
    both = ["--lora", f"{place}/1/lora.safetensors", "--lora", f"{place}/2/lora.safetensors"]
    assert cli.main([*given, *both]) == 2
    said = capsys.readouterr().err
    assert "say how to reconcile them: --on-overlap" in said and "they cannot be" not in said
