"""What the model's file does not tell, and its LoRAs do: as which flavor they were trained, and as
which of several experts."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import LoraFileConfig, MergeConfig, ReconcileConfig, asset
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.metadata import EXPERT_KEY, LORA_FLAVOR_KEY
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.tools import extract
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge import reconcile as reconciling
from hvtrain.merge import run as merge
from hvtrain.merge.inputs import as_trained, open_inputs
from hvtrain.models.load import identify, whole_model
from tests.train.shardset import make_set

HV15, WAN = asset("tiny:hunyuan_video_15/dit.safetensors"), asset("tiny:wan/high_noise.safetensors")


class Seen(Exception):
    """Far enough."""


def loras(root, dit, flavor, *metadata):
    """One for each, of a layer, with samples beside it."""
    found, entries = identify(dit, flavor=flavor), []
    shapes = linear_shapes(whole_model(found))
    name = found.spec.lora_targets(whole_model(found))[0]
    for number, said in enumerate(metadata, start=1):
        folder = root / str(number)
        folder.mkdir()
        draw = torch.Generator().manual_seed(number)
        up, down = (torch.randn(2, size, generator=draw) for size in shapes[name])
        write_lora(folder / "lora.safetensors", {name: LoraPair(down, up.T, 2.0)}, metadata=said)
        make_set(folder / "calibration", found.flavor, n=8)
        entries.append(LoraFileConfig(str(folder / "lora.safetensors")))
    return tuple(entries)


def config(root, dit, entries, **more):
    how = ReconcileConfig(how="fit", states=6, held_out=2)
    return MergeConfig(
        dit=str(dit), lora=entries, output=str(root / "m.safetensors"), target="lora", reconcile=how, **more
    )


@pytest.fixture
def untold(tmp_path):
    """A model by image whose file could as well be by text: as others' are."""
    with safe_open(HV15, "pt") as file:
        said = {key: value for key, value in file.metadata().items() if key != "hvtrain.flavor"}
    save_file(load_file(HV15), tmp_path / "dit.safetensors", said)
    return tmp_path / "dit.safetensors"


def test_the_model_is_looked_at_as_the_flavor_that_its_loras_were_trained_as(untold, tmp_path, monkeypatch):
    def reconcile(c, inputs, report, found, ctx, wanted):
        raise Seen(found.flavor.name)

    monkeypatch.setattr(reconciling, "reconcile", reconcile)
    assert identify(untold).flavor.name == "tiny"
    told = {LORA_FLAVOR_KEY: "tiny-i2v"}
    entries = loras(tmp_path, untold, "tiny-i2v", told, told, {}, {LORA_FLAVOR_KEY: "tiny"})
    apart = entries[0], entries[3]
    for own, more, name in (
        (entries[:2], {}, "tiny-i2v"), (entries[1:3], {}, "tiny-i2v"), (entries[2:3], {}, "tiny"),
        (entries[:2], {"flavor": "tiny"}, "tiny"), (apart, {"flavor": "tiny-i2v"}, "tiny-i2v")
    ):
        with pytest.raises(Seen, match=f"^{name}$"):
            merge.run(config(tmp_path, untold, own, **more))
    with pytest.raises(ConfigError, match="as 'tiny-i2v', .*4/lora.safetensors as 'tiny'.*; give flavor="):
        merge.run(config(tmp_path, untold, apart))


@pytest.mark.parametrize(("expert", "said"), [("high", {}), ("low", {}), (None, {EXPERT_KEY: "low"})])
def test_an_expert_s_loras_are_looked_at_on_its_own_levels_of_noise(tmp_path, monkeypatch, expert, said):
    def measure(clips, forward, tasks, batch_size):
        raise Seen([s.sigma for task in tasks for s in (*task.states, *task.held)])

    monkeypatch.setattr(reconciling, "measure", measure)
    entries = loras(tmp_path, WAN, None, said, said)
    cfg = config(tmp_path, WAN, entries, expert=expert)
    with pytest.raises(Seen) as seen:
        merge.run(cfg)
    (sigmas,), own = seen.value.args, identify(WAN).flavor.experts
    low, high = next(e.sigmas for e in own if e.name == (expert or "low"))
    assert len(sigmas) == 16 and low <= min(sigmas) < max(sigmas) <= high
    assert max(sigmas) - min(sigmas) > 0.6 * (high - low)  # and spread over all of them
    sampled = replace(cfg, reconcile=replace(cfg.reconcile, own_states=True))
    with pytest.raises(ConfigError, match=f"only '{expert or 'low'}' is here: give shard sets in keep"):
        merge.run(sampled)


