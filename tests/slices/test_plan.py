"""Slice plans: complete, disjoint, balanced; what cannot be is refused. And adapters that own rows."""

import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from hvtrain.adapters.attach import inject, whole_rows
from hvtrain.adapters.lora import LoraLinear
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.models import all_specs
from hvtrain.slices.plan import Cut, Slice, Slot, check_disjoint, load_plan, make_plan, save_plan
from hvtrain.slices.run import plan_for
from hvtrain.train import run as train
from launcher import cli
from tests.train.shardset import config, make_shards

FULL = {"dit": None, "model": "hunyuan-video", "flavor": None}
SMALL = {
    f"blocks.{b}.{m}": s for b in range(6) for m,
    s in {"qkv": (90, 30), "proj": (30, 30), "fc": (120, 30)}.items()
}


def owned(plan):
    """(layer, row) -> how many slices own it."""
    return Counter(
        (slot.module, row) for s in plan.slices for slot in s.slots for row in range(slot.begin, slot.end)
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 18), granularity=st.sampled_from(["block", "module", "rows"]),
    order=st.sampled_from(["contiguous", "interleaved"]),
)
def test_every_row_belongs_to_exactly_one_slice(n, granularity, order):
    if granularity == "block" and n > 6:
        with pytest.raises(ConfigError, match="6 blocks"):
            make_plan(SMALL, Cut(n=n, granularity=granularity, order=order), model="m", flavor="f")
        return
    plan = make_plan(SMALL, Cut(n=n, granularity=granularity, order=order), model="m", flavor="f")
    count = owned(plan)
    assert set(count.values()) == {1} and len(count) == sum(out for out, _ in SMALL.values())
    assert sum(s.parameters for s in plan.slices) == sum(out * width for out, width in SMALL.values())
    assert [s.loraid for s in plan.slices] == list(range(1, n + 1))
    check_disjoint(plan)
    if granularity == "rows":
        assert plan.balance <= 1.1 or n > 15
    if (granularity, order) == ("rows", "interleaved"):
        assert all(len({slot.module for slot in s.slots}) == len(SMALL) for s in plan.slices)


@pytest.mark.parametrize("n", [2, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("granularity", ["module", "rows"])
@pytest.mark.parametrize("order", ["contiguous", "interleaved"])
def test_the_full_model_is_cut_evenly(n, granularity, order):
    plan = plan_for(Cut(n=n, granularity=granularity, order=order), **FULL)
    assert plan.n == n and plan.balance <= 1.1


def test_240_slices_of_layers_and_more_of_rows():
    assert plan_for(Cut(n=240, granularity="module"), **FULL).n == 240
    assert plan_for(Cut(n=960, granularity="rows", order="interleaved"), **FULL).balance == 1.0


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (Cut(n=240, granularity="block"), "60 blocks.*module makes up to 240"),
        (Cut(n=241, granularity="module"), "240 LoRA targets"),
        (Cut(n=5000, granularity="rows", order="interleaved"), "3072 output rows"),
        (Cut(), "either --n"),
        (Cut(n=2, blocks_per_loraid=2), "either --n"),
        (Cut(blocks_per_loraid=12, granularity="rows"), "give --n"),
        (Cut(n=2, granularity="layer"), "--granularity"),
        (Cut(n=2, include=("nothing",)), "matches no layer"),
        (Cut(n=2, include=(r"double.*",), exclude=(r".*",)), "leave no layer"),
    ],
)
def test_what_cannot_be_is_refused(cut, says):
    with pytest.raises(ConfigError, match=says):
        plan_for(cut, **FULL)


def test_classic_block_ranges_and_patterns():
    plan = plan_for(Cut(blocks_per_loraid=12), **FULL)
    assert plan.n == 5
    assert {s.module.split(".")[1] for s in plan.slice(1).slots} == {str(i) for i in range(12)}
    with pytest.raises(ConfigError, match=r"LORAID 6: this plan has 5 slices.*60 blocks, 12 a LORAID"):
        plan.slice(6)
    # Whitelist first, blacklist overrides.
    plan = plan_for(Cut(n=2, include=(r"double_blocks.*",), exclude=(r".*txt.*",)), **FULL)
    modules = {slot.module for s in plan.slices for slot in s.slots}
    assert len(modules) == 80 and all(m.startswith("double") and "txt" not in m for m in modules)


