"""`hvtrain merge --reconcile` on the model that ships: what is solved, what is kept, what stays
untouched, what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import LoraFileConfig, MergeConfig, ModelConfig, ReconcileConfig, asset
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.tools import open_any
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge import fit as fitting
from hvtrain.merge import reconcile as reconciling
from hvtrain.merge import run as merge
from hvtrain.merge.changes import Changes, Full, LowRank
from hvtrain.merge.stream import Streamed
from hvtrain.models.load import identify, load_dit, whole_model
from hvtrain.parallel.context import start
from hvtrain.slices.plan import Cut, make_plan, save_plan
from tests.train.shardset import make_shards

DIT = "tiny:dit.safetensors"
FOUND = identify(asset(DIT))
SHAPES = linear_shapes(whole_model(FOUND))
TARGETS = FOUND.spec.lora_targets(whole_model(FOUND))
TEXT = [name for name in TARGETS if "txt" in name]
RANK = 4


def lora(path, *, seed, layers=TARGETS, size=0.2, rows=slice(None)):
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in layers:
        out, width = SHAPES[name]
        up = torch.zeros(out, RANK)
        up[rows] = torch.randn(up[rows].shape, generator=g) * size
        pairs[name] = LoraPair(torch.randn(RANK, width, generator=g) * width**-0.5, up, float(RANK))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, pairs, metadata={"ss_learning_rate": "2e-3"})
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Ordinary LoRAs over the same layers, with calibration/ beside them, and a set of what the base knows.
    Each set has words of its own, which the layers of the text can tell apart."""
    root = tmp_path_factory.mktemp("reconcile")
    for number in (1, 2, 3):
        lora(root / f"{number}" / "lora.safetensors", seed=number, layers=TEXT)
        make_shards(root / f"{number}" / "calibration", n=24, seed=number, word=number)
    make_shards(root / "old", n=8, seed=9, word=9)
    return root


def config(place, output, *numbers, target="model", rank=None, **reconcile):
    entries = tuple(LoraFileConfig(str(place / str(n) / "lora.safetensors")) for n in numbers)
    how = {"states": 18, "held_out": 6, "steps": 12, "batch_size": 6, "allow_lost": True, **reconcile}
    return MergeConfig(
        dit=DIT, lora=entries, output=str(output), target=target, rank=rank, reconcile=ReconcileConfig(**how)
    )


def report(output):
    return json.loads(output.with_name(f"{output.stem}-merge.json").read_text())


def test_a_streamed_pass_is_the_models_own_to_the_last_bit(place):
    loaded = load_dit(asset(DIT), dtype=torch.float32)
    model = Streamed(FOUND, start(device="cpu"), torch.float32)
    g = torch.Generator().manual_seed(0)
    cond = {
        "text": torch.randn(2, 3, 64, generator=g), "text_len": torch.tensor([3, 2]),
        "pooled": torch.ones(2, 64)
    }
    x = torch.randn(2, 16, 2, 4, 4, generator=g)
    inp = FOUND.spec.make_input(x, torch.tensor([0.7, 0.2]), cond, task="t2v", guidance=6.0)
    pairs = read_lora(place / "1" / "lora.safetensors", SHAPES, spec=FOUND.spec).pairs
    parts = {name: [LowRank(p.down, p.up)] for name, p in pairs.items()}
    model.changes.put("one", parts)
    changes = Changes(loaded.model)
    changes.put("one", parts)
    ((plain, changed),) = model.velocities([(inp, [None, "one"])])
    with torch.no_grad():
        assert torch.equal(plain, loaded.model(inp))
        with changes.using("one"):
            assert torch.equal(changed, loaded.model(inp))
    assert (changed - plain).abs().max() > 0.1
    assert all(p.is_meta for block in model.model.blocks for p in block.parameters())


def test_layers_are_solved_after_those_that_feed_them(place):
    model = Streamed(FOUND, start(device="cpu"), torch.float32)
    cond = {"text": torch.randn(1, 3, 64), "text_len": torch.tensor([3]), "pooled": torch.ones(1, 64)}
    inp = FOUND.spec.make_input(
        torch.randn(1, 16, 2, 4, 4), torch.tensor([0.7]), cond, task="t2v", guidance=6.0
    )
    names = [n for n in model.layers[0] if n in TARGETS]
    with model.block(0) as block:
        found = fitting.stages(model, block, names, model.enter(inp))
    ends = [[name.removeprefix("double_blocks.0.") for name in stage] for stage in found]
    assert ends == [
        [f"{s}_{end}" for s in ("img", "txt")] for end in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")
    ]