def test_whose_loras_they_are_must_be_known(tmp_path):
    entries = loras(tmp_path, WAN, None, {}, {})
    with pytest.raises(ConfigError, match="do not say whose they are; give --expert high or low"):
        merge.run(config(tmp_path, WAN, entries))


def test_what_cannot_be_written_is_refused_before_anything_is_computed(untold, tmp_path, monkeypatch):
    monkeypatch.setattr(reconciling, "reconcile", lambda *a: pytest.fail("it computes"))
    entries = loras(tmp_path, untold, None, {}, {})
    cfg = replace(config(tmp_path, untold, entries), target="model")
    with monkeypatch.context() as patch:
        patch.setattr("hvtrain.merge.write.free_bytes", lambda folder: 1000)
        with pytest.raises(ConfigError, match="too little for the merged model"):
            merge.run(cfg)
    tensors = load_file(untold)
    layer = identify(untold).spec.lora_targets(whole_model(identify(untold)))[0]
    name = next(n for n in tensors if n.endswith(f"{layer}.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(1.0)
    with safe_open(untold, "pt") as file:
        said = file.metadata()
    save_file(tensors, untold, said)
    with pytest.raises(CheckpointError, match="is scaled 8-bit"):
        merge.run(cfg)


def test_a_merged_lora_says_whose_it_is(tmp_path):
    """As it was merged: another may be added to it later."""
    low, asked = ("tiny-a14b", "low"), {"flavor": "tiny-a14b", "expert": "low"}
    for name, said, more, told in (
        ("a", ({}, {LORA_FLAVOR_KEY: "tiny-a14b", EXPERT_KEY: "low"}), {}, low),
        ("b", ({}, {}), {"expert": "high"}, (None, "high")),
        ("c", ({LORA_FLAVOR_KEY: "tiny"}, {}), asked, low),
    ):
        (tmp_path / name).mkdir()
        cfg = config(tmp_path / name, WAN, loras(tmp_path / name, WAN, None, *said), **more)
        merge.run(replace(cfg, reconcile=ReconcileConfig(how="none"), on_overlap="sum"))
        with safe_open(cfg.output, "pt") as file:
            about = file.metadata()
        assert (about.get(LORA_FLAVOR_KEY), about.get(EXPERT_KEY)) == told, name


def test_one_that_is_off_or_meant_for_another_model_tells_nothing(untold, tmp_path):
    found = identify(untold)
    entries = loras(tmp_path, untold, "tiny-i2v", {LORA_FLAVOR_KEY: "tiny-i2v"}, {LORA_FLAVOR_KEY: "tiny"})
    shapes = linear_shapes(whole_model(found))
    inputs = open_inputs(entries, None, shapes, found.spec, base=None)
    (first, _), (second, _) = inputs.loras
    off = replace(inputs, loras=[(first, 1.0), (second, 0.0)])
    assert as_trained(found, off).flavor.name == "tiny-i2v"
    assert as_trained(found, replace(inputs, any_base=True)).flavor.name == "tiny"


def test_an_extracted_lora_does_not_guess(untold, tmp_path):
    tensors = load_file(untold)
    layer = identify(untold).spec.lora_targets(whole_model(identify(untold)))[0]
    name = next(n for n in tensors if n.endswith(f"{layer}.weight"))
    tensors[name] = tensors[name] + 0.1
    with safe_open(untold, "pt") as file:
        save_file(tensors, tmp_path / "tuned.safetensors", file.metadata())
    out = str(tmp_path / "lora.safetensors")
    assert "1 layers, rank 1" in next(extract(str(tmp_path / "tuned.safetensors"), HV15, out, rank=1))
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert LORA_FLAVOR_KEY not in said and "modelspec.resolution" in said
