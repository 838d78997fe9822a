"""A LoHa against its formula, and from training to a merged weight."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hvtrain.adapters.attach import adapted_layers, inject, linear_shapes, merge_all, start_from, whole_rows
from hvtrain.adapters.loha import LohaLinear
from hvtrain.adapters.table import ADAPTERS
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.write import save_lora
from hvtrain.parallel.context import shutdown
from hvtrain.train import run as train
from tests.adapters.models import SPEC, an_input, build
from tests.train.shardset import config, make_shards

PARTS = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))


def trained(model: nn.Module, targets, **options) -> nn.Module:
    """As after training: no part is zero."""
    inject(model, targets, **{"kind": LohaLinear, "rank": 3, "alpha": 1.5, "seed": 4, **options})
    draw = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model):
        layer.hada_w2_a.data = torch.randn(layer.hada_w2_a.shape, generator=draw)
    return model


def delta(layer: LohaLinear) -> torch.Tensor:
    a1, b1, a2, b2 = (getattr(layer, part).detach().double() for part in PARTS)
    whole = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    whole[layer.rows[0] : layer.rows[1]] = (a1 @ b1) * (a2 @ b2) * (layer.alpha / layer.rank)
    return whole


def test_the_formula_and_its_gradients():
    plain, model = toy(), toy()
    names = inject(model, ["0", "2"], kind=LohaLinear, rank=3)
    assert names == [f"{layer}.{part}" for layer in (0, 2) for part in PARTS]
    x = torch.randn(2, 7, 5)
    assert torch.equal(model(x), plain(x))  # w2_a starts at zero
    assert 0.05 < model[0].hada_w1_a.std().item() < 0.15 and 0.5 < model[0].hada_w2_b.std().item() < 1.5
    model = trained(toy(), ["0"])
    want = F.linear(x.double(), plain[0].weight.double() + delta(model[0]), plain[0].bias.double())
    torch.testing.assert_close(model[0](x).double(), want, rtol=1e-5, atol=1e-5)
    model(x).square().mean().backward()
    assert all(getattr(model[0], part).grad.abs().max() > 0 for part in PARTS)
    assert all(p.grad is None for n, p in model.named_parameters() if "hada" not in n)


def test_the_pair_of_a_file_is_exact():
    model = trained(toy(), ["0"])
    parts = {part.removeprefix("hada_"): getattr(model[0], part).detach() for part in PARTS}
    pair = LohaLinear.pair(parts, 1.5)
    assert pair.rank == 9
    torch.testing.assert_close(pair.delta().double(), delta(model[0]), rtol=1e-5, atol=1e-6)
    says = r"has w1_a, w1_b, w2_a, w2_b of shapes \[8, 3\], \[3, 5\], \[8, 3\], \[2, 5\], not twice"
    with pytest.raises(ValueError, match=says):
        LohaLinear.pair({**parts, "w2_b": parts["w2_b"][:2]}, 1.5)


def test_from_a_trained_model_to_a_file_to_a_merged_one(tmp_path):
    """In LyCORIS' names; the merged model gives what the adapted one gave."""
    model, shapes = trained(build(), SPEC.lora_targets(build())), linear_shapes(build())
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_lora(tmp_path / "a.safetensors", tensors, rank=3, alpha=1.5, metadata={}, architecture=SPEC.name)
    held = load_file(tmp_path / "a.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert {n.removeprefix(stem) for n in held if n.startswith(stem)} == {
        f".{part}" for part in (*PARTS, "alpha")
    }
    assert held[f"{stem}.hada_w1_a"].shape == (144, 3) and held[f"{stem}.hada_w1_b"].shape == (3, 48)
    file = read_lora(tmp_path / "a.safetensors", shapes, spec=SPEC)
    assert (file.metadata["ss_network_module"], file.metadata["ss_network_args"]) == (
        "lycoris.kohya", '{"algo": "loha"}'
    )
    assert file.summary().startswith("a.safetensors: LoHa, 20 layers, rank 3, alpha/rank 0.5")
    merged = build()
    merge_all(merged, [(file, 1.0)])
    with torch.no_grad():
        there, base = merged(an_input()), build()(an_input())
        torch.testing.assert_close(there, model(an_input()), rtol=1e-3, atol=1e-3)
    assert (there - base).abs().max() > 0.1
    converted(file, SPEC, DIALECTS["comfyui"]).save(tmp_path / "comfy.safetensors")
    again = read_lora(tmp_path / "comfy.safetensors", shapes, spec=SPEC)
    told = {
        key.removeprefix("ss_network_"): again.metadata[key] for key in again.metadata if "network" in key
    }
    assert told == {"module": "networks.lora", "dim": "9", "alpha": "4.5", "args": "{}"}
    assert not again.others and {pair.rank for pair in again.pairs.values()} == {9}  # the LoRA that it equals
    for name, pair in again.pairs.items():
        torch.testing.assert_close(pair.delta(), file.pairs[name].delta(), rtol=1e-4, atol=1e-5)