def test_the_solution_is_the_least_squares_one():
    """Against the normal equations in double precision, with rows left out, clips of
    different weight, and the prior."""
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(5, 6, bias=True)
    prior = LowRank(torch.randn(2, 5, generator=g), torch.randn(3, 2, generator=g), 1)
    targets = fitting.targets_of([prior], lambda n: None)
    sums = fitting._Sums(layer, targets, torch.device("cpu"))
    taught, seen = torch.randn(2, 7, 5, generator=g), torch.randn(2, 7, 5, generator=g)
    delta = torch.randn(6, 5, generator=g)
    with torch.no_grad():
        wanted, own = layer(taught) + taught @ delta.T, layer(seen)
    sums.add([fitting._Call(seen, own)], [fitting._Call(taught, wanted)], torch.tensor([0.25, 2.0]))
    (change,) = sums.solve(targets, 0.1)
    w = torch.tensor([0.25, 2.0]).double().div(7).sqrt()[:, None, None]
    x = (seen.double() * w).reshape(14, 5)
    y = ((wanted - own).double()[..., 1:4] * w).reshape(14, 3)
    e = 0.1 * (x.T @ x).diagonal().mean()
    rows = torch.cat([x, e.sqrt() * torch.eye(5).double()])
    values = torch.cat([y, e.sqrt() * (prior.up @ prior.down).T.double()])
    best = torch.linalg.lstsq(rows, values).solution.T
    assert isinstance(change, Full) and change.begin == 1
    torch.testing.assert_close(change.matrix().double(), best, rtol=1e-5, atol=1e-6)


def test_two_that_read_different_inputs_come_back_both():
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 4, bias=False)
    deltas = [torch.zeros(4, 6), torch.zeros(4, 6)]
    deltas[0][:, :3], deltas[1][:, 3:] = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    targets = fitting.targets_of([LowRank(delta, torch.eye(4)) for delta in deltas], lambda n: None)
    sums = fitting._Sums(layer, targets, torch.device("cpu"))
    for delta, columns in zip(deltas, (slice(0, 3), slice(3, 6)), strict=True):
        x = torch.zeros(1, 9, 6)
        x[..., columns] = torch.randn(1, 9, 3, generator=g)
        with torch.no_grad():
            call = [fitting._Call(x, layer(x))]
            sums.add(call, [fitting._Call(x, layer(x) + x @ delta.T)], torch.ones(1))
    torch.testing.assert_close(
        sums.solve(targets, 1e-3)[0].matrix(), deltas[0] + deltas[1], rtol=1e-5, atol=1e-6
    )


def test_fit_of_one_lora_is_that_lora(place, tmp_path):
    merge.run(config(place, tmp_path / "m.safetensors", 1, how="fit"))
    base, merged = load_file(asset(DIT)), load_file(tmp_path / "m.safetensors")
    pairs = read_lora(place / "1" / "lora.safetensors", SHAPES, spec=FOUND.spec).pairs
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        if module in pairs and name != module:
            torch.testing.assert_close(
                tensor.float() - base[name].float(), pairs[module].delta(), rtol=0, atol=2e-3
            )
        else:
            assert torch.equal(tensor, base[name]), name
    assert report(tmp_path / "m.safetensors")["fidelity"]["lora.safetensors"] < 1e-5


