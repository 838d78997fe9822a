"""Adapters in runs: every kind and option trains, resumes, is cut up by ZeRO-3, is merged, is a
slice, or is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import MergeConfig, load
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.tools import convert, info
from hvtrain.merge import run as merge
from hvtrain.parallel.context import shutdown
from hvtrain.train import run as train
from tests.train.shardset import config, make_shards

TINY = "tiny:dit.safetensors"
QKV = "double_blocks.0.img_attn_qkv"
STEM = f"lora_unet_{QKV.replace('.', '_')}"
RANKS = "adapter.ranks={'single_blocks.*': 2}"
CASES = {
    "dora": ("adapter.type=dora",),
    "lokr": (
        "adapter.type=lokr", "adapter.factor=4", "adapter.rank=2", "adapter.scale_weight_norms=0.02",
        "optim.lr=2e-2"
    ),
    "pissa": ("adapter.init=pissa", "adapter.rank_dropout=0.2", "adapter.module_dropout=0.2", RANKS),
    "plus": (
        "adapter.lr_ratios={'.*lora_up.*': 16}", "adapter.rank_stable=true",
        "adapter.scale_weight_norms=0.05", RANKS
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="module")
def base():
    from hvtrain.config import asset

    return {name: t.float() for name, t in load_file(asset(TINY)).items()}


@pytest.mark.parametrize("case", CASES)
def test_a_run_trains_resumes_and_is_the_same_cut_up(case, shards, tmp_path):
    options = (*CASES[case], "run.save_every_steps=2")
    assert train.run(config(shards, tmp_path / "a", *options, "run.steps=4")) == 0
    assert train.run(config(shards, tmp_path / "b", *options, "run.steps=2")) == 0
    assert train.run(config(shards, tmp_path / "b", *options, "run.steps=4")) == 0
    a, b = (load_file(tmp_path / run / "lora.safetensors") for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    first = load_file(tmp_path / "a/lora-step00000002.safetensors")
    assert all(not torch.equal(first[n], a[n]) for n in a if not n.endswith("alpha"))  # everything is trained
    try:
        zero = ("zero.engine=deepspeed", "zero.stage=3", "run.recompute=full")
        assert train.run(config(shards, tmp_path / "zero", *options, *zero, "run.steps=4")) == 0
    finally:
        shutdown()
    cut = load_file(tmp_path / "zero/lora.safetensors")
    for name in a:
        torch.testing.assert_close(cut[name], a[name], rtol=1e-3, atol=1e-5)
    losses = [
        [
            json.loads(line)["train/loss"]
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ] for run in ("a", "zero")
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == 4


def test_options_reach_the_layers(shards, tmp_path):
    for case in ("pissa", "plus", "lokr"):
        assert train.run(config(shards, tmp_path / case, *CASES[case], "run.steps=1")) == 0
    held = {case: load_file(tmp_path / case / "lora.safetensors") for case in ("pissa", "plus", "lokr")}
    single = "lora_unet_single_blocks_0_linear1"
    assert (
        len(held["pissa"][f"{STEM}.lora_down.weight"]) == 8
        and len(held["pissa"][f"{single}.lora_down.weight"]) == 4
    )
    assert held["plus"][f"{STEM}.alpha"] == 8 and held["plus"][f"{single}.alpha"] == pytest.approx(4 * 2**0.5)
    # Adam's first step is the rate; less where the norm is capped
    up = held["plus"][f"{STEM}.lora_up.weight"]
    norm = (up @ held["plus"][f"{STEM}.lora_down.weight"]).norm().item() * 8 / 4
    assert norm == pytest.approx(0.05, rel=1e-3) or up.abs().max().item() == pytest.approx(16e-3, rel=1e-2)
    assert train.run(config(shards, tmp_path / "up", CASES["plus"][0], "run.steps=1")) == 0
    up = load_file(tmp_path / "up/lora.safetensors")[f"{STEM}.lora_up.weight"]
    assert up.abs().max().item() == pytest.approx(16e-3, rel=1e-2)
    assert held["lokr"][f"{STEM}.lokr_w1"].shape[0] == 4
    told = json.loads(_metadata(tmp_path / "lokr/lora.safetensors")["ss_network_args"])
    assert told == {"algo": "lokr", "factor": 4}


def _metadata(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return f.metadata()


@pytest.mark.parametrize("kind, options", [("dora", ()), ("lokr", ("adapter.rank=2",))])
def test_hvtrain_merge_merges_it(kind, options, shards, base, tmp_path):
    """The model, by the formula; a DoRA only there, a LoKr also as the LoRA that it equals."""
    lr = "optim.lr=2e-2"
    assert train.run(config(shards, tmp_path / "a", f"adapter.type={kind}", *options, lr, "run.steps=3")) == 0
    items = [f"lora=[{{path: {tmp_path / 'a'}, multiplier: 0.5}}]"]
    merge.run(
        load(
            MergeConfig, None,
            [f"dit={TINY}", *items, f"output={tmp_path / 'm.safetensors'}", "dtype=float32"]
        )
    )
    merged, f = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "a/lora.safetensors")
    w = base[f"{QKV}.weight"]
    if kind == "dora":
        whole = w + f[f"{STEM}.lora_up.weight"] @ f[f"{STEM}.lora_down.weight"]
        want = w + 0.5 * (whole / whole.norm(dim=1, keepdim=True) * f[f"{STEM}.dora_scale"] - w)
    else:
        w2 = f[f"{STEM}.lokr_w2_a"] @ f[f"{STEM}.lokr_w2_b"] * 2  # alpha 4 over rank 2
        want = w + 0.5 * torch.kron(f[f"{STEM}.lokr_w1"], w2)
    torch.testing.assert_close(merged[f"{QKV}.weight"], want, rtol=1e-5, atol=1e-6)
    assert (want - w).abs().max() > 1e-4
    as_lora = load(
        MergeConfig, None, [f"dit={TINY}", *items, f"output={tmp_path / 'l.safetensors'}", "target=lora"]
    )
    if kind == "dora":
        with pytest.raises(
            CheckpointError, match="is a DoRA: what it adds to a weight depends on the weight"
        ):
            merge.run(as_lora)
        return
    merge.run(as_lora)
    g = load_file(tmp_path / "l.safetensors")
    torch.testing.assert_close(
        g[f"{STEM}.lora_up.weight"] @ g[f"{STEM}.lora_down.weight"], want - w, rtol=1e-4, atol=1e-6
    )


def test_training_on_a_merged_base(shards, tmp_path):
    """base_lora: the same run as one on the model that `hvtrain merge` writes, also in all
    weights, and its files say so."""
    assert train.run(config(shards, tmp_path / "first", "optim.lr=2e-2", "run.steps=3")) == 0
    under = f"adapter.base_lora=[{{path: {tmp_path / 'first/lora.safetensors'}, multiplier: 0.7}}]"
    items = [
        f"lora=[{{path: {tmp_path / 'first'}, multiplier: 0.7}}]", f"output={tmp_path / 'm.safetensors'}",
        "dtype=float32"
    ]
    merge.run(load(MergeConfig, None, [f"dit={TINY}", *items]))
    for kind, more in (("lora", ()), ("none", ("adapter.freeze=['double_blocks.*']",))):
        common = (f"adapter.type={kind}", "run.steps=2", "adapter.rank=32", *more)
        assert train.run(config(shards, tmp_path / f"{kind}-a", *common, under)) == 0
        assert train.run(
            config(shards, tmp_path / f"{kind}-b", *common, f"model.dit={tmp_path / 'm.safetensors'}")
        ) == 0
        a, b = (load_file(tmp_path / f"{kind}-{run}/lora.safetensors") for run in "ab")
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    own = _metadata(tmp_path / "first/lora.safetensors")["hvtrain.sha256"]
    assert json.loads(_metadata(tmp_path / "lora-a/lora.safetensors")["hvtrain.base_lora"]) == [
        {"file": "lora.safetensors", "multiplier": 0.7, "hvtrain.sha256": own}
    ]
    with pytest.raises(
        ConfigError, match=r"holds another run: adapter.base_lora is \[\[.*0.7\]\] there, \[\] here"
    ):
        train.run(config(shards, tmp_path / "lora-a", "adapter.type=lora", "run.steps=2", "adapter.rank=32"))


def test_a_full_fine_tune_of_some_weights_at_rates_of_their_own(shards, base, tmp_path):
    options = (
        "adapter.type=none", "adapter.train=['single_blocks.*', 'double_blocks.1.*']",
        "adapter.freeze=['.*bias']", "adapter.lr_ratios={'double_blocks.*': 0.25}", "run.steps=1",
        "optim.weight_decay=0", "adapter.rank=32", "adapter.alpha=32",
    )  # fmt: skip
    assert train.run(config(shards, tmp_path / "a", *options)) == 0
    try:
        zero = ("zero.engine=deepspeed", "zero.stage=3")
        assert train.run(config(shards, tmp_path / "zero", *options, *zero)) == 0
    finally:
        shutdown()
    for run in ("a", "zero"):
        made = load_file(tmp_path / run / "lora.safetensors")
        assert made.keys() == base.keys()
        moved = {n: (made[n].float() - base[n].bfloat16().float()).abs().max().item() for n in base}
        for name, size in moved.items():
            mine = name.startswith(("single_blocks.", "double_blocks.1.")) and not name.endswith("bias")
            assert mine or size == 0, name
            # of a norm's 1.0 bfloat16 does not see the step
            assert not mine or size > 0 or made[name].ndim == 1, name
        single, double = (
            max(s for n, s in moved.items() if n.startswith(block))
            for block in ("single_blocks", "double_blocks")
        )
        # Adam's first step is the rate, but for bfloat16
        assert 0.5e-3 < single < 4e-3 and double < 0.5 * single


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_slices_of_every_kind(kind, shards, base, tmp_path):
    """Two owners of a block each: together as apart, and what nobody owns is as it was."""
    common = (
        "adapter.type=loraid", f"adapter.slice_type={kind}", "adapter.blocks_per_loraid=1", "optim.lr=2e-2",
        "run.steps=2"
    )
    for i in (1, 2):
        assert train.run(config(shards, tmp_path / f"{i}", *common, f"adapter.loraid={i}")) == 0
    loras = [f"{{path: {tmp_path / str(i)}}}" for i in (1, 2)]
    for name, own in (("1", loras[:1]), ("2", loras[1:]), ("both", loras)):
        items = [
            f"lora=[{', '.join(own)}]", f"output={tmp_path / name}.safetensors", "dtype=float32",
            "reconcile.how=none"
        ]
        merge.run(load(MergeConfig, None, [f"dit={TINY}", *items]))
    one, two, both = (load_file(tmp_path / f"{name}.safetensors") for name in ("1", "2", "both"))
    changed = [{n for n in base if not torch.equal(m[n], base[n])} for m in (one, two)]
    assert changed[0] and changed[1] and not changed[0] & changed[1]
    for name in base:
        assert torch.equal(both[name], one[name] if name in changed[0] else two[name]), name


def test_a_lokr_is_a_slice_of_whole_layers_only(shards, tmp_path):
    from hvtrain.adapters.attach import linear_shapes
    from hvtrain.config import asset
    from hvtrain.models.load import identify, whole_model
    from hvtrain.slices.plan import Cut, make_plan, save_plan
    from hvtrain.weights.containers import fingerprint

    common = (
        "adapter.type=loraid", "adapter.slice_type=lokr", "adapter.loraid=1", "run.steps=1", "adapter.rank=1"
    )
    assert train.run(config(shards, tmp_path / "a", *common, "adapter.blocks_per_loraid=1")) == 0
    assert any(n.endswith("lokr_w1") for n in load_file(tmp_path / "a/lora.safetensors"))
    found = identify(asset(TINY))
    shapes = linear_shapes(whole_model(found))
    layers = {n: shapes[n] for n in found.spec.lora_targets(whole_model(found))}
    plan = make_plan(layers, Cut(n=7, granularity="rows"), model=found.spec.name, flavor=found.flavor.name,
                     base=fingerprint(found.weights))  # fmt: skip
    save_plan(plan, tmp_path / "plan.json")
    cut = next(
        s.loraid for s in plan.slices if any((o.begin, o.end) != (0, shapes[o.module][0]) for o in s.slots)
    )
    common = (*common, f"adapter.loraid={cut}")
    with pytest.raises(
        ConfigError,
        match="a slice of some rows, of a LoKr: some rows of a Kronecker product are no Kronecker"
    ):
        train.run(config(shards, tmp_path / "b", *common, f"adapter.plan={tmp_path / 'plan.json'}"))


@pytest.mark.parametrize("options, says", [
    (("adapter.type=none", "adapter.dropout=0.1"), "adapter.dropout is given, but a full fine-tune has no "
    "adapter"),
    (("adapter.train=['.*']",), "adapter.train is given, but it is for adapter.type none, it is lora"),
    (("adapter.init_balance=true",), "adapter.init_balance is for adapter.init_from"),
    (("adapter.slice_type=dora",), "adapter.slice_type is for adapter.type loraid, it is lora; set "
    "adapter.type=dora"),
    (("adapter.ranks={'.*': 0}",), r"adapter.ranks\[\.\*\] is 0, expected more than 0"),
    (("adapter.lr_ratios={'.*': 0}",), r"adapter.lr_ratios\[\.\*\] is 0.0, expected more than 0"),
    (("adapter.lr_ratios={'nothing': 2}",), "adapter.lr_ratios: 'nothing' matches nothing that is trained"),
    (("adapter.ranks={'single.*': 999}",), "adapter.rank is 999, but a layer of"),
    (("adapter.module_dropout=1",), "adapter.module_dropout is 1.0, expected at least 0 and below 1"),
    (("adapter.base_lora=[{path: nowhere.safetensors}]",), "adapter.base_lora: nowhere.safetensors does not "
    "exist"),
    (("adapter.type=lora", "adapter.factor=4"), "adapter.factor is 4, but it is a LoKr's"),
    (("adapter.type=loraid", "adapter.slice_type=lohra", "adapter.blocks_per_loraid=1", "adapter.loraid=1"),
     "adapter.slice_type: no adapter 'lohra'"),
    (("adapter.type=none", "adapter.freeze=['.*']", "adapter.rank=32"), "leave nothing to train"),
    (
        ("adapter.type=none", "model.dit=null", "model.flavor=tiny", "adapter.freeze=['.*bias']"),
        "need weights that are there"
    ),
])  # fmt: skip
def test_what_does_not_compose_is_refused_by_name(options, says, shards, tmp_path):
    with pytest.raises(ConfigError, match=says):
        train.run(config(shards, tmp_path / "x", *options))
    assert not (tmp_path / "x").exists()


def test_a_dora_for_comfyui(shards, base, tmp_path):
    """Which brings the rows of W + delta to m |W + delta| / |W|: by its formula the file
    gives what the merge gives."""
    assert train.run(config(shards, tmp_path / "a", "adapter.type=dora", "optim.lr=5e-2", "run.steps=3")) == 0
    file = str(tmp_path / "a/lora.safetensors")
    with pytest.raises(ConfigError, match="--to comfyui of a DoRA: .* give the model, --dit FILE"):
        convert(file, str(tmp_path / "c.safetensors"), target="comfyui")
    with pytest.raises(CheckpointError, match="is a DoRA"):
        convert(file, str(tmp_path / "c.safetensors"), target="diffusers", dit=TINY)
    convert(file, str(tmp_path / "c.safetensors"), target="comfyui", dit=TINY)
    merge.run(
        load(
            MergeConfig, None,
            [
                f"dit={TINY}", f"lora=[{{path: {file}}}]", f"output={tmp_path / 'm.safetensors'}",
                "dtype=float32"
            ]
        )
    )  # fmt: skip
    merged, f, w = (
        load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "c.safetensors"), base[f"{QKV}.weight"]
    )
    stem = f"diffusion_model.{QKV}"
    whole = w + f[f"{stem}.lora_B.weight"] @ f[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(
        whole * f[f"{stem}.dora_scale"] / w.norm(dim=1, keepdim=True), merged[f"{QKV}.weight"]
    )
    assert (f[f"{stem}.dora_scale"] - load_file(file)[f"{STEM}.dora_scale"]).abs().max() > 1e-3
    with pytest.raises(
        CheckpointError, match="a DoRA rewritten for comfyui; give the file that it was made of"
    ):
        convert(str(tmp_path / "c.safetensors"), str(tmp_path / "d.safetensors"), target="musubi")
    assert next(info(file)).startswith(f"{file}: DoRA for hunyuan-video")
