"""What `auto` is asked to be fast at: one rank's share of the longest clip, in
training and in sampling apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hvtrain.models import find
from hvtrain.models.dit import Grid
from hvtrain.models.kernels import KERNELS
from hvtrain.models.measure import LONG, Workload
from hvtrain.parallel import apply
from hvtrain.parallel.apply import largest_work, parallelize
from hvtrain.parallel.context import ParallelContext
from hvtrain.train.prepare import grids
from tests.adapters.models import build

SPEC, CPU = find("hunyuan-video"), torch.device("cpu")


@pytest.mark.parametrize(
    "ulysses, ring, wanted",
    [(1, 1, (1001, 24)), (8, 1, (1001, 3)), (1, 4, (251, 24)), (2, 2, (501, 12)), (24, 1, (1001, 1))]
)
def test_a_rank_s_share_of_the_longest(ulysses, ring, wanted):
    ctx = ParallelContext(device=CPU, world=ulysses * ring, ulysses=ulysses, ring=ring)
    assert largest_work(SPEC.flavors["t2v"], [7, 1001, 1000], ctx) == Workload(*wanted, 128, learns=True)


def test_of_nothing_known_it_is_what_stands_for_all():
    assert largest_work(SPEC.flavors["tiny"], [], ParallelContext(device=CPU)) == Workload(
        LONG.tokens, 4, 40, learns=True
    )


@pytest.mark.parametrize("training", [True, False])
def test_it_comes_to_who_chooses(training, monkeypatch):
    asked = {}

    def pick(name, **given):
        asked.update(given, name=name)
        return KERNELS["sdpa"]

    monkeypatch.setattr(apply, "pick_kernel", pick)
    parallelize(build(), ParallelContext(device=CPU), training=training, work=Workload(5, 6, 7, learns=True))
    assert asked["name"] == "auto" and asked["work"] == Workload(5, 6, 7, learns=training)
    parallelize(build(), ParallelContext(device=CPU), training=training)
    assert asked["work"] == LONG._replace(learns=training)


def test_sizes_are_those_of_the_shards_buckets():
    base = SimpleNamespace(flavor=SPEC.flavors["tiny"])
    sets = [
        SimpleNamespace(groups=lambda: {"9x64x96": 0, "1x64x64": 0}),
        SimpleNamespace(groups=lambda: {"9x64x96": 0})
    ]
    assert sorted(grids(base, sets)) == [Grid(1, 4, 4), Grid(3, 4, 6)]
