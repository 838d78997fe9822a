"""A step that is only traced leaves nothing behind in the process."""

from types import MappingProxyType

from hvtrain.config import TrainConfig, load
from hvtrain.fit.estimate import Training, candidate, of_training
from hvtrain.fit.trace import Shape
from hvtrain.models import kernels
from hvtrain.parallel.hostcopy import HostCopies


def total(recompute: str) -> int:
    cfg = load(TrainConfig, None, ["model.flavor=tiny", f"run.recompute={recompute}", "zero.engine=torch"])
    sections = Training(cfg.model, cfg.adapter, cfg.parallel, cfg.zero, cfg.run)
    return of_training(sections, candidate(cfg.model), Shape(1, 17, 256, 256), 1).budget.total


def test_no_table_and_no_method_is_changed_meanwhile(monkeypatch):
    """What offload keeps in host memory is still left out of the device's."""
    monkeypatch.setattr(kernels, "KERNELS", MappingProxyType(dict(kernels.KERNELS)))
    monkeypatch.setattr(HostCopies, "__setattr__", refuse_methods)
    assert total("offload") < total("full") < total("none")


def refuse_methods(self, name, value):
    assert name != "on_host", "a method is replaced"
    object.__setattr__(self, name, value)
