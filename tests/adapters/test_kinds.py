"""What is asked of every adapter: its size, that merged it is what it was beside the
layer, its file, its slices."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hvtrain.adapters.attach import (
    adapted_layers,
    inject,
    linear_shapes,
    merge_all,
    seed_dropout,
    start_from,
    whole_rows,
)
from hvtrain.adapters.layer import AdaptedLinear, How
from hvtrain.adapters.lokr import KroneckerPair, LokrLinear, factorized
from hvtrain.adapters.table import ADAPTERS
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.convert import converted
from hvtrain.lorafiles.dialects import DIALECTS
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.pairs import add_pairs, changed_rows
from hvtrain.lorafiles.write import save_lora
from tests.adapters.models import SPEC, an_input, build

RANK, ALPHA = 3, 1.5
OUT, IN = 20, 12
COUNT = {
    "lora": RANK * (IN + OUT), "dora": RANK * (IN + OUT) + OUT, "loha": 2 * RANK * (IN + OUT),
    # 20 = 4 x 5 and 12 = 3 x 4: w1 is 4 x 3, and 3 is more than half of 5, so that w2 is whole
    "lokr": 4 * 3 + 5 * 4,
}  # fmt: skip


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT))


def trained(model: nn.Module, kind: str, targets=("0",), **options) -> nn.Module:
    """As after training: nothing is as it began."""
    inject(
        model, list(targets), **{"kind": ADAPTERS[kind], "rank": RANK, "alpha": ALPHA, "seed": 4, **options}
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model):
            for parameter in layer.parts.values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def changed_weight(layer: AdaptedLinear) -> Tensor:
    """[out, in] in float64, by the papers' formulas and nothing of ours."""
    w = layer.weight.detach().double().clone()
    p = {part.removeprefix("lokr_"): t.detach().double() for part, t in layer.parts.items()}
    begin, end = layer.rows
    s = layer.alpha / layer.rank
    if isinstance(layer, LokrLinear):
        w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
        return w + torch.kron(p["w1"], w2) * (1.0 if "w2" in p else s)
    added = (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"]) * s if "w1_a" in p else p["up"] @ p["down"] * s
    own = w[begin:end] + added
    if "magnitude" in p:
        own = own / own.norm(dim=1, keepdim=True) * p["magnitude"][:, None]
    w[begin:end] = own
    return w


def save(tmp_path, model: nn.Module, name: str = "a.safetensors", rank: int = RANK, alpha: float = ALPHA):
    path = tmp_path / name
    tensors = whole_rows(model, tensors_of(model))
    save_lora(path, tensors, rank=rank, alpha=alpha, metadata={}, architecture=SPEC.name)
    return path


def test_every_kind_is_looked_at():
    assert set(COUNT) == set(ADAPTERS)


@pytest.mark.parametrize("kind", COUNT)
def test_size_start_and_gradients(kind):
    plain, model = linear(), linear()
    inject(model, ["0"], kind=ADAPTERS[kind], rank=RANK, alpha=ALPHA)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNT[kind]
    x = torch.randn(2, 7, IN)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)  # it begins as it was
    model = trained(linear(), kind)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model[0].parts.values())
    assert model[0].weight.grad is None and model[0].bias.grad is None


