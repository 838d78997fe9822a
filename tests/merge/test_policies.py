"""Merging many: disjointness from the tensors, every policy by its definition, what
is refused, what is reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import LoraFileConfig, MergeConfig, asset
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.metadata import lora_metadata
from hvtrain.lorafiles.overlap import Contribution, overlaps
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge import run as merge
from hvtrain.merge.policies import POLICIES, Dense, Options
from hvtrain.models.load import load_dit, save_dit
from hvtrain.slices.plan import Cut, load_plan, save_plan
from hvtrain.slices.run import plan_for
from hvtrain.weights.stream import open_resumable
from launcher import cli
from shards.tensors import Extent
from tests.train.shardset import make_shards

LAYER = "double_blocks.0.img_attn_qkv"


def pair(seed, *, out=12, width=9, rank=3, rows=None, alpha=3.0):
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=g)
    if rows is not None:
        up[[i for i in range(out) if i not in rows]] = 0
    return LoraPair(torch.randn(rank, width, generator=g), up, alpha)


def contributions(*rows, multipliers=(1.0, 0.5, 2.0)):
    return [Contribution(f"lora{i}", pair(i, rows=r), m) for i, (r, m) in enumerate(zip(rows, multipliers))]


def total(result):
    return result.delta() if isinstance(result, Dense) else sum(c.delta() for c in result)


ALL = range(12)


def test_overlap_is_told_from_the_tensors():
    layers = {
        "a": contributions(range(4), range(4, 8), range(6, 12)), "b": contributions(range(4), range(4, 8))
    }
    (found,) = overlaps(layers)
    assert (found.module, found.first, found.second, found.n_rows) == ("a", "lora1", "lora2", 2)
    with pytest.raises(
        CheckpointError, match="lora1 and lora2 both change 2 rows of 'a'.*--on-overlap sum, average"
    ):
        POLICIES["error"](layers["a"], "a", Options())
    assert POLICIES["error"](layers["b"], "b", Options()) == layers["b"]


def test_sum_average_and_priority():
    found = contributions(ALL, range(6), range(3, 12))
    d = [c.delta() for c in found]
    assert torch.allclose(total(POLICIES["sum"](found, "a", Options())), sum(d))
    n = torch.tensor([2.0] * 3 + [3.0] * 3 + [2.0] * 6)[:, None]
    assert torch.allclose(total(POLICIES["average"](found, "a", Options())), sum(d) / n, atol=1e-6)
    found = contributions(range(3, 6), ALL, range(6))
    d = [c.delta() for c in found]
    wanted = d[1].clone()
    wanted[3:6] = d[0][3:6]
    assert torch.allclose(total(POLICIES["priority"](found, "a", Options())), wanted, atol=1e-6)


def test_orthogonal_later_ones_do_not_answer_to_earlier_inputs():
    found = contributions(ALL, ALL)
    first, second = POLICIES["orthogonal"](found, "a", Options())
    assert torch.equal(first.pair.down, found[0].pair.down)
    assert (second.delta() @ found[0].pair.down.T).abs().max() < 1e-4  # inputs that the first reads
    x = torch.linalg.svd(found[0].pair.down).Vh[3:]  # inputs that it does not read
    assert torch.allclose(second.delta() @ x.T, found[1].delta() @ x.T, atol=1e-4)


def test_ties_by_its_definition():
    found = contributions(ALL, ALL, ALL)
    deltas = [c.delta() for c in found]
    k = round(0.3 * deltas[0].numel())
    trimmed = []
    for d in deltas:
        limit = d.abs().flatten().sort(descending=True).values[k - 1]
        trimmed.append(torch.where(d.abs() >= limit, d, 0.0))
    sign = sum(trimmed).sign()
    kept = [torch.where((t.sign() == sign) & (t != 0), t, 0.0) for t in trimmed]
    n = sum((t != 0).float() for t in kept).clamp_min(1)
    assert torch.allclose(total(POLICIES["ties"](found, "a", Options(density=0.3))), sum(kept) / n, atol=1e-5)


def test_dare_keeps_a_share_and_the_mean():
    found = contributions(ALL, ALL)
    draws = [total(POLICIES["dare"](found, "a", Options(density=0.25, seed=s))) for s in range(400)]
    assert torch.allclose(torch.stack(draws).mean(0), sum(c.delta() for c in found), atol=1.5)
    one = Dense(lambda: total(POLICIES["dare"](found, "a", Options(density=0.25, seed=1))))
    assert torch.equal(one.delta(), draws[1])
    alone = contributions(ALL, ALL, multipliers=(1.0, 0.0))
    kept = total(POLICIES["dare"](alone, "a", Options(density=0.25))) != 0
    assert 0.1 < kept.float().mean() < 0.4


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return linear_shapes(load_dit(asset("tiny:dit.safetensors"), dtype=torch.float32).model)


def make(path, shapes, layers, *, seed=0, rank=4, rows=None, **metadata):
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for n in layers:
        up = torch.randn(shapes[n][0], rank, generator=g)
        if rows:
            up[: rows[n][0]] = 0
            up[rows[n][1] :] = 0
        pairs[n] = LoraPair(torch.randn(rank, shapes[n][1], generator=g), up, 2.0)
    write_lora(
        path, pairs,
        metadata=lora_metadata(path, metadata, architecture="hunyuan-video", rank=rank, alpha=2.0)
    )
    return path


def run(loras, output, **options):
    entries = tuple(LoraFileConfig(str(p), m) for p, m in loras)
    merge.run(MergeConfig(dit="tiny:dit.safetensors", lora=entries, output=str(output), **options))


def test_overlapping_loras_are_refused_unless_a_policy_is_named(tmp_path, shapes, capsys):
    a, b = (
        (
            make(tmp_path / f"{n}.safetensors", shapes, [LAYER, "single_blocks.0.linear2"], seed=i) for i,
            n in enumerate("ab")
        )
    )
    with pytest.raises(CheckpointError, match=r"a\.safetensors and b\.safetensors both change 480 rows of"):
        run([(a, 1.0), (b, 1.0)], tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    base = load_file(asset("tiny:dit.safetensors"))
    for policy in ("sum", "average", "priority", "orthogonal", "ties", "dare"):
        run([(a, 1.0), (b, 0.5)], tmp_path / "m.safetensors", on_overlap=policy)
        merged = load_file(tmp_path / "m.safetensors")
        changed = {n for n in base if not torch.equal(base[n], merged[n])}
        assert changed == {f"{LAYER}.weight", "single_blocks.0.linear2.weight"}, policy
    assert "changed by more than one: dare" in capsys.readouterr().out
    run([(a, 1.0), (b, 0.0)], tmp_path / "m.safetensors")  # switched off: nothing overlaps
    assert "(off)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean 'average'"):
        run([(a, 1.0)], tmp_path / "m.safetensors", on_overlap="avarage")
    with pytest.raises(ConfigError, match="--density is for"):
        run([(a, 1.0)], tmp_path / "m.safetensors", on_overlap="sum", density=0.5)


@pytest.fixture
def sliced(tmp_path, shapes):
    """A plan of rows, and three slice directories that look like finished runs."""
    plan = plan_for(
        Cut(n=3, granularity="rows", order="interleaved"), dit="tiny:dit.safetensors", model=None, flavor=None
    )
    save_plan(plan, tmp_path / "plan.json")
    for s in plan.slices:
        folder = tmp_path / f"{s.loraid:02d}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"run: {{name: slice-{s.loraid:02d}}}\n")
        rows = {slot.module: (slot.begin, slot.end) for slot in s.slots}
        meta = {"ss_loraid": str(s.loraid), "hvtrain.plan": plan.hash, "hvtrain.base": plan.base}
        make(folder / f"slice-{s.loraid:02d}.safetensors", shapes, rows, seed=s.loraid, rows=rows, **meta)
    return tmp_path


def test_slices_change_their_own_rows_and_nothing_else_bit_for_bit(sliced, shapes):
    out = sliced / "merged.safetensors"
    merge.run(MergeConfig(dit="tiny:dit.safetensors", plan=str(sliced / "plan.json"), output=str(out)))
    base, merged = load_file(asset("tiny:dit.safetensors")), load_file(out)
    plan = load_plan(sliced / "plan.json")
    rows = {n: torch.zeros(len(t), dtype=torch.bool) for n, t in base.items() if n.endswith(".weight")}
    for s in plan.slices[:2]:
        for slot in s.slots:
            rows[f"{slot.module}.weight"][slot.begin : slot.end] = True
    merge.run(MergeConfig(
        dit="tiny:dit.safetensors", output=str(sliced / "two.safetensors"),
        lora=tuple(LoraFileConfig(str(sliced / f"0{i}")) for i in (1, 2)),  # directories of finished runs
    ))
    two = load_file(sliced / "two.safetensors")
    for name, tensor in base.items():
        outside = ~rows[name] if name in rows else slice(None)
        assert torch.equal(two[name][outside], tensor[outside]), name
    # Together they are the sum of what each does alone, since no row is shared.
    alone = [read_lora(sliced / f"0{i}/slice-0{i}.safetensors", shapes).pairs for i in (1, 2, 3)]
    for module in alone[0]:
        wanted = base[f"{module}.weight"].float() + sum(p[module].delta() for p in alone)
        assert torch.allclose(merged[f"{module}.weight"].float(), wanted, atol=0.05, rtol=0.02), module
    report = json.loads((sliced / "merged-merge.json").read_text())
    assert report["overlap_rows"] == 0 and [e["loraid"] for e in report["loras"]] == ["1", "2", "3"]
    assert all(e["norm"] > 0 for e in report["loras"]) and report["plan"] == plan.hash
    page = (sliced / "merged-merge.html").read_text()
    assert (
        "disjoint: no row of" in page
        and page.count("<i style") == sum(len(v) for v in report["occupancy"].values())
    )
    with safe_open(out, "pt") as file:
        history = json.loads(file.metadata()["hvtrain.merged"])
    assert [h["ss_loraid"] for h in history] == ["1", "2", "3"]


def test_slices_become_one_lora_exactly_or_to_a_rank(sliced, shapes, capsys):
    keys = {"dit": "tiny:dit.safetensors", "plan": str(sliced / "plan.json"), "target": "lora"}
    merge.run(MergeConfig(**keys, output=str(sliced / "one.safetensors")))
    alone = [read_lora(sliced / f"0{i}/slice-0{i}.safetensors", shapes).pairs for i in (1, 2, 3)]
    one = read_lora(sliced / "one.safetensors", shapes)
    assert one.metadata["ss_loraid"] == "1,2,3" and {p.rank for p in one.pairs.values()} == {12}
    for module, found in one.pairs.items():
        assert torch.allclose(found.delta(), sum(p[module].delta() for p in alone), atol=1e-4)
    merge.run(MergeConfig(**keys, output=str(sliced / "low.safetensors"), rank=6))
    worst = float(re.search(r"largest error of a layer ([\d.]+) %", capsys.readouterr().out)[1]) / 100
    low = read_lora(sliced / "low.safetensors", shapes).pairs
    errors = [
        (
            torch.linalg.norm(low[m].delta() - one.pairs[m].delta()) / torch.linalg.norm(one.pairs[m].delta())
        ).item() for m in low
    ]
    assert max(errors) == pytest.approx(worst, rel=0.02) and {p.rank for p in low.values()} == {6}
    with pytest.raises(ConfigError, match="give rank"):
        a, b = (make(sliced / f"{n}.safetensors", shapes, [LAYER], seed=i) for i, n in enumerate("ab"))
        run([(a, 1.0), (b, 1.0)], sliced / "x.safetensors", target="lora", on_overlap="ties")


def test_missing_unfinished_foreign_and_trespassing_slices_are_named(sliced, shapes):
    keys = {
        "dit": "tiny:dit.safetensors", "plan": str(sliced / "plan.json"),
        "output": str(sliced / "m.safetensors")
    }
    third = sliced / "03/slice-03.safetensors"
    third.rename(sliced / "away")
    with pytest.raises(
        CheckpointError, match=r"1 of 3 slices are not there: LORAID 3: .*is not finished \(no slice-03"
    ):
        merge.run(MergeConfig(**keys))
    merge.run(MergeConfig(**keys, allow_missing=True))
    assert json.loads((sliced / "m-merge.json").read_text())["missing"] == [3]
    plan = load_plan(sliced / "plan.json")
    make(third, shapes, [LAYER], ss_loraid="3", **{"hvtrain.plan": plan.hash})  # all rows of a layer
    with pytest.raises(
        CheckpointError, match=r"LORAID 3 changes rows 0 to 479 of 'double_blocks.0.img_attn_qkv', it owns"
    ):
        merge.run(MergeConfig(**keys))
    make(third, shapes, [LAYER], ss_loraid="3", **{"hvtrain.plan": "0" * 64})
    with pytest.raises(CheckpointError, match="trained by another plan"):
        merge.run(MergeConfig(**keys))
    make(third, shapes, [LAYER], ss_loraid="3", **{"hvtrain.base": "0" * 64})
    with pytest.raises(CheckpointError, match="trained on other weights.*--any-base"):
        merge.run(MergeConfig(**keys))


def test_the_merged_model_is_cut_into_shards(tmp_path, shapes):
    lora = make(tmp_path / "a.safetensors", shapes, [LAYER])
    run([(lora, 1.0)], tmp_path / "whole.safetensors")
    run([(lora, 1.0)], tmp_path / "cut", max_shard_gb=0.003)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 1 and all(f.stat().st_size < 3_100_000 for f in files)
    whole, cut = (

            load_dit(p, dtype=torch.float32).model.state_dict()
            for p in (tmp_path / "whole.safetensors", tmp_path / "cut")

    )
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


def test_a_merge_that_was_killed_is_continued(tmp_path):
    """The writer notes what is on the disk; the next run writes only the rest (a different one begins anew:
    tests/weights/test_stream.py)."""
    script = """