def test_a_file_starts_a_run_of_its_kind_and_rank_only(tmp_path):
    model, shapes = trained(build(), SPEC.lora_targets(build())), linear_shapes(build())
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_lora(tmp_path / "a.safetensors", tensors, rank=3, alpha=1.5, metadata={}, architecture=SPEC.name)
    file, targets = read_lora(tmp_path / "a.safetensors", shapes, spec=SPEC), SPEC.lora_targets(build())
    again = build()
    inject(again, targets, kind=LohaLinear, rank=3, alpha=6.0)  # another alpha is folded in
    start_from(again, file)
    for a, b in zip(adapted_layers(again), adapted_layers(model), strict=True):
        torch.testing.assert_close(delta(a), delta(b))
    other = build()
    inject(other, targets, rank=3)
    with pytest.raises(CheckpointError, match="is a LoHa, this run trains a LoRA: set adapter.type"):
        start_from(other, file)
    other = build()
    inject(other, targets, kind=LohaLinear, rank=4)
    with pytest.raises(CheckpointError, match="has rank 3, this run trains rank 4: set adapter.rank=3"):
        start_from(other, file)


def test_rows_of_a_slice():
    model = trained(toy(), ["0"], rows={"0": (2, 5)})
    assert model[0].hada_w1_a.shape == (3, 3)
    x = torch.randn(4, 5)
    moved = (model[0](x) - toy()[0](x)).abs().amax(0) > 0
    assert moved.tolist() == [False] * 2 + [True] * 3 + [False] * 3
    whole = whole_rows(model, {f"0.{part}": getattr(model[0], part).detach() for part in PARTS})
    parts = {part.removeprefix("0.hada_"): tensor for part, tensor in whole.items()}
    torch.testing.assert_close(
        LohaLinear.pair(parts, 1.5).delta().double(), delta(model[0]), rtol=1e-5, atol=1e-6
    )


def test_what_a_file_must_hold(tmp_path):
    model, shapes = trained(build(), SPEC.lora_targets(build())), linear_shapes(build())
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_lora(tmp_path / "a.safetensors", tensors, rank=3, alpha=1.5, metadata={}, architecture=SPEC.name)
    held = load_file(tmp_path / "a.safetensors")
    name = next(n for n in held if n.endswith("hada_w2_a"))
    for bad, says in (
        ({n: t for n, t in held.items() if n != name}, "has no w2_a-projection: the file is incomplete"),
        ({**held, name: held[name][:, :2].contiguous()}, "not twice"),
        ({**held, name: held[name][:, 0].contiguous()}, "not twice"),
        ({**held, name.replace("hada_w2_a", "lora_up.weight"): torch.ones(3, 3)}, "is a LoHa and a LoRA at "
        "once"),
        ({**held, name.replace("w2_a", "t1"): torch.ones(3, 3)}, "holds convolution LoHa weights, which are "
        "not supported"),
    ):
        save_file(bad, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=says):
            read_lora(tmp_path / "bad.safetensors", shapes, spec=SPEC)


def test_a_run_trains_saves_and_resumes_one(tmp_path):
    shards = make_shards(tmp_path / "set")
    options = ("adapter.type=loha", "adapter.rank=2", "run.save_every_steps=2")
    assert train.run(config(shards, tmp_path / "a", *options, "run.steps=4")) == 0
    assert train.run(config(shards, tmp_path / "b", *options, "run.steps=2")) == 0
    assert train.run(config(shards, tmp_path / "b", *options, "run.steps=4")) == 0
    a, b = (load_file(tmp_path / run / "lora.safetensors") for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert max(t.abs().max() for n, t in a.items() if n.endswith("hada_w2_a")) > 1e-4
    try:  # its parameters are not in modules of their own: ZeRO-3 gathers them with the layer's
        zero = ("zero.engine=deepspeed", "zero.stage=3")
        assert train.run(config(shards, tmp_path / "zero", *options, *zero, "run.steps=4")) == 0
    finally:
        shutdown()
    cut = load_file(tmp_path / "zero/lora.safetensors")
    for name in a:
        torch.testing.assert_close(cut[name], a[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="adapter.dropout is 0.1, but a LoHa has no dropout"):
        train.run(config(shards, tmp_path / "c", *options, "adapter.dropout=0.1"))
    with pytest.raises(ConfigError, match="adapter.type: no adapter 'lohaa'; did you mean 'loha'"):
        train.run(config(shards, tmp_path / "c", "adapter.type=lohaa"))
    assert set(ADAPTERS) == {"lora", "loha", "lokr", "dora"}