@pytest.mark.parametrize("spec", all_specs(), ids=lambda s: s.name)
def test_slices_of_every_model_are_disjoint_and_complete(spec):
    for flavor in spec.flavors:
        plan = plan_for(
            Cut(n=3, granularity="rows", order="interleaved"), dit=None, model=spec.name, flavor=flavor
        )
        ends = Counter()
        for s in plan.slices:
            for slot in s.slots:
                ends[slot.module] += slot.end - slot.begin
        check_disjoint(plan)
        with torch.device("meta"):
            model = spec.build(spec.flavors[flavor].arch)
        assert ends == {n: model.get_submodule(n).out_features for n in spec.lora_targets(model)}


def test_a_plan_file_is_read_back_and_an_edited_one_refused(tmp_path, capsys):
    asked = ["--n", "4", "--granularity", "block", "--output", str(tmp_path)]
    assert cli.main(["slices", "plan", "--dit", "tiny:dit.safetensors", *asked]) == 0
    out = capsys.readouterr().out
    assert "LORAID   4" in out and (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    plan = load_plan(tmp_path / "plan.json")
    assert plan.n == 4 and plan.base and plan.flavor == "tiny"
    assert cli.main(
        ["slices", "plan", "--dit", "tiny:dit.safetensors", "--n", "4", "--output", str(tmp_path)]
    ) == 2
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"rows": [0, ', '"rows": [1, ', 1))
    with pytest.raises(ConfigError, match="was changed after it was made"):
        load_plan(tmp_path / "plan.json")
    both = plan.slices[0], Slice(2, 1, (Slot(plan.slices[0].slots[0].module, 5, 6),))
    overlapping = type(plan)(**{**vars(plan), "slices": both, "n": 2})
    save_plan(overlapping, tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="slices 1 and 2 both own rows of"):
        load_plan(tmp_path / "plan.json")


# --- adapters -----------------------------------------------------------------------------------------------


def test_rows_outside_a_slot_have_no_parameters_and_do_not_move():
    model = torch.nn.Sequential(torch.nn.Linear(6, 10))
    x = torch.randn(3, 6)
    before = model(x).detach()
    inject(model, ["0"], rank=2, alpha=4.0, rows={"0": (3, 7)})
    layer = model[0]
    assert isinstance(layer, LoraLinear) and layer.lora_up.weight.shape == (4, 2)
    torch.nn.init.normal_(layer.lora_up.weight)
    after = model(x)
    assert torch.equal(after[:, :3], before[:, :3]) and torch.equal(after[:, 7:], before[:, 7:])
    assert not torch.allclose(after[:, 3:7], before[:, 3:7])
    whole = whole_rows(model, {"0.lora_up.weight": layer.lora_up.weight.detach()})["0.lora_up.weight"]
    assert whole.shape == (10, 2) and not whole[:3].any() and not whole[7:].any()
    delta = 2.0 * whole @ layer.lora_down.weight
    assert torch.allclose(after, before + x @ delta.T, atol=1e-5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    cut = Cut(n=3, granularity="rows", order="interleaved")
    save_plan(plan_for(cut, dit="tiny:dit.safetensors", model=None, flavor=None), path)
    return path


def sliced(plan, loraid, *more):
    return ["adapter.type=loraid", f"adapter.plan={plan}", f"adapter.loraid={loraid}", *more]


DEEPSPEED = "zero.engine=deepspeed"


@pytest.mark.parametrize(
    "engine", [["zero.engine=torch"], [DEEPSPEED, "zero.stage=2"], [DEEPSPEED, "zero.stage=3"]]
)
def test_a_trained_slice_is_an_ordinary_lora_that_stays_in_its_slots(shards, plan, tmp_path, engine):
    out = tmp_path / "run"
    ema = [] if "zero.stage=3" in engine else ["run.ema_decay=0.5"]
    keys = sliced(plan, 2, "adapter.dropout=0.1", "optim.weight_decay=0.5", "run.steps=4", *ema, *engine)
    train.run(config(shards, out, *keys, "run.save_every_steps=2"))
    names = ["lora.safetensors", *(["lora-ema.safetensors"] if ema else [])]
    slots = {s.module: (s.begin, s.end) for s in load_plan(plan).slice(2).slots}
    for name in names:
        tensors = load_file(out / name)
        for module, (begin, end) in slots.items():
            up = tensors[f"lora_unet_{module.replace('.', '_')}.lora_up.weight"]
            assert not up[:begin].any() and not up[end:].any() and up[begin:end].any(), module
        assert len(tensors) == 3 * len(slots)
        with safe_open(out / name, "pt") as file:
            meta = file.metadata()
        assert meta["ss_loraid"] == "2" and meta["hvtrain.plan"] == load_plan(plan).hash
        assert json.loads(meta["ss_network_args"])["granularity"] == "rows"
    # The last checkpoint continues, and gives the very same file.
    whole = load_file(out / "lora.safetensors")
    train.run(
        config(shards, out, *[k for k in keys if k != "run.steps=4"], "run.save_every_steps=2", "run.steps=4")
    )
    assert all(torch.equal(t, whole[n]) for n, t in load_file(out / "lora.safetensors").items())


def test_slices_are_runs_of_their_own(shards, plan, tmp_path):
    train.run(config(shards, tmp_path / "run", *sliced(plan, 1), "run.steps=1"))
    with pytest.raises(ConfigError, match="adapter.loraid is 1 there, 2 here"):
        train.run(config(shards, tmp_path / "run", *sliced(plan, 2), "run.steps=1"))
    warm = [f"adapter.init_from={tmp_path / 'run/lora.safetensors'}", "run.steps=1"]
    train.run(config(shards, tmp_path / "more", *sliced(plan, 1), *warm))
    with pytest.raises(CheckpointError, match="another slice"):
        train.run(config(shards, tmp_path / "other", *sliced(plan, 2), *warm))
    classic = ["adapter.type=loraid", "adapter.blocks_per_loraid=2", "adapter.loraid=2", "run.steps=1"]
    train.run(config(shards, tmp_path / "classic", *classic))
    blocks = {
        re.search(r"(double|single)_blocks_\d+", n)[0]
        for n in load_file(tmp_path / "classic/lora.safetensors")
    }
    assert blocks == {"single_blocks_0", "single_blocks_1"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["adapter.plan=PLAN"], "adapter.plan is for adapter.type loraid"),
        (["adapter.type=loraid", "adapter.loraid=1"], "give adapter.plan"),
        (["adapter.type=loraid", "adapter.plan=PLAN"], "which slice"),
        (
            ["adapter.type=loraid", "adapter.plan=PLAN", "adapter.loraid=9"],
            "LORAID 9: this plan has 3 slices"
        ),
        (["adapter.type=loraid", "adapter.plan=gone.json", "adapter.loraid=1"], "gone.json does not exist"),
        (
            ["adapter.type=loraid", "adapter.plan=PLAN", "adapter.loraid=1", "adapter.exclude=[x]"],
            "a plan says which layers"
        ),
        (["adapter.type=loraid", "adapter.blocks_per_loraid=12", "adapter.loraid=5"], r"LORAID 5: this plan "
        r"has 1 slices"),
    ],
)
def test_mistakes(shards, plan, tmp_path, keys, says):
    with pytest.raises(ConfigError, match=says):
        train.run(config(shards, tmp_path / "x", *[k.replace("PLAN", str(plan)) for k in keys]))


def test_a_plan_of_other_weights_is_refused(shards, tmp_path):
    path = tmp_path / "plan.json"
    made = plan_for(Cut(n=3, granularity="rows"), dit="tiny:dit.safetensors", model=None, flavor=None)
    save_plan(type(made)(**{**vars(made), "base": "0" * 64}), path)
    with pytest.raises(CheckpointError, match="made for the weights 0000"):
        train.run(config(shards, tmp_path / "x", *sliced(path, 1)))
    save_plan(plan_for(Cut(n=3, granularity="rows"), **FULL), path)
    with pytest.raises(CheckpointError, match="no such layer|output rows"):
        train.run(config(shards, tmp_path / "x", *sliced(path, 1)))