@pytest.mark.parametrize("target", ["model", "lora"])
def test_what_fit_and_polish_make_is_what_is_written(place, tmp_path, target):
    """The distances are those of the file, and nearer than the sum's: measured again from the
    file, by plain forward passes."""
    out = tmp_path / "m.safetensors"
    cfg = config(place, out, 1, 2, how="fit+distill", target=target, keep=(str(place / "old"),))
    merge.run(cfg)
    said = report(out)
    assert list(said["fidelity"]) == ["1/lora.safetensors", "2/lora.safetensors", "keep"]
    again = config(
        place, tmp_path / "n.safetensors", 1, 2, how="fit+distill", target=target, keep=(str(place / "old"),)
    )
    merge.run(again)
    # the same again, bit for bit
    assert (tmp_path / "n.safetensors").read_bytes()[-4096:] == out.read_bytes()[-4096:]
    for name in ("1/lora.safetensors", "2/lora.safetensors"):
        assert said["summed"][name] > 0.75 and said["fidelity"][name] < 0.15
    assert said["fidelity"]["keep"] < 0.5 * said["summed"]["keep"]
    assert (tmp_path / "m-calibration" / "keep" / "manifest.json").exists() == (target == "lora")


def test_distillation_stays_in_the_rows_that_the_slices_own(place, tmp_path):
    """Contiguous slices of one layer's rows: each ends as a LoRA of the same rows,
    and no other weight has moved."""
    first, second = TARGETS[0], TARGETS[-1]
    a = lora(tmp_path / "a" / "lora.safetensors", seed=5, layers=[first], rows=slice(0, 40), size=1.0)
    b = lora(
        tmp_path / "b" / "lora.safetensors", seed=6, layers=[first, second], rows=slice(40, 90), size=1.0
    )
    for one in (a, b):
        make_shards(one.parent / "calibration", n=8)
    cfg = replace(config(place, tmp_path / "m.safetensors", how="distill"),
                  lora=(LoraFileConfig(str(a)), LoraFileConfig(str(b))))
    merge.run(cfg)
    base, merged = load_file(asset(DIT)), load_file(tmp_path / "m.safetensors")
    for name, tensor in merged.items():
        moved = (tensor != base[name]).flatten(1).any(1) if tensor.ndim > 1 else tensor != base[name]
        rows = {f"{first}.weight": range(90), f"{second}.weight": range(40, 90)}.get(name, range(0))
        assert set(torch.nonzero(moved).flatten().tolist()) <= set(rows), name
        assert bool(moved.any()) == bool(rows), name
    assert report(tmp_path / "m.safetensors")["overlap_rows"] == 0


def test_a_lora_joins_an_earlier_merge_without_the_others(place, tmp_path, monkeypatch):
    """The merged LoRA and what it left are enough: it speaks for its two, each of which is measured. It is
    trained further at the rate of its own LoRAs, not as one that says nothing of it."""
    rates = []
    monkeypatch.setattr(reconciling, "distill", lambda *args: rates.append(args[7].lr) or args[3])
    merge.run(
        config(
            place, tmp_path / "two.safetensors", 1, 2, how="fit", target="lora", keep=(str(place / "old"),)
        )
    )
    entries = (
        LoraFileConfig(str(tmp_path / "two.safetensors")),
        LoraFileConfig(str(place / "3" / "lora.safetensors"))
    )
    cfg = replace(
        config(place, tmp_path / "three.safetensors", how="fit+distill", target="lora"), lora=entries
    )
    merge.run(cfg)
    assert rates == [2e-3]
    assert open_any(tmp_path / "two.safetensors").lora.metadata["ss_learning_rate"] == "0.002"
    said = report(tmp_path / "three.safetensors")
    assert list(said["fidelity"]) == [
        "two.safetensors/01-lora", "two.safetensors/02-lora", "lora.safetensors", "keep"
    ]
    assert sorted(p.name for p in (tmp_path / "three-calibration").iterdir()) == [
        "01-01-lora", "02-02-lora", "03-lora", "keep"
    ]


def test_own_states_need_the_captions_only(place, tmp_path):
    """Whatever the clips hold, the merge is the same: they are sampled."""
    outs = []
    for name, factor in (("a", 1.0), ("b", -7.0)):
        sets = []
        for number in (1, 2):
            root = tmp_path / name / str(number)
            make_shards(root, n=6, scale=factor)
            sets.append(str(root))
        out = tmp_path / f"{name}.safetensors"
        merge.run(config(place, out, 1, 2, how="fit", samples=tuple(sets), own_states=True))
        outs.append(load_file(out))
    assert all(torch.equal(outs[0][n], outs[1][n]) for n in outs[0])


