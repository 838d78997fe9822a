"""Stand-ins for optional attention packages."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable

import pytest
import torch

from hvtrain.models import kernels
from hvtrain.models.kernels import KERNELS

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
SDPA = KERNELS["sdpa"]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []  # a package
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def attend(q, k, v, **_):
    return SDPA.attend(q, k, v)


def flash2_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax
):  # fmt: skip
    assert (dropout_p, softmax_scale, causal, softcap) == (0.0, q.shape[-1] ** -0.5, False, 0.0)
    return *SDPA.partial(q, k, v), None, None


def flash2_backward(dout, q, k, v, out, lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                    window_size_right, softcap, alibi_slopes, deterministic):  # fmt: skip
    for into, grad in zip((dq, dk, dv), SDPA.backward(dout, q, k, v, kernels.Partial(out, lse))):
        into.copy_(grad)


def install_flash2(
    monkeypatch: pytest.MonkeyPatch, *, attend: Callable = attend, forward: Callable = flash2_forward
) -> None:
    module(monkeypatch, "flash_attn", flash_attn_func=attend)
    inside = {"_flash_attn_forward": forward, "_flash_attn_backward": flash2_backward}
    module(monkeypatch, "flash_attn.flash_attn_interface", **inside)


def flash3_forward(q, k, v, softmax_scale=None):
    return *SDPA.partial(q, k, v), None, None


def flash3_backward(dout, q, k, v, out, lse, dq=None, dk=None, dv=None, softmax_scale=None):
    flash2_backward(dout, q, k, v, out, lse, dq, dk, dv, 0, 0, 0, 0, 0, 0, 0, 0)


def install_flash3(monkeypatch: pytest.MonkeyPatch, **other: Callable) -> None:
    inside = {
        "flash_attn_func": attend, "_flash_attn_forward": flash3_forward,
        "_flash_attn_backward": flash3_backward
    }
    module(monkeypatch, "flash_attn_interface", **{**inside, **other})
