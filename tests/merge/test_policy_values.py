"""What each merge policy makes of two and three small pairs, number by number, and what overlap says."""

from pathlib import Path

import pytest
import torch

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.files import LoraFile
from hvtrain.lorafiles.overlap import Contribution, Overlap, by_layer, labels, overlaps
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.merge.policies import POLICIES, Dense, Options, combine
from hvtrain.rng import generator


def rank_one(column, row, *, alpha=1.0, multiplier=1.0, name="a"):
    """A contribution of alpha * multiplier * column x row."""
    pair = LoraPair(
        torch.tensor([row], dtype=torch.float32), torch.tensor(column, dtype=torch.float32)[:, None], alpha
    )
    return Contribution(name, pair, multiplier)


def value(result):
    return result.delta() if isinstance(result, Dense) else sum(c.delta() for c in result)


def apply(policy, found, **options):
    return POLICIES[policy](found, "layer", Options(**options))


def exact(result, wanted):
    assert torch.equal(value(result), torch.tensor(wanted, dtype=torch.float32)), value(result)


def test_a_contribution():
    c = rank_one([1, 0, 2], [3, 4], alpha=2.0, multiplier=0.5)
    assert c.rows.tolist() == [True, False, True]
    assert c.delta().tolist() == [[3, 4], [0, 0], [6, 8]]
    silent = rank_one([1, 1], [0, 0])
    assert silent.rows.tolist() == [False, False] and silent.rows.dtype == torch.bool


def test_rows_that_two_change():
    a, b, c = (
        rank_one([1, 1, 0, 0], [1], name="a"), rank_one([0, 1, 1, 0], [1], name="b"),
        rank_one([1, 0, 1, 0], [1], name="c")
    )
    assert list(overlaps({"x": [a, b], "y": [a], "z": [b, c]})) == [
        Overlap("x", "a", "b", 1), Overlap("z", "b", "c", 1)
    ]
    assert list(overlaps({"x": [a, b, c]})) == [
        Overlap("x", "a", "b", 1), Overlap("x", "a", "c", 1), Overlap("x", "b", "c", 1)
    ]
    assert list(overlaps({"x": [rank_one([1, 0], [1]), rank_one([0, 1], [1])]})) == []


def test_error_refuses_in_full_words():
    a, b = rank_one([1, 1], [1], name="a.safetensors"), rank_one([0, 1], [1], name="b.safetensors")
    with pytest.raises(CheckpointError) as refused:
        apply("error", [a, b])
    assert str(refused.value) == (
        "a.safetensors and b.safetensors both change 1 rows of 'layer': added up, neither is what it was "
        "trained to be. Train them as slices of one plan, or say how to reconcile them: --on-overlap sum, "
        "average, priority, orthogonal, ties, dare"
    )
    apart = [rank_one([1, 0], [1]), rank_one([0, 1], [1])]
    assert apply("error", apart) == apart


def test_sum():
    exact(
        apply("sum", [rank_one([1, 2], [1, 1]), rank_one([0, 3], [2, 0], multiplier=-1)]), [[1, 1], [-4, 2]]
    )


def test_average_counts_who_changes_a_row():
    a, b, c = (
        rank_one([2, 2, 0], [1, 0]), rank_one([4, 0, 0], [0, 1]), rank_one([6, 6, 0], [1, 1], multiplier=0.5)
    )
    wanted = torch.tensor([[(2 + 3) / 3, (4 + 3) / 3], [(2 + 3) / 2, 3 / 2], [0, 0]])
    torch.testing.assert_close(value(apply("average", [a, b, c])), wanted, rtol=1e-6, atol=0)
    made = apply("average", [a, b, c])
    assert [(m.lora, m.multiplier) for m in made] == [("a", 1.0), ("a", 1.0), ("a", 0.5)]
    half = Contribution("h", LoraPair(torch.ones(1, 2).half(), torch.full((2, 1), 3.0).half(), 1.0), 1.0)
    assert apply("average", [half, half, half])[0].pair.up.dtype == torch.float32


def test_priority_first_keeps_its_rows():
    a, b, c = rank_one([1, 0, 0], [1]), rank_one([10, 10, 0], [1]), rank_one([100, 100, 100], [1])
    exact(apply("priority", [a, b, c]), [[1], [10], [100]])
    exact(apply("priority", [c, b, a]), [[100], [100], [100]])


def test_orthogonal_takes_away_what_earlier_ones_read():
    a, b, c = rank_one([1, 0], [1, 0, 0]), rank_one([1, 1], [2, 3, 0]), rank_one([0, 1], [5, 7, 11])
    made = apply("orthogonal", [a, b, c])
    wanted = [[[1, 0, 0], [0, 0, 0]], [[0, 3, 0], [0, 3, 0]], [[0, 0, 0], [0, 0, 11]]]
    for m, w in zip(made, wanted, strict=True):
        torch.testing.assert_close(m.delta(), torch.tensor(w, dtype=torch.float32), atol=1e-5, rtol=0)
        assert m.pair.down.dtype == torch.float32
    # What a later one reads is what it was trained with, not what was left of it.
    d = rank_one([1, 0], [2, 3, 0])
    again = apply("orthogonal", [a, b, d])[2]
    assert again.delta().abs().max() < 1e-5


