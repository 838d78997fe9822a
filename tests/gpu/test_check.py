"""The checks that wait for a GPU, at tiny size on the CPU: what they compute is right, and
how they are run and reported."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hvtrain.models.kernels import KERNELS
from hvtrain.models.sparse import WAYS
from tests.gpu import check, checks
from tests.gpu.report import Check, Row, Setup, carry_out, read, setup

CPU = setup(torch.device("cpu"))


def test_all_of_them_are_listed(capsys) -> None:
    assert check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(checks.CHECKS) and len(lines) == 12
    assert sum(c.seconds for c in checks.CHECKS.values()) <= 9 * 60 + 10


@pytest.mark.parametrize(
    "name", ["versions", "kernels", "attention", "savers", "float8", "engines", "groups", "ranks", "sparse"]
)
def test_a_check_passes_here(name: str, tmp_path: Path) -> None:
    rows = carry_out(checks.CHECKS[name], CPU, tmp_path / "rows.json")
    assert rows and all(row.passed for row in rows), [r for r in rows if not r.passed]
    assert read(tmp_path / "rows.json") == rows
    if name == "attention":
        assert {r.what for r in rows} == {"sdpa forward, 200", "sdpa backward, 200"}
        assert all(r.ms and r.tflops and r.mfu and r.error is not None and r.error < 1e-4 for r in rows)


def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch) -> None:
    sdpa = KERNELS["sdpa"]

    def wrong(dout, q, k, v, merged):  # forgets that the result was merged
        return sdpa.backward(dout, q, k, v, sdpa.partial(q, k, v))

    monkeypatch.setitem(KERNELS, "sdpa", replace(sdpa, backward=wrong))
    rows = {row.what: row for row in carry_out(checks.CHECKS["kernels"], CPU, tmp_path / "rows.json")}
    assert rows["sdpa, lengths"].passed
    assert [rows[f"sdpa, keys in {n} parts"].passed for n in (2, 4, 5)] == [False] * 3


def test_a_wrong_way_of_sparse_attention_fails(tmp_path: Path, monkeypatch) -> None:
    gather = WAYS["gather"]

    def all_pairs(one, grid, q, k, v):
        return one.dense.partial(q, k, v)

    monkeypatch.setitem(WAYS, "gather", replace(gather, partial=all_pairs))
    rows = {row.what: row for row in carry_out(checks.CHECKS["sparse"], CPU, tmp_path / "rows.json")}
    assert [rows[f"{name} by gather, values"].passed for name in ("tiles", "radial")] == [False, False]


def test_float8_products_where_a_device_has_them(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum=False):
        asked.append(use_fast_accum)
        return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(checks, "has_matmul", lambda device: True)
    rows = carry_out(checks.CHECKS["float8"], CPU, tmp_path / "rows.json")
    assert len(rows) == 3 * 2 * 4 and all(row.passed for row in rows) and set(asked) == {False, True}
    assert all(row.error for row in rows if "float8" in row.what and "alone" not in row.what)


def _good(here: Setup) -> Iterator[Row]:
    yield Row("one", ms=1.0, peak_gib=10.0, fit_gib=9.5)
    yield Row("two", error=1e-3)


def _breaks(here: Setup) -> Iterator[Row]:
    yield Row("before")
    raise RuntimeError("CUDA error: an illegal memory access\nand more")


def test_what_breaks_keeps_what_it_had(tmp_path: Path) -> None:
    rows = carry_out(Check("bad", "", 1, _breaks), CPU, tmp_path / "rows.json")
    assert [r.what for r in rows] == ["before", "broke off"] and not rows[1].passed
    assert (
        rows[1].note == "RuntimeError: CUDA error: an illegal memory access"
        and read(tmp_path / "rows.json") == rows
    )


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Three checks, whose child processes are this one."""
    three = [Check("good", "", 1, _good), Check("bad", "", 1, _breaks), Check("last", "", 1, _good)]
    begun: list[str] = []

    def child(command, stdout, stderr, timeout):
        name, out = command[command.index("--one") + 1], Path(command[command.index("--out") + 1])
        begun.append(name)
        if name == "hangs":
            time.sleep(timeout)
            raise check.subprocess.TimeoutExpired(command, timeout)
        code = 0 if name == "dies" else check.main(["--one", name, "--out", str(out), "--device", "cpu"])
        return check.subprocess.CompletedProcess(command, -11 if name == "dies" else code)

    monkeypatch.setattr(check, "CHECKS", {c.name: c for c in three})
    monkeypatch.setattr(check.subprocess, "run", child)
    return begun


def test_each_is_run_whatever_the_others_do(made, tmp_path: Path, capsys) -> None:
    assert check.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert made == ["good", "bad", "last"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        [len(rows) for rows in report["checks"].values()] == [2, 2, 2]
        and report["device"] == "CPU, tiny sizes"
    )
    text = (tmp_path / "report.txt").read_text()
    assert "9.5 (-5%)" in text and "FAIL" in text and "1.0e-03" in text and text in capsys.readouterr().out
    assert check.main(["--out", str(tmp_path), "--device", "cpu", "--only", "last", "good"]) == 0
    assert made[3:] == ["good", "last"]  # in their order


def test_a_crash_is_a_failure_and_the_limit_is_not(made, tmp_path: Path, monkeypatch) -> None:
    names = ("good", "dies", "hangs", "last")
    monkeypatch.setattr(check, "CHECKS", {n: Check(n, "", 1, _good) for n in names})
    begun = time.monotonic()
    assert check.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.06"]) == 1
    assert time.monotonic() - begun < 8 and made == ["good", "dies", "hangs"]
    rows = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert [rows[n][-1]["note"] for n in names[1:]] == [
        "its process ended with code -11: see dies.log", "ended here: the time is over",
        "not run: the time is over"
    ]
    assert [rows[n][-1]["passed"] for n in names[1:]] == [False, True, True]


@pytest.mark.slow
def test_the_whole_runs_on_the_cpu(tmp_path: Path) -> None:
    assert check.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "9"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert list(rows) == list(checks.CHECKS) and all(rows.values())
