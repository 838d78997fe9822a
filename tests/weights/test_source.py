"""From any file to a model on the meta device: names, the report of what differs, configs, values in
float8."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hvtrain.errors import CheckpointError
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.float8 import Fp8Linear
from hvtrain.weights.keymap import OWN_NAMES, KeyMap, Rule
from hvtrain.weights.source import Source, anchored, check, config_of, shapes_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6)
        self.out = nn.Linear(6, 4, bias=False)


def meta() -> Model:
    with torch.device("meta"):
        return Model()


def test_a_model_is_filled_from_other_names_cuts_and_dtypes(tmp_path):
    q, k, v = (torch.randn(2, 4) for _ in "qkv")
    bias, out = torch.randn(6), torch.randn(4, 6).to(torch.float8_e4m3fn)
    tensors = {"to_q.weight": q, "to_k.weight": k, "to_v.weight": v, "qkv.bias": bias, "out.weight": out}
    save_file(tensors | {"out.weight_scale": torch.tensor([1.0, 2.0, 0.5, 4.0])}, tmp_path / "x.safetensors")
    weights = open_weights(tmp_path / "x.safetensors")
    keys = KeyMap([Rule("qkv", ("to_q", "to_k", "to_v"))], passthrough=True)
    source = Source(weights, keys.read(name for name in weights if "scale" not in name))
    model = meta()
    check(source.path, shapes_of(model), source.shapes)
    edited = []
    source.fill(
        model, dtype=torch.float64, edit=lambda name, weight: edited.append((name, weight.clone())) or False
    )
    assert (
        torch.equal(model.qkv.weight, torch.cat([q, k, v]).double())
        and model.qkv.weight.dtype == torch.float64
    )
    whole = out.double() * torch.tensor([1.0, 2.0, 0.5, 4.0]).view(4, 1)
    assert torch.equal(model.out.weight, whole) and torch.equal(model.qkv.bias, bias.double())
    assert [name for name, _ in edited] == ["qkv", "qkv.bias", "out"] and torch.equal(edited[2][1], whole)
    model = meta()
    source.fill(model, dtype=torch.float32, eight_bit=["qkv", "out"], how="fp8_rows")
    assert type(model.qkv) is type(model.out) is Fp8Linear
    assert (
        torch.equal(model.out.weight.float(), out.float())
        and model.out.scale_weight.tolist() == [[1], [2], [0.5], [4]]
    )
    assert (model.qkv.weight.float() * model.qkv.scale_weight - torch.cat([q, k, v])).abs().max() < 0.1
    assert torch.equal(model.qkv.bias, bias)
    model = meta()
    source.fill(model, dtype=torch.float16, device="meta")
    assert model.out.weight.device.type == "meta" and model.out.weight.dtype == torch.float16


def test_what_differs_is_named(tmp_path):
    wanted = {"a": (2, 3), "b": (4,), "c": (), "d": (1,)}
    found = {"a": (2, 3), "b": (4, 1), **{f"x{n}": (1,) for n in range(4)}, "c": (1,)}
    with pytest.raises(CheckpointError) as caught:
        check("some.safetensors", wanted, found)
    assert str(caught.value) == (
        "some.safetensors: its tensors do not fit the model: 1 missing: d; 4 unexpected: x0, x1, x2, ...; "
        "2 of another shape: b is 4x1, expected 4, c is 1, expected a scalar. Is the file complete?"
    )
    with pytest.raises(CheckpointError, match="^f: not a VAE: 1 missing: d; it is a DiT$"):
        check("f", {"d": (1,)}, {}, what="not a VAE", hint="; it is a DiT")
    check("f", wanted, wanted)
    check("f", {"a": (2, 3)}, {"a": (2, 3, 1, 1)}, ones=True)
    with pytest.raises(CheckpointError, match="a is 2x3x1, expected 2x4"):
        check("f", {"a": (2, 4)}, {"a": (2, 3, 1)}, ones=True)


def test_a_part_is_found_under_any_prefix(tmp_path):
    names = (
        "model.text.embed.weight", "model.text.head.bias", "vision.embed_two.weight",
        "other.model.text.embed.weight"
    )
    save_file({name: torch.ones(2, n + 1) for n, name in enumerate(names)}, tmp_path / "x.safetensors")
    source = anchored(tmp_path / "x.safetensors", {"embed.weight": OWN_NAMES}, what="a text encoder")
    assert (
        source.shapes == {"embed.weight": (2, 1), "head.bias": (2, 2)} and source.shape("head.bias") == (2, 2)
    )
    with pytest.raises(CheckpointError, match="x.safetensors: no 'norm.weight' in it, which tells the size"):
        source.shape("norm.weight")
    # of the whole file
    assert fingerprint(source.weights) == fingerprint(open_weights(tmp_path / "x.safetensors"))
    theirs = {"wte.weight": OWN_NAMES, "head.bias": KeyMap([Rule("out", ("head",))])}
    source = anchored(tmp_path / "x.safetensors", theirs, what="")  # in another dialect's words
    assert source.shapes == {"embed.weight": (2, 1), "out.bias": (2, 2)}
    assert source.read("out.bias", dtype=torch.float16).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(
        CheckpointError, match=r"not a text encoder: no 'wte.weight' in it \(its first keys: "
    ):
        anchored(tmp_path / "x.safetensors", {"wte.weight": OWN_NAMES}, what="a text encoder")


def test_the_config_of_a_file_and_of_a_stranger_beside_it(tmp_path):
    path, mine = tmp_path / "x.safetensors", lambda config: config.get("type") == "ours"
    path.touch()
    assert config_of(path, {}, "key", mine=mine) == {}
    (tmp_path / "config.json").write_text('{"type": "theirs"}')
    assert config_of(path, {}, "key", mine=mine) == {}
    (tmp_path / "config.json").write_text('{"type": "ours"}')
    assert config_of(path, {}, "key", mine=mine) == config_of(
        tmp_path, {}, "key", mine=mine
    ) == {"type": "ours"}
    assert config_of(path, {"key": json.dumps({"n": 1})}, "key", mine=mine) == {"n": 1}
    for text, says in (("{", "metadata 'key': not JSON"), ("[1]", "expected a JSON object, found list")):
        with pytest.raises(CheckpointError, match=says):
            config_of(path, {"key": text}, "key", mine=mine)