def test_what_is_kept_may_be_a_list_of_captions(place, tmp_path):
    """The base samples their clips; a later merge finds them where this one left them."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle moves left\n\na blue square\n")
    text = ModelConfig(parts={"llm": "tiny:llm", "clip": "tiny:clip"}, dtype="float32")
    out = tmp_path / "m.safetensors"
    how = {"how": "fit", "states": 6, "held_out": 2, "text": text}
    merge.run(config(place, out, 1, 2, target="lora", keep=(str(captions),), **how))
    with_them, without = report(out), tmp_path / "n.safetensors"
    merge.run(config(place, without, 1, 2, target="lora", **how))
    assert list(with_them["fidelity"])[-1] == "keep" and "keep" not in report(without)["fidelity"]
    assert 0 < with_them["fidelity"]["keep"] < with_them["summed"]["keep"]
    assert (tmp_path / "m-calibration" / "keep.txt").read_text() == "a red circle moves left\na blue square\n"
    captions.write_text(" \n")
    with pytest.raises(ConfigError, match=r"captions\.txt: no captions in it; write one a line"):
        merge.run(config(place, tmp_path / "o.safetensors", 1, 2, keep=(str(captions),), **how))


def test_a_lora_that_is_lost_fails_the_merge(place, tmp_path):
    cfg = config(
        place, tmp_path / "m.safetensors", 1, 2, how="distill", steps=1, lr=1e-9, allow_lost=False, lost=1e-3
    )
    with pytest.raises(
        CheckpointError, match=r"lost in the merge .*1/lora\.safetensors, 2/lora\.safetensors"
    ):
        merge.run(cfg)
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"on_overlap": "ties"}, "leave --on-overlap and --density away"),
        ({"dit": "", "target": "lora"}, "compares with the model"),
        ({"rank": 4, "target": "lora", "reconcile": ReconcileConfig(how="distill")}, "use fit\\+distill"),
        ({"reconcile": ReconcileConfig(how="fits")}, "no way 'fits'; did you mean 'fit'"),
        ({"reconcile": ReconcileConfig(keep=("old",))}, "keep: old: no such shard set or file of captions"),
        ({"reconcile": ReconcileConfig(how="fit", steps=0)}, "reconcile.steps is 0, expected more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(place, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        merge.run(replace(config(place, tmp_path / "m.safetensors", 1, 2, how="fit"), **changes))


def test_a_lora_that_does_nothing_is_named(place, tmp_path):
    idle = lora(tmp_path / "x" / "lora.safetensors", seed=1, layers=TEXT, size=0.0)
    make_shards(idle.parent / "calibration", n=8)
    cfg = config(place, tmp_path / "m.safetensors", 1, how="distill")
    with pytest.raises(CheckpointError, match=r"x/lora\.safetensors: changes nothing on its samples"):
        merge.run(replace(cfg, lora=(*cfg.lora, LoraFileConfig(str(idle)))))


def test_a_lora_without_samples_is_named(place, tmp_path):
    alone = lora(tmp_path / "x" / "lora.safetensors", seed=1)
    cfg = replace(config(place, tmp_path / "m.safetensors", how="fit"), lora=(LoraFileConfig(str(alone)),))
    with pytest.raises(
        ConfigError, match=r"lora\.safetensors: nothing says what it was trained on: no .*calibration"
    ):
        merge.run(cfg)
    with pytest.raises(ConfigError, match="1 sets for 2 LoRAs; give one for each"):
        merge.run(config(place, tmp_path / "m.safetensors", 1, 2, how="fit", samples=(str(place / "old"),)))


def test_a_merge_that_is_killed_goes_on_at_its_block(place, tmp_path, monkeypatch, capsys):
    """Blocks that were solved are not solved again, and the bytes are those of a merge that nobody killed."""
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    merge.run(config(place, whole, 1, 2, how="fit"))
    solve, calls = fitting.fit_block, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr("hvtrain.merge.reconcile.fit_block", killed)
    with pytest.raises(KeyboardInterrupt):
        merge.run(config(place, cut, 1, 2, how="fit"))
    assert not cut.exists() and (tmp_path / ".cut.safetensors.reconcile").is_dir()
    merge.run(config(place, cut, 1, 2, how="fit"))
    assert len(calls) == 3 and "block 1 of 6, done before" in capsys.readouterr().out
    assert cut.read_bytes() == whole.read_bytes()
    assert not (tmp_path / ".cut.safetensors.reconcile").exists()


@pytest.mark.parametrize("share", [64.0, 1e-6], ids=["memory", "disk"])
def test_killed_at_any_block_it_ends_in_the_same_bytes(place, tmp_path, monkeypatch, share):
    """Between two blocks, where the states have gone half of their way, and in the
    middle of a block's equations."""
    cfg = config(
        place, tmp_path / "whole.safetensors", 1, 2, how="fit", states=3, held_out=1, batch_size=1,
        host_gb=share
    )
    merge.run(cfg)
    cut = replace(cfg, output=str(tmp_path / "cut.safetensors"))

    def kill_at(name, count):
        work, calls = getattr(fitting, name), []

        def killed(*args):
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt
            return work(*args)

        return killed

    for name, counts in (("push", range(1, 7)), ("fit_block", (1, 2))):
        for count in counts:
            with monkeypatch.context() as patch:
                patch.setattr(f"hvtrain.merge.reconcile.{name}", kill_at(name, count))
                with pytest.raises(KeyboardInterrupt):
                    merge.run(cut)
            merge.run(cut)
            assert (tmp_path / "cut.safetensors").read_bytes() == (
                tmp_path / "whole.safetensors"
            ).read_bytes(), (name, count)
            (tmp_path / "cut.safetensors").unlink()