@pytest.mark.parametrize("rows", [None, (5, 11)])
@pytest.mark.parametrize("kind", COUNT)
def test_merged_is_what_it_was_beside_the_layer(kind, rows, tmp_path):
    if kind == "lokr" and rows:
        with pytest.raises(
            ConfigError, match="'0', a slice of some rows, of a LoKr: some rows of a Kronecker product are no"
        ):
            trained(linear(), kind, rows={"0": rows})
        return
    model = trained(linear(), kind, rows={"0": rows} if rows else None)
    x = torch.randn(64, IN)
    want = changed_weight(model[0])
    beside = model.double()(x.double())  # the layer's own way, in double precision
    torch.testing.assert_close(beside, x.double() @ want.T + model[0].bias, rtol=1e-6, atol=1e-6)
    path = save(tmp_path, model)
    file = read_lora(path, {"0": (OUT, IN)}, decomposed=True)
    merged = linear()
    merge_all(merged, [(file, 1.0)])
    torch.testing.assert_close(merged[0].weight.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged(x).double(), beside, rtol=1e-5, atol=1e-5)
    half = linear()
    merge_all(half, [(file, 0.5)])
    torch.testing.assert_close(half[0].weight.double(), (want + linear()[0].weight) / 2, rtol=1e-6, atol=1e-6)
    if rows:
        assert torch.equal(merged[0].weight[: rows[0]], linear()[0].weight[: rows[0]])
        assert torch.equal(merged[0].weight[rows[1] :], linear()[0].weight[rows[1] :])
        assert changed_rows(file.pairs["0"].up) == rows


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_slices_of_a_layer_are_disjoint(kind, tmp_path):
    """Two that own its halves: merged one after the other, in either order or at
    once, bit for bit the same."""
    halves = [
        trained(linear(), kind, rows={"0": rows}, seed=i) for i, rows in enumerate(((0, 10), (10, OUT)))
    ]
    files = [
        read_lora(save(tmp_path, m, f"{i}.safetensors"), {"0": (OUT, IN)}, decomposed=True) for i,
        m in enumerate(halves)
    ]
    results = []
    for order in ([0, 1], [1, 0]):
        merged = linear()
        for i in order:
            merge_all(merged, [(files[i], 1.0)])
        results.append(merged[0].weight)
    together = linear()
    merge_all(together, [(f, 1.0) for f in files])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], together[0].weight)
    want = torch.cat([changed_weight(halves[0][0])[:10], changed_weight(halves[1][0])[10:]])
    torch.testing.assert_close(together[0].weight.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", COUNT)
def test_files_keep_every_value_and_start_a_run(kind, tmp_path):
    model, shapes = trained(build(), kind, SPEC.lora_targets(build())), linear_shapes(build())
    path = save(tmp_path, model)
    file = read_lora(path, shapes, spec=SPEC, decomposed=True)
    for layer in adapted_layers(model):
        held = file.delta(layer.name)
        assert held.kind is type(layer) and held.parts.keys() == layer.parts.keys()
        for part, own in layer.parts.items():
            assert torch.equal(held.parts[part].flatten(), own.flatten())
    assert ADAPTERS[kind].LABEL in (file.summary() if kind != "lora" else "LoRA")
    again = build()
    # another alpha is folded in
    inject(again, SPEC.lora_targets(again), kind=ADAPTERS[kind], rank=RANK, alpha=6.0)
    start_from(again, file)
    merged = build()
    merge_all(merged, [(file, 1.0)])
    with torch.no_grad():
        here, there, base = model(an_input()), again(an_input()), build()(an_input())
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(an_input()), here, rtol=2e-3, atol=2e-3)
    assert (here - base).abs().max() > 0.1


def test_names_and_metadata_of_lycoris(tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    for kind, names, algorithm in (
        ("dora", {"lora_down.weight": (3, 48), "lora_up.weight": (144, 3), "dora_scale": (144, 1)}, "lora"),
        ("lokr", {"lokr_w1": (12, 6), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 8)}, "lokr"),
    ):
        path = save(tmp_path, trained(build(), kind, SPEC.lora_targets(build())))
        held = {
            n.removeprefix(f"{stem}."): tuple(t.shape) for n,
            t in load_file(path).items() if n.startswith(stem)
        }
        assert held == {**names, "alpha": ()}
        file = read_lora(path, linear_shapes(build()), spec=SPEC, decomposed=True)
        assert file.metadata["ss_network_module"] == "lycoris.kohya"
        assert json.loads(file.metadata["ss_network_args"])["algo"] == algorithm


