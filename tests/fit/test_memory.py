"""The predicted peak against what training really allocated."""

import pytest

from tests.fit.measure import Setting, allocated_bytes, each, live_bytes, predicted
from tests.parallel.ranks import run_ranks

ONE = [
    Setting(),
    Setting(recompute="full"),
    Setting(recompute="selective"),
    Setting(lora=False, recompute="full"),
]
TWO = [
    Setting(engine="deepspeed", stage=2, recompute="full", ulysses=2, world=2),
    Setting(engine="deepspeed", stage=1, ring=2, world=2),
    Setting(engine="deepspeed", stage=2, lora=False, recompute="selective", world=2),
    Setting(engine="deepspeed", stage=3, lora=False, recompute="full", world=2),
]


@pytest.mark.parametrize(
    "world, measure, settings", [(1, allocated_bytes, ONE), (2, live_bytes, TWO)], ids=["one", "two"]
)
def test_the_prediction_is_within_a_tenth(world, measure, settings):
    ranks = run_ranks(world, each, measure, settings)
    for i, setting in enumerate(settings):
        peak, total = max(rank[i] for rank in ranks), predicted(setting).total
        said = f"{setting}: predicted {total / 2**20:.1f} MiB, measured {peak / 2**20:.1f}"
        assert total == pytest.approx(peak, rel=0.10), said