def test_what_the_host_does_not_hold_lies_on_the_disk(place, tmp_path, capsys):
    """The same merge to the last bit, whatever its share of memory."""
    for name, share in (("a", 64.0), ("b", 1e-6)):
        merge.run(config(place, tmp_path / f"{name}.safetensors", 1, 2, how="fit", host_gb=share))
    said = [line for line in capsys.readouterr().out.splitlines() if "of states in memory" in line]
    assert " 0 GB on the disk" in said[0] and " 0 GB of states in memory" in said[1]
    assert "up to 0.014 GB for a block's weights and sums" in said[0]
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_plans_slices_stay_slices(place, tmp_path):
    """Fit and polish in the slots: each slice has a file of its own again, which the same
    plan merges, to the same model."""
    plan = make_plan(
        {n: SHAPES[n] for n in TEXT}, Cut(n=2, granularity="rows", order="interleaved"),
        model=FOUND.spec.name, flavor=FOUND.flavor.name
    )
    save_plan(plan, tmp_path / "plan.json")
    for part in plan.slices:
        run = tmp_path / f"{part.loraid:02d}"
        g = torch.Generator().manual_seed(part.loraid)
        pairs = {}
        for slot in part.slots:
            up = torch.zeros(SHAPES[slot.module][0], RANK)
            up[slot.begin : slot.end] = torch.randn(slot.end - slot.begin, RANK, generator=g) * 0.2
            pairs[slot.module] = LoraPair(
                torch.randn(RANK, SHAPES[slot.module][1], generator=g) * 0.1, up, float(RANK)
            )
        make_shards(run / "calibration", n=12, seed=part.loraid, word=part.loraid)
        (run / "config.yaml").write_text(f"run: {{name: slice-{part.loraid:02d}}}\n")
        write_lora(run / f"slice-{part.loraid:02d}.safetensors", pairs,
                   metadata={"ss_loraid": str(part.loraid), "hvtrain.plan": plan.hash})
    cfg = replace(
        config(place, tmp_path / "merged.safetensors", how="fit+distill"), plan=str(tmp_path / "plan.json")
    )
    merge.run(cfg)
    again = MergeConfig(
        dit=DIT, plan=str(tmp_path / "merged-slices" / "plan.json"),
        output=str(tmp_path / "again.safetensors")
    )
    merge.run(again)  # proves from the tensors that each stays in its slots
    one, two = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(one[n], two[n]) for n in one)
    said = report(tmp_path / "merged.safetensors")
    names = [f"slice-{i:02d}.safetensors" for i in (1, 2)]
    assert list(said["fidelity"]) == names and all(said["fidelity"][n] < said["summed"][n] for n in names)
    assert [said["leak"][n][n] for n in names] == pytest.approx([1, 1], rel=1e-4)
    assert said["leak"][names[0]][names[1]] > 0.1