# --- LoKr ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, factor, found", [
    (127, -1, (1, 127)), (128, -1, (8, 16)), (128, 2, (2, 64)), (128, 4, (4, 32)), (128, 16, (8, 16)),
    (250, -1, (10, 25)), (250, 4, (2, 125)), (250, 8, (5, 50)), (360, 4, (4, 90)), (512, -1, (16, 32)),
    (1024, 16, (16, 64)), (3072, -1, (48, 64)), (128, 100, (8, 16)), (1, -1, (1, 1)), (7, 7, (1, 7)),
])  # fmt: skip
def test_sizes_of_the_two_matrices(n, factor, found):
    """LyCORIS' table."""
    assert factorized(n, factor) == found


@pytest.mark.parametrize("rank, factor, parts", [
    (1, -1, {"w1": (4, 3), "w2_a": (5, 1), "w2_b": (1, 4)}), (3, -1, {"w1": (4, 3), "w2": (5, 4)}),
    (2, 2, {"w1": (2, 2), "w2_a": (10, 2), "w2_b": (2, 6)}), (100_000, 4, {"w1": (4, 3), "w2": (5, 4)}),
])  # fmt: skip
def test_forms_of_a_lokr(rank, factor, parts, tmp_path):
    """And each as the pair that it equals, whose rank is the least."""
    model = trained(linear(), "lokr", rank=rank, alpha=0.5, how=How(factor=factor))
    assert {part.removeprefix("lokr_"): tuple(t.shape) for part, t in model[0].parts.items()} == parts
    file = read_lora(save(tmp_path, model, rank=rank, alpha=0.5), {"0": (OUT, IN)})
    pair = file.pairs["0"]
    assert isinstance(pair, KroneckerPair)
    want = changed_weight(model[0]) - model[0].weight.double()
    torch.testing.assert_close(pair.delta().double(), want, rtol=1e-5, atol=1e-6)
    assert pair.rank == len(pair.down) == pair.up.shape[1] and pair.shape == (OUT, IN)
    a, c = parts["w1"]
    assert pair.rank == min(a, c) * (rank if "w2_a" in parts else min(parts["w2"]))
    weight = torch.zeros(OUT, IN)
    add_pairs(weight, [(pair, 2.0)])
    torch.testing.assert_close(weight.double(), 2 * want, rtol=1e-5, atol=1e-6)


def test_a_lokr_with_both_matrices_decomposed_is_read_as_lycoris_means_it(tmp_path):
    g = torch.Generator().manual_seed(0)
    parts = {"w1_a": (4, 2), "w1_b": (2, 3), "w2_a": (5, 2), "w2_b": (2, 4)}
    held = {f"lora_unet_0.lokr_{part}": torch.randn(shape, generator=g) for part, shape in parts.items()}
    save_file({**held, "lora_unet_0.alpha": torch.tensor(4.0)}, tmp_path / "a.safetensors")
    pair = read_lora(tmp_path / "a.safetensors", {"0": (OUT, IN)}).pairs["0"]
    w1a, w1b, w2a, w2b = held.values()
    torch.testing.assert_close(pair.delta(), torch.kron(w1a @ w1b, w2a @ w2b) * 2, rtol=1e-5, atol=1e-5)


def test_a_lokr_becomes_the_lora_that_it_equals(tmp_path):
    file = read_lora(
        save(tmp_path, trained(build(), "lokr", SPEC.lora_targets(build()))), linear_shapes(build()),
        spec=SPEC
    )
    for dialect in ("comfyui", "diffusers"):
        converted(file, SPEC, DIALECTS[dialect]).save(tmp_path / "b.safetensors")
        again = read_lora(tmp_path / "b.safetensors", linear_shapes(build()), spec=SPEC)
        assert not again.others
        for name, pair in again.pairs.items():
            torch.testing.assert_close(pair.delta(), file.pairs[name].delta(), rtol=1e-4, atol=1e-4)


# --- DoRA ---------------------------------------------------------------------------------------------------


