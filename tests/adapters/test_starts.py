"""Where adapters start: the weight's principal part, a file, a merge; ranks and alphas of single layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvtrain.adapters.attach import (
    adapted_layers,
    inject,
    merge_all,
    ranks_of,
    start_from,
    trained,
    whole_rows,
)
from hvtrain.adapters.layer import How
from hvtrain.adapters.lora import LoraLinear
from hvtrain.adapters.table import ADAPTERS
from hvtrain.config import AdapterConfig
from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.overlap import Contribution
from hvtrain.lorafiles.write import save_lora
from hvtrain.merge.run import joined

OUT, IN, RANK = 20, 12, 3


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def saved(tmp_path, model: nn.Module, name: str = "a.safetensors"):
    save_lora(tmp_path / name, whole_rows(model, tensors_of(model)), rank=RANK, alpha=1.5, metadata={})
    return read_lora(tmp_path / name, {"0": (OUT, IN)})


@pytest.mark.parametrize("rows", [None, (4, 16)])
def test_pissa_trains_the_principal_part_and_its_file_is_a_lora_of_the_untouched_weight(rows, tmp_path):
    model = linear()
    inject(model, ["0"], rank=RANK, alpha=1.5, rows={"0": rows} if rows else None, how=How(start="pissa"))
    layer, (begin, end) = model[0], rows or (0, OUT)
    assert torch.equal(layer.weight, linear()[0].weight)
    u, s, vh = torch.linalg.svd(layer.weight.detach()[begin:end], full_matrices=False)
    best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    up, down = layer.lora_up.weight.detach(), layer.lora_down.weight.detach()
    torch.testing.assert_close(up @ down * 0.5, best, rtol=1e-4, atol=1e-5)
    # the root of a singular value each
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-5)
    x = torch.randn(5, IN)
    torch.testing.assert_close(model(x), linear()(x), rtol=0, atol=1e-5)
    # the gradient is that of the residual's LoRA: W - best frozen, up and down beside it
    residual = linear()[0].weight.detach().clone()
    residual[begin:end] -= best
    mine, theirs = up.clone().requires_grad_(), down.clone().requires_grad_()
    whole = residual + nn.functional.pad(mine @ theirs * 0.5, (0, 0, begin, OUT - end))
    (x @ whole.T + layer.bias.detach()).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_up.weight.grad, mine.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.lora_down.weight.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        layer.lora_up.weight += 0.3 * torch.randn(end - begin, RANK)
        layer.lora_down.weight += 0.3 * torch.randn(RANK, IN)
    file = saved(tmp_path, model)
    assert file.pairs["0"].rank == 2 * RANK and file.pairs["0"].scale == 0.5
    merged = linear()
    merge_all(merged, [(file, 1.0)])
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ConfigError, match="'0' of 12 x 20 has no 13 directions; give it a lower rank by adapter.ranks"
    ):
        inject(linear(), ["0"], rank=13, how=How(start="pissa"))


def test_svd_reads_the_principal_directions_and_adds_nothing():
    model = linear()
    inject(model, ["0"], rank=RANK, how=How(start="svd"))
    _, _, vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    down = model[0].lora_down.weight.detach()
    assert (nn.functional.normalize(down) @ vh[:RANK].T).abs().diag().min() > 0.999
    usual = linear()
    inject(usual, ["0"], rank=RANK)
    assert down.norm(dim=1).mean().item() == pytest.approx(
        usual[0].lora_down.weight.norm(dim=1).mean().item(), rel=0.3
    )
    assert not model[0].lora_up.weight.any()


# --- from a file --------------------------------------------------------------------------------------------


def a_lora(seed: int, size: float) -> nn.Sequential:
    model = linear()
    inject(model, ["0"], rank=RANK, alpha=1.5, seed=seed)
    model[0].lora_up.weight.data = size * torch.randn(
        OUT, RANK, generator=torch.Generator().manual_seed(seed)
    )
    return model


def test_a_merged_lora_trains_on_from_balanced_factors(tmp_path):
    """Ranks have added up and the multipliers are in one factor; what it adds stays,
    both factors are of one size."""
    files = [saved(tmp_path, a_lora(i, size), f"{i}.safetensors") for i, size in enumerate((1.0, 50.0))]
    pair = joined(
        [
            Contribution(str(i), f.pairs["0"], m) for i,
            (f, m) in enumerate(zip(files, (1.0, 0.2), strict=True))
        ]
    )
    assert pair.rank == 2 * RANK and pair.up.norm() > 5 * pair.down.norm()
    merged = type(files[0])(files[0].path, {"0": pair})
    run = linear()
    inject(run, ["0"], rank=8, alpha=4.0)
    fresh = run[0].lora_down.weight.detach().clone()
    start_from(run, merged, balance=True)
    up, down = run[0].lora_up.weight.detach(), run[0].lora_down.weight.detach()
    torch.testing.assert_close(up @ down * 0.5, pair.delta(), rtol=1e-4, atol=1e-4)
    used = up.norm(dim=0) > 0
    assert used.sum() == 2 * RANK
    assert torch.equal(down[~used], fresh[~used])  # what is not needed begins as in a new LoRA
    ratio = up.norm(dim=0)[used] / down.norm(dim=1)[used]
    # folded: alpha / rank is 1/2
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0), rtol=1e-3, atol=1e-3)
    small = linear()
    inject(small, ["0"], rank=4)
    with pytest.raises(
        CheckpointError,
        match=r"'0' at rank 4 would lose [\d.]+ % of what it adds: give a higher adapter.rank"
    ):
        start_from(small, merged, balance=True)
    with pytest.raises(
        CheckpointError,
        match=r"has rank 6, this run trains rank 4: set adapter.rank=6 .or adapter.init_balance"
    ):
        start_from(small, merged)


def test_a_balanced_start_takes_any_kind_that_is_a_low_rank_and_no_other_run(tmp_path):
    loha = linear()
    inject(loha, ["0"], kind=ADAPTERS["loha"], rank=2, alpha=1.5)
    loha[0].hada_w2_a.data.normal_(generator=torch.Generator().manual_seed(0))
    file = saved(tmp_path, loha)
    run = linear()
    inject(run, ["0"], rank=4)
    start_from(run, file, balance=True)
    x = torch.randn(5, IN)
    torch.testing.assert_close(run(x), loha(x), rtol=1e-4, atol=1e-4)
    other = linear()
    inject(other, ["0"], kind=ADAPTERS["loha"], rank=2)
    with pytest.raises(ConfigError, match="adapter.init_balance: the factors of a LoHa are not unique"):
        start_from(other, file, balance=True)


def test_a_lokr_of_another_factor_does_not_start_a_run(tmp_path):
    model = linear()
    inject(model, ["0"], kind=ADAPTERS["lokr"], rank=1)
    file, other = saved(tmp_path, model), linear()
    inject(other, ["0"], kind=ADAPTERS["lokr"], rank=1, how=How(factor=2))
    with pytest.raises(
        CheckpointError, match=r"has lokr_w1 of shape \[4, 3\], this run's is \[2, 2\]: set adapter.rank and"
    ):
        start_from(other, file)


# --- of single layers ---------------------------------------------------------------------------------------


def test_ranks_and_alphas_by_pattern(tmp_path):
    """The first pattern wins; files keep each layer's own."""
    a = AdapterConfig(rank=4, alpha=2.0, ranks={r"0": 2, r".*": 3}, alphas={r"1": 12.0})
    own = ranks_of(a, ["0", "1"])
    assert own == {"0": (2, 2.0), "1": (3, 12.0)}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN))
    inject(model, ["0", "1"], rank=a.rank, alpha=a.alpha, own=own)
    found = [(layer.rank, layer.alpha, len(layer.lora_down.weight)) for layer in adapted_layers(model)]
    assert found == [(2, 2.0, 2), (3, 12.0, 3)]
    for layer in adapted_layers(model):
        layer.lora_up.weight.data.normal_()
    save_lora(
        tmp_path / "a.safetensors", whole_rows(model, tensors_of(model)), rank=4, alpha=2.0, metadata={}
    )
    file = read_lora(tmp_path / "a.safetensors", {"0": (OUT, IN), "1": (IN, OUT)})
    assert [(pair.rank, pair.scale) for pair in file.pairs.values()] == [(2, 1.0), (3, 4.0)]
    with pytest.raises(
        ConfigError, match="adapter.ranks: 'x.*' matches nothing that is trained; an example of a name: 0"
    ):
        ranks_of(AdapterConfig(ranks={"x.*": 3}), ["0", "1"])
    with pytest.raises(ConfigError, match="adapter.alphas: no regular expression"):
        ranks_of(AdapterConfig(alphas={"(": 3}), ["0", "1"])


