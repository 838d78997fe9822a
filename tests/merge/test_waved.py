"""A wave on top of the merge of the one before: trained, merged and tried again in real
processes; and what its teachers are."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.config import LoraFileConfig
from hvtrain.errors import ConfigError
from hvtrain.merge import run as merge
from launcher import cli
from tests.merge.test_reconcile import TEXT, config, lora, place, report  # noqa: F401 - a fixture
from tests.train.shardset import make_shards


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_two_waves_in_real_processes(tmp_path, capsys):
    """The second wave fails at first: what is done stays, and `retry` makes the rest."""
    for i in (1, 2):
        make_shards(tmp_path / "parts" / f"0{i}", n=16, seed=i, word=i)
    broken, run = tmp_path / "parts" / "02" / "latents" / "0.tar", tmp_path / "run"
    sound = broken.read_bytes()
    broken.write_bytes(b"")
    start = [
        "slices", "run", "model.dit=tiny:dit.safetensors", "model.dtype=float32", "run.steps=3",
        "run.precision=fp32", "optim.lr=1e-2", "adapter.rank=4", "zero.engine=torch", "data.calibration=8",
        "--data", f"{tmp_path}/parts", "--output", str(run), "--reconcile", "fit", "--waves", "2",
    ]  # fmt: skip
    assert cli.main(start) == 1
    assert cli.main(["slices", "status", str(run)]) == 1
    said = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[-4:]}
    assert said == {"01": "done", "02": "failed", "merge-1": "done", "merge": "waiting"}
    first, wave = run / "01" / "slice-01.safetensors", run / "merge" / "wave-1.safetensors"
    before = [path.stat().st_mtime_ns for path in (first, wave)]
    broken.write_bytes(sound)
    assert cli.main(["slices", "retry", str(run)]) == 0
    assert [path.stat().st_mtime_ns for path in (first, wave)] == before
    assert cli.main(["slices", "status", str(run)]) == 0
    (under,) = json.loads(metadata(run / "02" / "slice-02.safetensors")["hvtrain.base_lora"])
    assert under == {
        "file": "wave-1.safetensors", "multiplier": 1.0, "hvtrain.sha256": metadata(wave)["hvtrain.sha256"]
    }
    said = report(run / "merge" / "merged-lora.safetensors")
    assert list(said["fidelity"]) == ["wave-1.safetensors/01-slice-01", "slice-02.safetensors"]
    assert all(away < 0.2 for away in said["fidelity"].values())
    assert said["summed"]["slice-02.safetensors"] < 1e-6  # on top of the first is how it was trained
    assert sorted(p.name for p in (run / "merge" / "merged-lora-calibration").iterdir()) == [
        "01-01-slice-01", "02-slice-02"
    ]


def on_top_of(path, other, multiplier=1.0):
    under = [
        {"file": other.name, "multiplier": multiplier, "hvtrain.sha256": metadata(other)["hvtrain.sha256"]}
    ]
    save_file(load_file(path), path, metadata={**metadata(path), "hvtrain.base_lora": json.dumps(under)})


@pytest.fixture
def two(place, tmp_path):  # noqa: F811
    """(merge config of two LoRAs, the second's file, the first's)"""
    first, second = (
        place / "1" / "lora.safetensors", lora(tmp_path / "second" / "lora.safetensors", seed=2, layers=TEXT)
    )
    make_shards(second.parent / "calibration", n=24, seed=2, word=2)
    cfg = config(place, tmp_path / "m.safetensors", 1, how="fit", states=6, held_out=2)
    return merge.replace(cfg, lora=(*cfg.lora, LoraFileConfig(str(second)))), second, first


def test_a_lora_s_teacher_has_what_it_was_trained_on(two, tmp_path):
    """Both together are what the second is to be; and without that note, it alone."""
    cfg, second, first = two
    merge.run(cfg)
    apart = report(tmp_path / "m.safetensors")["summed"]["second/lora.safetensors"]
    on_top_of(second, first)
    merge.run(cfg)
    assert apart > 0.05 and report(tmp_path / "m.safetensors")["summed"]["second/lora.safetensors"] < 1e-9


@pytest.mark.parametrize("wrong", ["gone", "multiplier"])
def test_what_a_lora_was_trained_on_must_be_there(place, two, wrong):  # noqa: F811
    cfg, second, first = two
    if wrong == "gone":
        on_top_of(second, place / "3" / "lora.safetensors")
    else:
        on_top_of(second, first, multiplier=0.5)
    with pytest.raises(
        ConfigError, match=r"was trained on top of lora.safetensors, times .*give it too .*or .*--any-base"
    ):
        merge.run(cfg)
    merge.run(merge.replace(cfg, any_base=True))


def test_a_merge_is_on_top_of_what_its_loras_were_trained_on(place, two, tmp_path, capsys):  # noqa: F811
    """One LoRA of some says so too, unless that is among them: else its teacher would not be what it is."""
    cfg, second, first = two
    on_top_of(second, first)
    alone = merge.replace(
        cfg, lora=cfg.lora[1:], output=str(tmp_path / "one.safetensors"), target="lora",
        reconcile=merge.replace(cfg.reconcile, how="none")
    )
    merge.run(alone)
    note = "note: trained on top of lora.safetensors, times 1, which is not among these"
    assert note in capsys.readouterr().out
    merge.run(merge.replace(alone, any_base=True))
    merge.run(merge.replace(
        alone, lora=cfg.lora, on_overlap="sum", output=str(tmp_path / "both.safetensors")
    ))
    assert "note:" not in capsys.readouterr().out
    said = metadata(tmp_path / "one.safetensors")["hvtrain.base_lora"]
    assert json.loads(said) == json.loads(metadata(second)["hvtrain.base_lora"])
    assert "hvtrain.base_lora" not in metadata(tmp_path / "both.safetensors")
    third = LoraFileConfig(str(place / "3" / "lora.safetensors"))
    again = merge.replace(cfg, lora=(third, LoraFileConfig(str(tmp_path / "one.safetensors"))))
    sets = tuple(str(place / n / "calibration") for n in "31")
    with pytest.raises(ConfigError, match=r"one.safetensors: was trained on top of lora.safetensors"):
        merge.run(merge.replace(again, reconcile=merge.replace(cfg.reconcile, samples=sets)))
