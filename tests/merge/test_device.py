"""Where a merge computes when nobody says it: what runs the model as training does, on a GPU if
there is one; sums on the CPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hvtrain.merge import run as merge
from hvtrain.parallel.context import ParallelContext
from tests.merge.test_reconcile import config, place  # noqa: F401 - a fixture


class Started(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """The devices that processes were started on; None: whatever there is."""
    found = []

    def start(ulysses, ring, *, device):
        found.append(device)
        return ParallelContext(device=torch.device(device or "meta"))  # the GPU of this test

    monkeypatch.setattr(merge, "start", start)
    return found


@pytest.mark.parametrize(("device", "started", "sums"), [("auto", None, "meta"), ("cpu", "cpu", "cpu")])
def test_a_reconciling_merge_takes_the_gpu(place, tmp_path, monkeypatch, asked, device, started, sums):  # noqa: F811
    seen = []

    def reconcile(c, inputs, report, found, ctx, wanted):
        seen.append((ctx.device.type, "device='meta'" in wanted.about))
        report.summed = report.fidelity = {}
        return SimpleNamespace(changes={}, journal=SimpleNamespace(remove=lambda: None))

    monkeypatch.setattr("hvtrain.merge.reconcile.reconcile", reconcile)
    monkeypatch.setattr(merge, "_write", lambda cfg, *rest: seen.append(cfg.device))
    for how in ("fit", "auto"):  # asked for, and chosen because rows are shared
        merge.run(replace(config(place, tmp_path / f"{how}.safetensors", 1, 2, how=how), device=device))
    assert asked == [started] * 2 and seen == [(sums, device == "auto"), sums] * 2


def test_a_plain_merge_stays_on_the_cpu(place, tmp_path, monkeypatch, asked):  # noqa: F811
    seen = []
    monkeypatch.setattr(merge, "_write", lambda cfg, *rest: seen.append(cfg.device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cpu", "cuda"):
        cfg = config(place, tmp_path / "m.safetensors", 1, how="none")
        merge.run(replace(cfg, device=device))
    assert seen == ["cpu", "cpu", "cuda"] and not asked
