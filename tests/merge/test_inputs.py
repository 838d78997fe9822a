"""What goes into a merge: LoRA files, runs and the slices of a plan, and what of
them is refused, word for word."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hvtrain.config import LoraFileConfig, MergeConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles import runs
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge.inputs import (
    Inputs,
    PlanSlices,
    check_slots,
    finished,
    learning_rate,
    lora_in,
    open_inputs,
    owners_note,
    slices_of,
)
from hvtrain.merge.reconcile import write_slices
from hvtrain.slices.plan import Cut, make_plan, save_plan
from tests.adapters.models import SPEC

SHAPES = {f"double_blocks.{i}.img_attn_proj": (8, 4) for i in range(4)}
FIRST = "double_blocks.0.img_attn_proj"


def pair(rows=range(8), *, rank=1, alpha=1.0, value=1.0):
    up = torch.zeros(8, rank)
    up[list(rows)] = value
    return LoraPair(torch.ones(rank, 4), up, alpha)


def lora(path, layers=(FIRST,), rows=range(8), **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, {name: pair(rows) for name in layers}, metadata=metadata)
    return path


def run_of(folder, name="lora", **given):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run: {{name: {name}}}\n")
    return lora(folder / f"{name}.safetensors", **given)


def config(*paths, **given):
    return MergeConfig(lora=tuple(LoraFileConfig(str(p)) for p in paths), output="m.safetensors", **given)


def opened(cfg, shapes, spec, *, base):
    slices = (
        None if cfg.plan is None
        else PlanSlices(Path(cfg.plan), cfg.slices and Path(cfg.slices), cfg.allow_missing)
    )
    return open_inputs(cfg.lora, slices, shapes, spec, base=None if cfg.any_base else base)


def refusal(error, function, *arguments, **given):
    with pytest.raises(error) as refused:
        function(*arguments, **given)
    return str(refused.value)


# --- runs and slices ----------------------------------------------------------------------------------------


def test_a_run_and_what_it_lacks(tmp_path):
    path = run_of(tmp_path / "a", "cat")
    assert finished(tmp_path / "a") == path == lora_in(tmp_path / "a") == lora_in(path) == lora_in(str(path))
    path.unlink()
    assert finished(tmp_path / "a") == f"{tmp_path / 'a'} is not finished (no cat.safetensors yet)"
    assert refusal(
        CheckpointError, lora_in, tmp_path / "a"
    ) == f"{tmp_path / 'a'}: {finished(tmp_path / 'a')}"
    (tmp_path / "b").mkdir()
    assert finished(tmp_path / "b") == f"{tmp_path / 'b'} holds no run"
    for text in ("", "other: 1", "run: {}"):  # a run without a name is `lora`
        (tmp_path / "b" / "config.yaml").write_text(text)
        assert finished(tmp_path / "b") == f"{tmp_path / 'b'} is not finished (no lora.safetensors yet)"
    for text in ("- a\n: {", "[1]", "run: text"):
        (tmp_path / "b" / "config.yaml").write_text(text)
        assert finished(
            tmp_path / "b"
        ) == f"{tmp_path / 'b' / 'config.yaml'} is damaged: not the config of a run"
    there = tmp_path / "none"
    assert refusal(
        ConfigError, lora_in, there
    ) == f"{there} does not exist; give a LoRA file or a run's directory"


@pytest.fixture
def plan(tmp_path):
    found = make_plan(
        SHAPES, Cut(n=2, granularity="module", order="contiguous"), model=SPEC.name, flavor="tiny"
    )
    save_plan(found, tmp_path / "plan.json")
    return found


def layers_of(plan, loraid):
    return [slot.module for slot in plan.slice(loraid).slots]


def test_where_slices_are_looked_for(plan, tmp_path):
    for number, place in enumerate(("1", "01", "001", "0001", "slices/1", "slices/01", "slices/0001")):
        path = run_of(tmp_path / str(number) / "runs" / place)
        there, gaps = slices_of(plan, tmp_path / str(number) / "runs")
        assert there == {1: path}
        assert gaps == {2: f"no folder {tmp_path / str(number) / 'runs' / '02'}"}
    (tmp_path / "6" / "runs" / "02").mkdir()
    there, gaps = slices_of(plan, tmp_path / "6" / "runs")
    assert gaps == {2: f"{tmp_path / '6' / 'runs' / '02'} holds no run"}


def test_slots_are_proved_from_the_tensors(plan):
    def slice_file(layers, rows=range(8), loraid="1", **metadata):
        return LoraFile(
            Path("s.safetensors"), {n: pair(rows) for n in layers}, {"ss_loraid": loraid, **metadata}
        )

    own, other = layers_of(plan, 1), layers_of(plan, 2)
    check_slots(slice_file(own), plan)
    check_slots(slice_file(own, **{"hvtrain.plan": plan.hash}), plan)
    check_slots(slice_file(other, rows=[]), plan)  # nothing in it
    assert refusal(CheckpointError, check_slots, slice_file(other[:1], rows=[2, 5]), plan) == (
        f"s.safetensors: LORAID 1 changes rows 2 to 5 of '{other[0]}', it owns none of that layer"
    )
    assert refusal(CheckpointError, check_slots, slice_file(own, **{"hvtrain.plan": "f" * 64}), plan) == (
        f"s.safetensors: trained by another plan ({'f' * 12}), this is {plan.hash[:12]}"
    )
    for said in ("", "1,2", "x", "²"):
        assert refusal(CheckpointError, check_slots, slice_file(own, loraid=said), plan) == (
            f"s.safetensors: does not say which slice it is (ss_loraid '{said}')"
        )
    silent = LoraFile(Path("s.safetensors"), {own[0]: pair()}, {})
    assert refusal(CheckpointError, check_slots, silent, plan) == (
        "s.safetensors: does not say which slice it is (ss_loraid '')"
    )


def test_rows_of_a_slice(tmp_path):
    plan = make_plan(SHAPES, Cut(n=3, granularity="rows", order="contiguous"), model=SPEC.name, flavor="tiny")
    for s in plan.slices:
        for slot in s.slots:
            def check(rows, slot=slot, s=s):
                check_slots(
                    LoraFile(Path("s"), {slot.module: pair(rows)}, {"ss_loraid": str(s.loraid)}), plan
                )

            check(range(slot.begin, slot.end))
            for outside in ({*range(8)} - {*range(slot.begin, slot.end)}):
                message = refusal(CheckpointError, check, [outside])
                said = (
                    f"s: LORAID {s.loraid} changes rows {outside} to {outside} of '{slot.module}', it owns "
                )
                assert message == said + f"{slot.begin} to {slot.end - 1}"


def test_inputs_of_a_plan(plan, tmp_path):
    paths = [run_of(tmp_path / f"0{i}", layers=layers_of(plan, i), ss_loraid=str(i)) for i in (1, 2)]
    cfg = config(plan=str(tmp_path / "plan.json"))
    found = opened(cfg, SHAPES, SPEC, base=None)
    assert [(x.path, m) for x, m in found.loras] == [(p, 1.0) for p in paths]
    assert found.plan == plan and found.missing == ()
    extra = lora(tmp_path / "extra.safetensors")  # an ordinary LoRA beside them is no slice
    both = replace(cfg, lora=(LoraFileConfig(str(extra), 0.5),))
    assert [(x.path, m) for x, m in opened(both, SHAPES, SPEC, base=None).loras] == [
        (extra, 0.5), (paths[0], 1.0), (paths[1], 1.0),
    ]  # fmt: skip
    paths[1].unlink()
    why = f"{tmp_path / '02'} is not finished (no lora.safetensors yet)"
    assert refusal(CheckpointError, opened, cfg, SHAPES, SPEC, base=None) == (
        f"1 of 2 slices are not there: LORAID 2: {why}. Finish them, or --allow-missing"
    )
    assert opened(replace(cfg, allow_missing=True), SHAPES, SPEC, base=None).missing == (2,)
    moved = tmp_path / "elsewhere"
    run_of(moved / "01", layers=layers_of(plan, 2), ss_loraid="1")  # trespasses
    run_of(moved / "02", layers=layers_of(plan, 2), ss_loraid="2")
    there = replace(cfg, slices=str(moved))
    assert "it owns none of that layer" in refusal(CheckpointError, opened, there, SHAPES, SPEC, base=None)
    for name in ("01", "02"):
        (moved / name / "lora.safetensors").unlink()
    both_gone = refusal(CheckpointError, opened, there, SHAPES, SPEC, base=None)
    assert both_gone.startswith("2 of 2 slices are not there: LORAID 1: ") and "; LORAID 2: " in both_gone
    nothing = replace(there, allow_missing=True)
    assert refusal(ConfigError, opened, nothing, SHAPES, SPEC, base=None) == (
        "lora: nothing to merge; give at least one LoRA file, or a plan with finished slices"
    )


def test_base_weights_are_compared(tmp_path):
    path = lora(tmp_path / "a.safetensors", **{"hvtrain.base": "a" * 64})
    wrong = refusal(CheckpointError, opened, config(path), SHAPES, SPEC, base="b" * 64)
    assert wrong == (
        f"{path}: trained on other weights ({'a' * 16}) than this model's ({'b' * 16}); give the model it "
        "was trained on, or --any-base if it is meant to go onto this one"
    )
    for base in ("a" * 64, None):
        opened(config(path), SHAPES, SPEC, base=base)
    opened(config(path, any_base=True), SHAPES, SPEC, base="b" * 64)
    for said in ({}, {"hvtrain.base": "scratch"}):
        opened(config(lora(tmp_path / "b.safetensors", **said)), SHAPES, SPEC, base="b" * 64)


def test_a_plan_must_fit_the_base_too(tmp_path):
    plan = make_plan(SHAPES, Cut(n=2), model=SPEC.name, flavor="tiny", base="a" * 64)
    save_plan(plan, tmp_path / "plan.json")
    for i in (1, 2):
        run_of(tmp_path / f"0{i}", layers=layers_of(plan, i), ss_loraid=str(i))
    cfg = config(plan=str(tmp_path / "plan.json"))
    opened(cfg, SHAPES, SPEC, base="a" * 64)
    assert str(tmp_path / "plan.json") in refusal(CheckpointError, opened, cfg, SHAPES, SPEC, base="b" * 64)
    opened(replace(cfg, any_base=True), SHAPES, SPEC, base="b" * 64)
    other = dict.fromkeys(SHAPES, (16, 4))
    refusal(CheckpointError, opened, cfg, other, SPEC, base=None)


def test_owners():
    def of(said):
        return (LoraFile(Path("x"), {}, {} if said is None else {"ss_loraid": said}), 1.0)

    assert owners_note([of("3"), of(None), of("1,2"), of("2,3"), of("")]) == "3,1,2"
    assert owners_note([of(None)]) == ""


def test_inputs_are_a_record():
    assert Inputs([], None).missing == () and runs.CONFIG == "config.yaml"


def test_the_rate_is_the_least_that_anyone_says():
    def of(**metadata):
        return LoraFile(Path("s.safetensors"), {}, metadata), 1.0

    said = of(ss_learning_rate="2e-3"), of(), of(ss_learning_rate="0.0005"), of(ss_learning_rate="by cosine")
    assert learning_rate(said) == 5e-4 and learning_rate(said[:2]) == 2e-3
    assert learning_rate(said[1:2]) is None and learning_rate(said[3:]) is None
    none = [of(ss_learning_rate=text) for text in ("nan", "inf", "-1e-3", "0")]  # no rates to train by
    assert learning_rate(none) is None and learning_rate([*none, said[0]]) == 2e-3
    for name, rate in (
        ("adamw", 2e-3), ("torch.optim.adamw.AdamW", 2e-3), ("bitsandbytes.optim.AdamW8bit", 2e-3),
        ("muon", 2e-3), ("schedulefree", 2e-3), ("came", 2e-3), ("prodigy", None), ("lion", None),
        ("adafactor", None), ("torch.optim.SGD", None)
    ):
        assert learning_rate([of(ss_learning_rate="2e-3", ss_optimizer=name)]) == rate, name


def test_a_lora_beside_a_plans_slices_is_none_of_them(plan, tmp_path):
    """It has no number, and what it changes is in none of their files."""
    extra, *slices = [LoraFile(tmp_path / f"{i}.safetensors", {}, {"ss_loraid": str(i)} if i else {})
                      for i in range(3)]  # fmt: skip
    for loras, missing in (([extra, *slices], ()), ([extra, slices[1]], (1,)), ([extra], (1, 2))):
        inputs = Inputs([(lora, 1.0) for lora in loras], plan, missing)
        assert write_slices(tmp_path / "m.safetensors", inputs, {}) is None


# --- what a LoRA was trained on top of ----------------------------------------------------------------------


def on_top(**said):
    """Of a LoRA that says this of what it was trained on, after one with a sum and one without."""
    known = LoraFile(Path("a.safetensors"), {}, {"hvtrain.sha256": "abc"})
    text = {"hvtrain.base_lora": said["text"] if "text" in said else json.dumps([said])}
    return Inputs([(known, 1.0), (LoraFile(Path("b.safetensors"), {}), 1.0),
                   (LoraFile(Path("c.safetensors"), {}, text), 1.0)], None)  # fmt: skip


def test_what_a_lora_was_trained_on_is_known_by_its_sum():
    said = {"file": "a.safetensors", "multiplier": 1}
    assert on_top(**said, **{"hvtrain.sha256": "abc"}).built_on() == [(), (), (0,)]
    assert replace(on_top(text="{"), any_base=True).built_on() == [(), (), ()]  # nobody asks
    # as older versions wrote it; that another LoRA has no sum either does not make it the one
    wrong = refusal(ConfigError, on_top(**said).built_on)
    assert wrong.startswith("c.safetensors: was trained on top of a.safetensors, times 1, which as it was")


@pytest.mark.parametrize("said", [
    {"text": "{"}, {"text": "[" * 100_000}, {"text": "7"}, {"text": "[1]"}, {"text": '{"file": "a"}'},
    {"multiplier": 1.0}, {"file": "a"}, {"file": 3, "multiplier": 1.0}, {"file": "a", "multiplier": "1"},
    {"file": "a", "multiplier": float("nan")}, {"file": "a", "multiplier": 10**400},
    {"file": "a", "multiplier": 1.0, "hvtrain.sha256": ["abc"]},
])  # fmt: skip
def test_what_it_says_of_that_may_be_damaged(said):
    wrong = refusal(CheckpointError, on_top(**said).built_on)
    assert wrong.startswith("c.safetensors: damaged: its metadata 'hvtrain.base_lora' ")
