"""A text that is there in one rank's samples and not in the other's: nothing waits, and
gradients are those of one process."""

from __future__ import annotations

import pytest
import torch

from hvtrain.models import find
from hvtrain.models.dit import ModelInput
from hvtrain.models.spec import Flavor, ModelSpec
from hvtrain.parallel.context import ParallelContext
from tests.models.any_model import batch, random_model
from tests.parallel.any_model import gradients, of_layouts
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import Case, relative_errors
from tests.strange import discovered
from tests.strange.files import NAME

SIGMA = torch.tensor([0.3, 0.9])


def quoting_at_first(spec: ModelSpec, flavor: Flavor, *, seed: int) -> ModelInput:
    """Letters in the first micro-batch, none in any other."""
    x, cond = batch(flavor, seed=seed)
    if seed:
        cond = {**cond, "letters": cond["letters"][:, :0], "letters_len": torch.zeros(2, dtype=torch.long)}
    return spec.make_input(x, SIGMA, cond, task=flavor.tasks[0], guidance=None)


def test_without_letters_their_layers_get_gradients_of_zero() -> None:
    with discovered():
        spec = find(NAME)
        model = random_model(spec, spec.flavor("plain"))
        model(quoting_at_first(spec, spec.flavor("plain"), seed=1)).square().mean().backward()
        theirs = {n: p.grad for n, p in model.named_parameters() if "letters" in n}
    assert len(theirs) == 2 + 2 * 2 and all(g is not None and not g.any() for g in theirs.values())
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n not in theirs)


@pytest.mark.timeout(200)
def test_one_rank_s_samples_have_letters() -> None:
    cases = [
        Case(engine="torch", stage=0), Case(stage=0), Case(stage=2), Case(stage=3, recompute="selective")
    ]
    with discovered():
        spec = find(NAME)
        results = run_ranks(2, of_layouts, [(NAME, "plain")], cases, quoting_at_first, timeout_s=180)[0]
        alone = Case(engine="torch", stage=0)
        want = gradients(spec, spec.flavor("plain"), alone, ParallelContext(), quoting_at_first)
    assert want["blocks.0.letters_kv.weight"].abs().max() > 1e-6
    for case in cases:
        errors = relative_errors(results[f"{NAME}-plain", case], want)
        assert max(errors.values()) < 1e-4, (str(case), max(errors, key=lambda n: errors[n]))
