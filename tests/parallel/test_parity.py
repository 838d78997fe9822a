"""The product's promise: whatever the layout and the engine, training computes what one process computes.

Per layout and engine, full fine-tune and LoRA (with dropout): the losses of 30 steps, and every
parameter's gradient by itself, to 1e-4 in float32. Sizes and text lengths change from step to
step and no layout divides them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import (
    SIZES,
    Case,
    alone,
    build_model,
    gradients,
    loss_curve,
    make_batch,
    place,
    relative_errors,
)

TOLERANCE = 1e-4
DP, U2, R2 = {}, {"ulysses": 2}, {"ring": 2}
TWO_RANKS = [
    Case(**DP, stage=0),
    Case(**DP, stage=1),
    Case(**DP, stage=2, recompute="full"),
    Case(**DP, stage=3),
    Case(**DP, stage=2, offload="cpu"),
    Case(**U2, stage=2),
    Case(**R2, stage=2, recompute="full"),
]
FOUR_RANKS = [Case(**U2, stage=2)]  # DP 2 x Ulysses 2
ENGINES = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 2, "offload": "cpu"}]
# Every layout under every engine; recompute in some of them.
TWO_RANKS_GRADIENTS = [
    Case(engine="torch", stage=0),
    Case(**DP, stage=3, offload="cpu"),
    *(Case(**layout, **engine) for layout in (U2, R2) for engine in ENGINES),
    Case(**U2, stage=3, recompute="full"),
    Case(**R2, stage=2, recompute="selective"),
    Case(**U2, engine="torch", stage=0, recompute="selective"),
]
FOUR_RANKS_GRADIENTS = [
    *(
        Case(**layout, **engine)
        # on 4 ranks U2 and R2 are DP 2 x each
        for layout in (U2, R2, {"ulysses": 4}, {"ring": 4}, {"ulysses": 2, "ring": 2})
        for engine in ENGINES
    ),
    Case(ulysses=2, ring=2, stage=2, recompute="selective"),
]


def both(cases: list[Case]) -> list[Case]:
    return [replace(case, lora=lora) for case in cases for lora in (False, True)]


def _losses_and_gradients(curves: list[Case], gradients_only: list[Case]) -> dict[
    Case, tuple[list[float], dict]
]:
    results = {}
    for case in [*curves, *gradients_only]:
        ctx = place(case.ulysses, case.ring)
        curve = loss_curve(case, ctx) if case in curves else []
        results[case] = curve, gradients(case, ctx)
    return results


@pytest.fixture(scope="module")
def reference() -> dict[Case, tuple[list[float], dict[str, Tensor]]]:
    one = ParallelContext()
    return {
        case: (loss_curve(case, one), gradients(case, one)) for case in (alone(c) for c in both([Case()]))
    }


@pytest.mark.parametrize(
    "world, curves, gradients_only",
    [(2, both(TWO_RANKS), both(TWO_RANKS_GRADIENTS)), (4, both(FOUR_RANKS), both(FOUR_RANKS_GRADIENTS))],
    ids=["2 ranks", "4 ranks"],
)
def test_layouts_and_engines_equal_one_process(
    world: int, curves: list[Case], gradients_only: list[Case], reference: dict
) -> None:
    results = run_ranks(world, _losses_and_gradients, curves, gradients_only)[0]
    assert len(results) == len({*curves, *gradients_only})
    wrong = []
    for case, (losses, grads) in results.items():
        want_losses, want_grads = reference[alone(case)]
        assert len(losses) == (30 if case in curves else 0)
        off = max((abs(a - b) / b for a, b in zip(losses, want_losses, strict=False)), default=0.0)
        if not off < TOLERANCE:
            wrong.append(f"{case}: losses differ by {off:.1e}")
        wrong += [
            f"{case}: gradient of {name} differs by {error:.1e}"
            for name, error in relative_errors(grads, want_grads).items()
            if not error < TOLERANCE
        ]
    assert not wrong, "\n".join(wrong[:20])


def test_the_reference_would_notice(reference: dict) -> None:
    """Losses move, and no gradient is so small that an error in it would hide in rounding."""
    for losses, grads in reference.values():
        assert max(losses) / min(losses) > 1.2
        assert all(g.abs().max() > 1e-6 for g in grads.values()), (
            "a gradient vanishes: the comparison is blind to it"
        )


def _velocities(layouts: list[tuple[int, int]]) -> list[list[Tensor]]:
    outputs = []
    for ulysses, ring in layouts:
        model, _ = build_model(Case())
        parallelize(model.eval(), place(ulysses, ring), training=False)
        with torch.no_grad():
            outputs.append([model(make_batch(step, 0)[0]) for step in range(len(SIZES))])
    return outputs


@pytest.mark.parametrize("world", [2, 4])
def test_the_forward_is_that_of_one_process_on_every_rank(world: int) -> None:
    """Also at 8 image tokens on 4 ranks, and at 45 and 77, which nothing divides."""
    layouts = [(u, world // u) for u in (1, 2, 4) if world % u == 0]
    model, _ = build_model(Case())
    with torch.no_grad():
        want = [model.eval()(make_batch(step, 0)[0]) for step in range(len(SIZES))]
    for per_rank in run_ranks(world, _velocities, layouts):
        assert len(per_rank) == len(layouts)
        for layout, outputs in zip(layouts, per_rank, strict=True):
            for got, ref in zip(outputs, want, strict=True):
                assert (got - ref).abs().max() < 1e-4, f"Ulysses x ring {layout}, {tuple(ref.shape)}"