def test_ties_number_by_number():
    """Four elements each, half kept: trim, elect the sign, average those that agree."""
    a, b = rank_one([1, 2], [4, -1]), rank_one([3, 1], [-2, 1])
    # a = [[4, -1], [8, -2]] keeps 4 and 8; b = [[-6, 3], [-2, 1]] keeps -6 and 3
    exact(apply("ties", [a, b], density=0.5), [[-6, 3], [8, 0]])
    # all kept: sums -2, 2, 6, -1
    exact(apply("ties", [a, b], density=1.0), [[-6, 3], [8, -2]])
    c = rank_one([1, 1], [1, 1])
    # agreeing ones are averaged
    exact(apply("ties", [c, rank_one([1, 1], [3, 3])], density=1.0), [[2, 2], [2, 2]])
    # 0.2 of 10 elements unless given: the two largest of each
    long = [rank_one([1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), rank_one([1], [20, 9, 8, 7, 6, 5, 4, 3, 2, 1])]
    exact(apply("ties", long), [[20, 9, 0, 0, 0, 0, 0, 0, 9, 10]])
    exact(apply("ties", long, density=0.001), [[20, 0, 0, 0, 0, 0, 0, 0, 0, 10]])  # never fewer than one
    exact(
        apply("ties", [rank_one([1], [4, 3, 2, 1]), rank_one([1], [0, 0, 0, 0])], density=0.75),
        [[4, 3, 2, 0]]
    )


def test_dare_number_by_number():
    """Each element stays by its own draw: of the seed, the LoRA's number and the layer."""
    a, b = rank_one([1] * 40, [1] * 50, multiplier=0.5), rank_one([3] * 40, [1] * 50)
    masks = [torch.rand(40, 50, generator=generator(7, stream=f"dare/{i}/layer")) < 0.25 for i in (0, 1)]
    assert not torch.equal(*masks)  # two LoRAs never drop the same elements
    made = value(apply("dare", [a, b], density=0.25, seed=7))
    assert torch.equal(made, masks[0] * (0.5 / 0.25) + masks[1] * (3 / 0.25))
    only = [rank_one([1] * 40, [1] * 50), rank_one([1] * 40, [1] * 50, multiplier=0.0)]
    first = value(apply("dare", only, density=0.25, seed=7)) != 0
    second = value(apply("dare", only[::-1], density=0.25, seed=7)) != 0
    assert torch.equal(first, masks[0]) and torch.equal(second, masks[1])
    half = value(apply("dare", [a, b]))  # 0.5 and seed 0 unless given
    masks = [torch.rand(40, 50, generator=generator(0, stream=f"dare/{i}/layer")) < 0.5 for i in (0, 1)]
    assert torch.equal(half, masks[0] * 1.0 + masks[1] * 6.0)
    other = value(POLICIES["dare"]([a, b], "another layer", Options()))
    assert not torch.equal(half, other)


def lora(path, **pairs):
    return LoraFile(Path(path), {name: c.pair for name, c in pairs.items()})


def test_layers_and_labels():
    a, b = rank_one([1, 1], [1]), rank_one([0, 1], [1])
    given = [
        (lora("/r/x/l.safetensors", p=a), 2.0), (lora("/r/y/l.safetensors", p=b, q=a), 3.0),
        (lora("/off", p=a), 0.0)
    ]
    assert {m: [(c.lora, c.multiplier) for c in found] for m, found in by_layer(given).items()} == {
        "p": [("x/l.safetensors", 2.0), ("y/l.safetensors", 3.0)], "q": [("y/l.safetensors", 3.0)],
    }  # fmt: skip
    assert labels(given) == ["x/l.safetensors", "y/l.safetensors", "off"]
    assert labels(given[:1]) == ["l.safetensors"]
    assert labels(given[:2]) == ["x/l.safetensors", "y/l.safetensors"]
    assert labels([given[0], given[0]]) == ["l.safetensors (1)", "l.safetensors (2)"]
    assert labels([]) == []


def test_a_policy_meets_only_layers_whose_rows_are_shared():
    a, b, c = rank_one([1, 0], [1]), rank_one([0, 1], [1]), rank_one([1, 1], [1])
    layers = {"apart": [a, b], "shared": [a, c], "alone": [c]}
    made = combine(layers, "ties", Options(density=1.0))
    assert list(made) == ["apart", "shared", "alone"]
    assert made["apart"] == [a, b] and made["alone"] == [c] and isinstance(made["shared"], Dense)
    exact(made["shared"], [[1], [1]])
    assert made["apart"] is not layers["apart"]  # lists of its own
    with pytest.raises(CheckpointError, match="both change 1 rows of 'shared'"):
        combine(layers, "error", Options())
    for policy in ("sum", "error", "average", "priority", "orthogonal"):
        with pytest.raises(ConfigError) as refused:
            combine({}, policy, Options(density=0.5))
        assert str(refused.value) == f"--density is for --on-overlap ties and dare, not for {policy}"
    assert combine({}, "dare", Options(density=0.5)) == {} == combine({}, "ties", Options(density=0.5))