import sys, time, torch
import hvtrain.weights.stream as stream
from shards.tensors import Extent
stream._PROGRESS_BYTES = 1
slots = [Extent(f"t{i}", torch.float32, (1000,)) for i in range(8)]
with stream.open_resumable(sys.argv[1], slots, signature="s") as writer:
    for i, name in enumerate(writer.waiting):
        writer.write(name, torch.full((1000,), float(name[1:])))
        print(name, flush=True)
        if i == 3:
            time.sleep(60)
"""
    path = tmp_path / "m.safetensors"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not path.exists()
    slots = [Extent(f"t{i}", torch.float32, (1000,)) for i in range(8)]
    with open_resumable(path, slots, signature="s") as writer:
        assert writer.waiting == ["t4", "t5", "t6", "t7"]
        for name in writer.waiting:
            writer.write(name, torch.full((1000,), float(name[1:])))
    assert all(t.eq(int(n[1:])).all() for n, t in load_file(path).items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]
    with pytest.raises(ValueError, match="not written"), open_resumable(path, slots, signature="s") as writer:
        assert len(writer.waiting) == 8
    assert len(load_file(path)) == 8  # what was there stays


def test_held_out_losses_are_reported(sliced, capsys):
    shards = make_shards(sliced / "set", n=3)
    out = sliced / "m.safetensors"
    arguments = [
        "merge", "--dit", "tiny:dit.safetensors", "--plan", str(sliced / "plan.json"), "--output", str(out)
    ]
    assert cli.main([*arguments, "--evaluate", str(shards)]) == 0
    losses = json.loads((sliced / "m-merge.json").read_text())["losses"]
    assert list(losses) == [
        "base", "slice-01.safetensors", "slice-02.safetensors", "slice-03.safetensors", "merged"
    ]
    assert len(set(losses.values())) == 5
    # The merged loss is that of the merged file.
    found = load_dit(out, dtype=torch.float32)
    save_dit(found.model, sliced / "copy.safetensors", spec=found.spec, flavor=found.flavor)
    capsys.readouterr()
    nothing = sliced / "03/slice-03.safetensors"
    arguments = [
        "merge", "--dit", str(sliced / "copy.safetensors"), "--lora", str(nothing), "--any-base",
        "--multiplier", "0"
    ]
    assert cli.main([*arguments, "--output", str(sliced / "y.safetensors"), "--evaluate", str(shards)]) == 0
    assert json.loads(
        (sliced / "y-merge.json").read_text()
    )["losses"]["base"] == pytest.approx(losses["merged"], rel=2e-2)
