"""The rules of conftest.py that a machine without a GPU would not notice."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tests import conftest


class Asked:
    def __init__(self, expression: str) -> None:
        self.expression, self.option = expression, SimpleNamespace()

    def getoption(self, name: str) -> str:
        assert name == "markexpr"
        return self.expression


@pytest.mark.parametrize(
    ("expression", "devices"),
    [
        ("", ""), ("not gpu", ""), ("slow", ""), ("slow and not gpu", ""), ("gpu", "0,1"),
        ("gpu or slow", "0,1")
    ],
)
def test_gpus_are_hidden_unless_they_are_asked_for(
    expression: str, devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    conftest.pytest_configure(Asked(expression))  # type: ignore[arg-type]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices
