"""What `merge --evaluate` measures: which weights the model holds at each loss, and in which dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hvtrain.config import LoraFileConfig, MergeConfig
from hvtrain.errors import LaunchError
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.merge import evaluate
from hvtrain.merge import run as merge
from hvtrain.models.load import identify, save_dit
from hvtrain.parallel.context import start
from tests.adapters.models import SPEC, build

SHARED, OWN = "double_blocks.0.img_attn_qkv", "single_blocks.1.linear2"


@pytest.fixture
def files(tmp_path):
    """Two runs' LoRAs of one name, which share a layer."""
    save_dit(
        build(), tmp_path / "dit.safetensors", spec=SPEC, flavor=SPEC.flavors["tiny"], dtype=torch.bfloat16
    )
    g = torch.Generator().manual_seed(0)
    shapes = {name: tuple(t.shape) for name, t in build().state_dict().items()}
    for name, layers in (("a", [SHARED, OWN]), ("b", [SHARED])):
        (tmp_path / name).mkdir()
        pairs = {}
        for layer in layers:
            out, width = shapes[f"{layer}.weight"]
            pairs[layer] = LoraPair(torch.randn(3, width, generator=g), torch.randn(out, 3, generator=g), 1.5)
        write_lora(tmp_path / name / "lora.safetensors", pairs, metadata={})
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["sum", "ties"])
def test_the_model_holds_the_base_each_alone_and_the_merge(files, monkeypatch, policy, dtype):
    base = load_file(files / "dit.safetensors")
    entries = tuple(
        LoraFileConfig(str(files / n / "lora.safetensors"), m) for n, m in (("a", 0.5), ("b", -2.0))
    )
    cfg = MergeConfig(
        dit=str(files / "dit.safetensors"), lora=entries, output=str(files / "m.safetensors"),
        on_overlap=policy, evaluate=(str(files),)
    )
    seen = []

    def loss(sets, loaded, ctx, expert):
        seen.append({name: p.detach().clone() for name, p in loaded.model.named_parameters()})
        return float(len(seen))

    monkeypatch.setattr(evaluate, "_loss", loss)
    monkeypatch.setattr(evaluate, "compute_dtype", lambda device: dtype)
    merge.run(cfg)
    report = json.loads((files / "m-merge.json").read_text())
    assert report["losses"] == {
        "base": 1.0, "a/lora.safetensors": 2.0, "b/lora.safetensors": 3.0, "merged": 4.0
    }
    merged = load_file(files / "m.safetensors")

    def with_lora(name, multiplier):
        found = {n: t.float() for n, t in base.items()}
        tensors = load_file(files / name / "lora.safetensors")
        for layer in (SHARED, OWN):
            stem = "lora_unet_" + layer.replace(".", "_")
            if f"{stem}.alpha" in tensors:
                delta = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
                found[f"{layer}.weight"] += delta * (multiplier * 1.5 / 3)
        return found

    wanted = [base, with_lora("a", 0.5), with_lora("b", -2.0), merged]
    for number, (got, want) in enumerate(zip(seen, wanted, strict=True)):
        for name, tensor in got.items():
            assert tensor.dtype == dtype
            # float32 sums that are not rounded, or rounded once
            exact = number == 0 or (number == 3 and dtype == torch.bfloat16)
            tolerance = 0 if exact else 2**-7 if torch.bfloat16 in (dtype, want[name].dtype) else 1e-5
            torch.testing.assert_close(
                tensor.float(), want[name].float(), rtol=tolerance, atol=tolerance and 1e-5, msg=name
            )
    # The two of one name are told apart everywhere.
    assert [(e["file"], e["layers"], e["rows"]) for e in report["loras"]] == [
        ("a/lora.safetensors", 2, 144 + 48), ("b/lora.safetensors", 1, 144),
    ]  # fmt: skip
    assert report["overlaps"] == [
        {"module": SHARED, "first": "a/lora.safetensors", "second": "b/lora.safetensors", "n_rows": 144}
    ]
    assert report["occupancy"] == {SHARED: [[0, 144, 0], [0, 144, 1]], OWN: [[0, 48, 0]]}


def test_a_gpu_holds_the_model_once_in_bfloat16(files, monkeypatch):
    """float32 on the CPU, bfloat16 under autocast on a GPU; nothing of the whole
    model's size is copied aside."""
    assert evaluate.compute_dtype(torch.device("cpu")) == torch.float32
    assert evaluate.compute_dtype(torch.device("cuda", 0)) == torch.bfloat16
    asked, objectives = {}, []
    load, objective = evaluate.load_found, evaluate.objective_of
    monkeypatch.setattr(evaluate, "compute_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(evaluate, "load_found", lambda *a, **k: asked.update(k) or load(*a, **k))
    monkeypatch.setattr(
        evaluate, "objective_of", lambda *a, **k: objectives.append(k["autocast"]) or objective(*a, **k)
    )
    monkeypatch.setattr(evaluate, "open_shards", lambda *a, **k: [])
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *a, **k: {"eval/loss": 1.0})
    clones = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *a, **k: clones.append(t) or t.detach().contiguous())
    entries = (LoraFileConfig(str(files / "a" / "lora.safetensors")),)
    inputs = merge.open_inputs(entries, None, *shapes_and_spec(), base=None)
    evaluate.losses_of(
        identify(files / "dit.safetensors"), inputs, merge.by_layer(inputs.loras), ["set"],
        start(device="cpu")
    )
    assert asked["dtype"] == torch.bfloat16
    assert objectives == [True] * 3
    assert not clones


def test_the_cpu_never_stands_in_for_a_gpu(monkeypatch, tmp_path):
    """--device cuda where the environment has the runs on the CPU: hours for what takes minutes."""
    monkeypatch.setenv("HVTRAIN_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = MergeConfig(
        dit="gone", lora=(LoraFileConfig("gone"),), output="x", evaluate=(str(tmp_path),), device="cuda"
    )
    with pytest.raises(LaunchError, match="has no GPU: PyTorch sees 0"):
        merge.run(cfg)


def shapes_and_spec():
    from hvtrain.adapters.attach import linear_shapes

    return linear_shapes(build()), SPEC
