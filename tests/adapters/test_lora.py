from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvtrain.adapters.attach import (
    inject,
    linear_shapes,
    merge_all,
    seed_dropout,
    start_from,
)
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.pairs import LoraPair

TARGETS = ["0", "2.fc"]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(x)


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Inner(), nn.Linear(6, 4))


def trained(model: nn.Module, **options) -> nn.Module:
    """Adapters as after training: the up-projections are not zero."""
    names = inject(model, TARGETS, **{"rank": 3, "alpha": 1.5, **options})
    draw = torch.Generator().manual_seed(1)
    for name in names:
        if "lora_up" in name:
            parameter = model.get_parameter(name)
            parameter.data = torch.randn(parameter.shape, generator=draw)
    return model


def as_file(model: nn.Module) -> LoraFile:
    pairs = {
        name: LoraPair(layer.lora_down.weight.data, layer.lora_up.weight.data, layer.alpha)
        for name, layer in ((n, model.get_submodule(n)) for n in TARGETS)
    }
    return LoraFile(Path("toy.safetensors"), pairs)


def test_inject_keeps_base_names_and_the_output():
    plain, model = toy(), toy()
    names = inject(model, TARGETS, rank=3)
    assert names == [f"{t}.lora_{part}.weight" for t in TARGETS for part in ("down", "up")]
    assert set(plain.state_dict()) == {n for n in model.state_dict() if "lora_" not in n}
    x = torch.randn(2, 7, 5)
    assert torch.equal(model(x), plain(x))
    model(x).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all((grads[n] is not None) == (n in names) for n in grads)
    assert grads["0.lora_up.weight"].abs().max() > 0


def test_start_depends_on_seed_and_name_only():
    one, other, third = toy(), toy(), toy()
    inject(one, TARGETS, rank=3, seed=5)
    inject(other, TARGETS[1:], rank=3, seed=5)
    inject(third, TARGETS, rank=3, seed=6)
    down = [m.get_parameter("2.fc.lora_down.weight") for m in (one, other, third)]
    assert torch.equal(down[0], down[1]) and not torch.equal(down[0], down[2])
    assert down[0].abs().max() <= 8**-0.5  # kaiming_uniform(a=sqrt 5): bound 1 / sqrt(fan in)


def test_live_adapter_equals_merged_weights():
    model, merged = trained(toy()), toy()
    merge_all(merged, [(as_file(model), 1.0)])
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(model(x), merged(x))
    assert not torch.allclose(merged(x), toy()(x), atol=1e-2)


def test_several_loras_and_multipliers():
    file = as_file(trained(toy()))
    merged, expected = toy(), toy()
    merge_all(merged, [(file, 0.5), (file, 0.25), (file, 0.0)])
    merge_all(expected, [(file, 0.75)])
    for a, b in zip(merged.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_base_with_and_without_autocast():
    model = trained(toy().bfloat16())
    assert model[0].lora_down.weight.dtype == torch.float32
    x = torch.randn(2, 7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        under = model(x)
    plain = model(x.bfloat16())
    assert under.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(under, plain, rtol=0.05, atol=0.1)


def test_dropout_is_a_function_of_the_place_in_the_run():
    model = trained(toy(), dropout=0.5).train()
    x = torch.randn(2, 7, 5)
    with pytest.raises(RuntimeError, match="seed_dropout"):
        model(x)

    def at(**key) -> torch.Tensor:
        seed_dropout(model, 1, **{"step": 3, "micro": 0, "dp_rank": 0, **key})
        return model(x)

    first = at()
    assert torch.equal(first, at())
    for other in ({"step": 4}, {"micro": 1}, {"dp_rank": 1}):
        assert not torch.equal(first, at(**other))
    seed_dropout(model, 1, step=3)
    halves = torch.cat([model(x[:, :4]), model(x[:, 4:])], dim=1)
    torch.testing.assert_close(halves, first)  # a split of the sequence over ranks drops the same
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_keeps_the_expected_delta():
    model = trained(toy(), dropout=0.4).train()
    layer, x = model[0], torch.randn(4000, 1, 5)[:1].expand(4000, 1, 5)
    seed_dropout(model, 0)
    dropped = layer(x).mean(0)
    layer.eval()
    torch.testing.assert_close(dropped, layer(x)[0], atol=0.12, rtol=0)


def test_recomputation_drops_the_same():
    model = trained(toy(), dropout=0.5).train()
    x = torch.randn(2, 7, 5)

    def gradients(run) -> list[torch.Tensor]:
        model.zero_grad()
        seed_dropout(model, 1, step=2)
        run(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    again = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
    assert len(again) == 4
    for a, b in zip(gradients(model), again, strict=True):
        assert torch.equal(a, b)


def test_start_from_a_file():
    file = as_file(trained(toy()))
    model = toy()
    inject(model, TARGETS, rank=3, alpha=6.0)
    start_from(model, file)
    x = torch.randn(2, 5)
    torch.testing.assert_close(model(x), trained(toy())(x))
    small = toy()
    inject(small, TARGETS, rank=2)
    with pytest.raises(CheckpointError, match="has rank 3, this run trains rank 2"):
        start_from(small, file)
    narrow = toy()
    inject(narrow, TARGETS[:1], rank=3)
    with pytest.raises(CheckpointError, match="first '2.fc'"):
        start_from(narrow, file)


def test_refusals():
    with pytest.raises(ConfigError, match="no layer '2.fb': did you mean '2.fc'"):
        inject(toy(), ["2.fb"], rank=3)
    with pytest.raises(ConfigError, match="is a Tanh"):
        inject(toy(), ["1"], rank=3)
    with pytest.raises(ConfigError, match="rank is 0"):
        inject(toy(), TARGETS, rank=0)
    with pytest.raises(ConfigError, match="no target layers"):
        inject(toy(), [], rank=1)
    wide = LoraFile(Path("x.safetensors"), {"3": LoraPair(torch.zeros(2, 6), torch.zeros(5, 2), 2.0)})
    with pytest.raises(CheckpointError, match="5x6, this model's is 4x6"):
        merge_all(toy(), [(wide, 1.0)])


def test_linear_shapes():
    assert linear_shapes(toy()) == {"0": (8, 5), "2.fc": (6, 8), "3": (4, 6)}
