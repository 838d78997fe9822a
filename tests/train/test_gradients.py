"""Norms of a model's parts."""

from __future__ import annotations

import torch

from hvtrain.train.gradients import norms_of_parts, parts_of


def test_parts_are_quarters_of_the_depth():
    names = [f"blocks.{i}.w" for i in range(10)] + [
        "net.single.0.w", "net.single.1.b", "head.w", "blocks.9.b", "blocks.0.b"
    ]
    assert parts_of(names) == {
        "blocks.0-2": ("blocks.0.w", "blocks.1.w", "blocks.2.w", "blocks.0.b"),
        "blocks.3-5": ("blocks.3.w", "blocks.4.w", "blocks.5.w"),
        "blocks.6-8": ("blocks.6.w", "blocks.7.w", "blocks.8.w"), "blocks.9-9": ("blocks.9.w", "blocks.9.b"),
        "net.single.0-0": ("net.single.0.w",), "net.single.1-1": ("net.single.1.b",), "rest": ("head.w",),
    }
    norms = {"a": torch.tensor(3.0), "b": torch.tensor(2.0, dtype=torch.bfloat16), "c": torch.tensor(4.0)}
    assert norms_of_parts(
        norms, {"x": ("a", "c"), "y": ("b",), "z": ("gone",)}
    ) == {"x": 5.0, "y": 2.0, "z": 0.0}
    assert norms_of_parts({}, {"x": ("a",)}, total=lambda sums: sums.add_(9.0)) == {"x": 3.0}


def test_norms_of_any_width_are_added_up_in_float32_on_the_device(monkeypatch):
    asked = []
    for name in ("zeros", "tensor"):
        made = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, made=made, **k: asked.append(k.get("device")) or made(*a, **k)
        )
    for dtype in (torch.bfloat16, torch.float64):
        norms = {name: torch.full((), value, dtype=dtype) for name, value in (("a", 3.0), ("b", 4.0))}
        asked.clear()
        assert norms_of_parts(norms, {"x": ("a", "b")}, device=torch.device("cpu")) == {"x": 5.0}
        assert asked == [torch.device("cpu")] * 2