def test_rank_stable_scales_by_the_root_and_the_file_says_it_in_its_alpha(tmp_path):
    assert ranks_of(AdapterConfig(rank=16, alpha=8.0, rank_stable=True), ["0"]) == {"0": (16, 32.0)}
    model = linear()
    inject(model, ["0"], rank=4, own=ranks_of(AdapterConfig(rank=4, alpha=1.0, rank_stable=True), ["0"]))
    model[0].lora_up.weight.data.normal_()
    assert isinstance(model[0], LoraLinear)
    pair = saved(tmp_path, model).pairs["0"]
    assert pair.alpha == 2.0 and pair.scale == 0.5  # 1 / sqrt(4)
    x = torch.randn(5, IN)
    want = linear()(x) + 0.5 * x @ (model[0].lora_up.weight @ model[0].lora_down.weight).T
    torch.testing.assert_close(model(x), want)


def test_the_weights_of_a_full_fine_tune_by_pattern():
    names = ["img_in.weight", "blocks.0.a.weight", "blocks.0.a.bias", "blocks.1.a.weight"]
    assert trained(names, train=(), freeze=()) == names
    assert trained(names, train=(r"blocks\..*",), freeze=(r".*\.bias",)) == [names[1], names[3]]
    assert trained(names, train=(), freeze=(r"blocks\.0\..*",)) == [names[0], names[3]]
    with pytest.raises(ConfigError, match="adapter.freeze: 'img' matches nothing"):
        trained(names, train=(), freeze=("img",))
    with pytest.raises(ConfigError, match="leave nothing to train"):
        trained(names, train=(), freeze=(".*",))
