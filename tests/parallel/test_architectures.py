"""The promise of test_parity.py for every architecture that the registry knows, to 1e-4
in every parameter's gradient.

The suite takes each architecture through some of the matrix, so that together they meet every layout, engine
and kind of training; --slow takes each through all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
from torch import Tensor

from hvtrain.models import all_specs
from tests.parallel.any_model import architectures, of_pairs
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import Case

TOLERANCE = 1e-4
ARCHITECTURES = architectures(all_specs())
# on 4 ranks the last is DP 2 x U 2
LAYOUTS = {2: [{"ulysses": 2}, {"ring": 2}], 4: [{"ulysses": 2, "ring": 2}, {"ulysses": 2}]}
STAGES = (0, 1, 2, 3)
Pair = tuple[tuple[str, str], Case]


def matrix(world: int) -> list[Case]:
    return [
        Case(**layout, stage=s, lora=lora) for s, layout,
        lora in product(STAGES, LAYOUTS[world], (False, True))
    ]


def size(name: str, gradients: Mapping[str, Tensor]) -> float:
    """What an error of a gradient is measured by: its own norm. A bias of keys hardly matters to
    a softmax, and its gradient is a small difference of terms as large as its matrix's: a
    hundredth of that is the least."""
    matrix = gradients.get(f"{name.removesuffix('.bias')}.weight", gradients[name])
    return max(gradients[name].norm().item(), 0.01 * matrix.norm().item())


def differing(world: int, pairs: list[Pair]) -> list[str]:
    """What is not as one process of plain PyTorch computes it."""
    found = run_ranks(world, of_pairs, pairs)[0]
    assert len(found) == len(pairs)
    alone = {(which, case.lora): Case(engine="torch", stage=0, lora=case.lora) for which, case in pairs}
    wanted = dict(zip(alone, of_pairs([(which, case) for (which, _), case in alone.items()]), strict=True))
    wrong = []
    for (which, case), got in zip(pairs, found, strict=True):
        want = wanted[which, case.lora]
        # Most gradients are not so small that an error would hide in rounding; of the last text
        # that nobody reads they are 0.
        assert sum(g.abs().max() > 1e-6 for g in want.values()) > 0.75 * len(want), which
        assert got.keys() == want.keys()
        errors = {name: (got[name] - ref).norm() / max(size(name, want), 1e-30) for name, ref in want.items()}
        wrong += [
            f"{'-'.join(which)} {case}: {n} differs by {e:.1e}" for n,
            e in errors.items() if not e < TOLERANCE
        ]
    return wrong


@pytest.mark.parametrize("world", [2, 4])
def test_some_of_the_matrix_for_each_architecture(world: int) -> None:
    """Neighbours take cases that differ in stage, layout and kind of training."""
    cases = matrix(world)
    step = 3  # of no common divisor with the 16 cases
    pairs = [(which, cases[(step * i) % len(cases)]) for i, which in enumerate(ARCHITECTURES)]
    assert len(ARCHITECTURES) >= 8 and {case.stage for _, case in pairs} == set(STAGES)
    assert {(case.ulysses, case.ring, case.lora) for _, case in pairs} == {
        (c.ulysses, c.ring, c.lora) for c in cases
    }
    wrong = differing(world, pairs)
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("which", ARCHITECTURES, ids="-".join)
def test_the_whole_matrix(which: tuple[str, str], world: int) -> None:
    wrong = differing(world, [(which, case) for case in matrix(world)])
    assert not wrong, "\n".join(wrong[:20])