def test_a_dora_learns_as_peft_s(tmp_path):
    """Output and gradients of PEFT's own layer, from the same values."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        linear(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0"])
    )
    model, wrapped = trained(linear(), "dora"), theirs.base_model.model[0]
    parts = model[0].parts
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(parts["down"])
        wrapped.lora_B["default"].weight.copy_(parts["up"])
        wrapped.lora_magnitude_vector["default"].weight.copy_(parts["magnitude"])
    x = torch.randn(2, 7, IN)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    for one in (model, theirs):
        one(x).square().mean().backward()
    torch.testing.assert_close(parts["up"].grad, wrapped.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        parts["down"].grad, wrapped.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6
    )
    magnitude = wrapped.lora_magnitude_vector["default"].weight.grad
    torch.testing.assert_close(parts["magnitude"].grad, magnitude, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_peft_loads_what_a_product_s_file_holds(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(linear(), kind, rank=1, alpha=1.0)
    configs = {"lokr": lambda: peft.LoKrConfig(r=1, alpha=1, target_modules=["0"]),
               "loha": lambda: peft.LoHaConfig(r=1, alpha=1, target_modules=["0"])}  # fmt: skip
    theirs = peft.get_peft_model(linear(), configs[kind]())
    held = load_file(save(tmp_path, model, rank=1, alpha=1.0))
    state = {
        f"base_model.model.0.{name.removeprefix('lora_unet_0.')}": t for name,
        t in held.items() if "alpha" not in name
    }
    report = peft.set_peft_model_state_dict(theirs, state)
    assert not report.unexpected_keys
    want = changed_weight(model[0]) - model[0].weight.double()
    delta = theirs.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(delta.double(), want, rtol=1e-5, atol=1e-5)


def test_a_dora_keeps_the_base_s_dtype_and_autocast_does_not_blur_its_lengths():
    model = trained(linear().bfloat16(), "dora")
    x = torch.randn(2, 7, IN)
    with torch.autocast("cpu", torch.bfloat16):
        under = model(x)
        exact = model[0]._lengths()
    assert under.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(exact, model[0]._lengths())
    want = x.double() @ changed_weight(model[0]).T + model[0].bias.double()
    torch.testing.assert_close(under.double(), want, rtol=0.05, atol=0.1)


def test_what_needs_no_weights_refuses_a_dora(tmp_path):
    path = save(tmp_path, trained(build(), "dora", SPEC.lora_targets(build())))
    with pytest.raises(
        CheckpointError,
        match="is a DoRA: what it adds to a weight depends on the weight.*hvtrain merge --dit"
    ):
        read_lora(path, linear_shapes(build()), spec=SPEC)
    with pytest.raises(ValueError, match="depends on the weight"):
        read_lora(path, linear_shapes(build()), spec=SPEC, decomposed=True).pairs[
            "double_blocks.0.img_attn_qkv"
        ].delta()
    held = load_file(path)
    name = next(n for n in held if n.endswith("dora_scale"))
    save_file({**held, name: held[name][:5].contiguous()}, tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has lengths of shape \[5, 1\], expected one for each of its \d+ output rows"
    ):
        read_lora(tmp_path / "b.safetensors", linear_shapes(build()), spec=SPEC, decomposed=True)


# --- options of all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_capped_norm(kind, tmp_path):
    """The layer adds no more than the cap, the file says so, and below the cap nothing changes."""
    free = trained(linear(), kind)
    norm = (changed_weight(free[0]) - free[0].weight.double()).norm().item()
    x = torch.randn(9, IN)
    loose = trained(linear(), kind, how=How(max_norm=2 * norm))
    torch.testing.assert_close(loose(x), free(x))
    tight = trained(linear(), kind, how=How(max_norm=norm / 4))
    base = linear()(x)
    torch.testing.assert_close(tight(x) - base, (free(x) - base) / 4, rtol=1e-4, atol=1e-5)
    added = read_lora(save(tmp_path, tight), {"0": (OUT, IN)}).pairs["0"].delta()
    assert added.norm().item() == pytest.approx(norm / 4, rel=1e-5)
    tight(x).sum().backward()
    assert all(p.grad is not None for p in tight[0].parts.values())


@pytest.mark.parametrize("kind", COUNT)
def test_a_layer_without_its_adapter(kind):
    model, plain = trained(linear(), kind, how=How(module_dropout=0.4)).train(), linear()
    x, gone = torch.randn(3, IN), []
    for step in range(300):
        seed_dropout(model, 1, step=step)
        found = model(x)
        gone.append(torch.allclose(found, plain(x), atol=1e-6))
        assert gone[-1] or torch.allclose(found, trained(linear(), kind)(x), atol=1e-5)
    assert sum(gone) / 300 == pytest.approx(0.4, abs=0.1)
    model.zero_grad()
    model(x).sum().backward()  # also the layer that goes without has gradients
    assert all(p.grad is not None for p in model[0].parts.values())
    torch.testing.assert_close(model.eval()(x), trained(linear(), kind)(x))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_rank_dropout_is_one_draw_for_all_samples_and_keeps_the_mean(kind):
    model = trained(linear(), kind, how=How(rank_dropout=0.4)).train()
    x = torch.randn(1, 2, IN).expand(5, 2, IN)
    whole, total = trained(linear(), kind)(x), 0
    for step in range(1500):
        seed_dropout(model, 1, step=step)
        found = model(x)
        assert torch.equal(found[0], found[4])
        total = total + found.detach()
    torch.testing.assert_close(total / 1500, whole, rtol=0, atol=0.15)
    seed_dropout(model, 1, step=3)
    # a split of the sequence over ranks drops the same
    parts = torch.cat([model(x[:, :1]), model(x[:, 1:])], dim=1)
    torch.testing.assert_close(parts, model(x))
    assert not torch.allclose(parts, whole, atol=1e-3)


@pytest.mark.parametrize("kind, options, says", [
    ("lokr", {"dropout": 0.1}, "a LoKr has no dropout"),
    ("loha", {"how": How(start="svd")}, "adapter.init is svd, but a LoHa"),
    (
        "dora", {"how": How(max_norm=1.0)},
        "scale_weight_norms is 1.0, but of a DoRA its rows have the lengths"
    ),
    ("dora", {"how": How(start="pissa")}, "adapter.init is pissa, but of a DoRA"),
    ("lora", {"how": How(factor=4)}, "adapter.factor is 4, but it is a LoKr's"),
    ("lora", {"how": How(start="pissa", max_norm=1.0)}, "scale_weight_norms would cut it"),
    ("lora", {"how": How(start="olora")}, "adapter.init: no start 'olora'"),
])  # fmt: skip
def test_what_a_kind_cannot_have_is_refused(kind, options, says):
    with pytest.raises(ConfigError, match=says):
        inject(linear(), ["0"], kind=ADAPTERS[kind], rank=2, **options)


def test_a_file_that_mixes_kinds_or_lacks_a_part(tmp_path):
    held = load_file(save(tmp_path, trained(linear(), "lokr", rank=1)))
    stem = "lora_unet_0"
    for bad, says in (
        ({n: t for n, t in held.items() if not n.endswith("w2_b")}, "has no lokr_w2_b-projection: the file "
        "is incomplete"),
        ({**held, f"{stem}.lokr_w2": torch.ones(5, 4)}, "more than make one LoKr"),
        ({**held, f"{stem}.dora_scale": torch.ones(OUT, 1)}, "is a DoRA and a LoKr at once"),
        ({**held, f"{stem}.lora_up.weight": torch.ones(OUT, 1)}, "is a LoKr and a LoRA at once"),
        ({**held, f"{stem}.lokr_t2": torch.ones(1, 1, 3, 3)}, "holds convolution LoKr weights"),
        (
            {**held, f"{stem}.lokr_w2_a": torch.ones(5, 2)},
            r"has lokr_w2_a and lokr_w2_b of shapes \[5, 2\] and \[1, 4\]"
        ),
        ({**held, f"{stem}.lokr_w1": torch.ones(3, 3)}, "adapts a layer of shape 15x12, this model's is "
        "20x12"),
    ):
        save_file(bad, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=says):
            read_lora(tmp_path / "bad.safetensors", {"0": (OUT, IN)})
