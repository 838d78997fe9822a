"""Muon in the weights' own precision."""

import torch
from torch import nn

from hvtrain.train.muon import MOMENT, Muon, orthogonalise


def stepped(make, shape, n=5):
    draw = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = make([weight])
    for _ in range(n):
        weight.grad = torch.randn(shape, generator=draw)
        optimizer.step()
    return weight.detach()


def test_singular_values_go_to_one():
    for shape in ((6, 40), (40, 6)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = orthogonalise(matrix)
        assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.35
        assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_like_adam_it_steps_as_torchs_does():
    """But for bfloat16; the mean square of a step is AdamW's."""
    for shape in ((16, 48), (48, 16)):
        ours = stepped(lambda p: Muon(p, 0.01, like_adam=True), shape)
        theirs = stepped(
            lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), shape
        )
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        one = stepped(lambda p: Muon(p, 0.01, like_adam=True), shape, n=1)
        assert 0.7 * 0.002 < one.square().mean().sqrt() < 1.2 * 0.002


def test_a_kernel_is_a_matrix_and_a_tall_one_steps_further():
    kernel = stepped(lambda p: Muon(p, 0.01), (8, 2, 1, 2, 2))
    assert torch.allclose(kernel.view(8, 8), stepped(lambda p: Muon(p, 0.01), (8, 8)), atol=1e-6)
    wide, tall = (stepped(lambda p: Muon(p, 0.01), s, n=1) for s in ((4, 16), (16, 4)))
    assert 1.5 < tall.norm() / wide.norm() < 2.5, "twice, by the root of its sides' ratio"


def test_what_gets_no_gradient_stays():
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([weight], 1.0)
    optimizer.step()
    weight.grad = torch.zeros(3, 3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3, 3)) and not optimizer.state[weight][MOMENT].any()
