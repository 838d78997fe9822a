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
from hvtrain.parallel import products
from hvtrain.weights.float8_tokens import plain
from tests.gpu import check, checks, float8
from tests.gpu.report import Check, Row, Setup, carry_out, read, setup
from tests.weights.scaled import ScaledProduct, needs_compiler

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


@pytest.fixture
def eight(monkeypatch) -> ScaledProduct:
    """A device that multiplies float8."""
    product = ScaledProduct()
    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(float8, "has_matmul", lambda device: True)
    monkeypatch.setattr(products, "missing", lambda device, dtype: None)
    return product


@needs_compiler
def test_float8_products_where_a_device_has_them(tmp_path: Path, eight: ScaledProduct) -> None:
    rows = carry_out(checks.CHECKS["float8"], CPU, tmp_path / "rows.json")
    assert all(row.passed for row in rows), [r for r in rows if not r.passed]
    assert len(rows) == 3 * 2 * 11 + 3 and set(eight.fast) == {False, True}
    errors = {r.what: r.error for r in rows if r.error is not None}
    float8_errors = [e for what, e in errors.items() if ", float8" in what]
    assert len(float8_errors) == 3 * 2 * 3 and all(0.01 < e < 0.05 for e in float8_errors)
    assert all(e < 0.01 for what, e in errors.items() if "dequantised" in what or "again" in what)
    assert [r.what for r in rows[-2:]] == ["auto, training", "auto, sampling"]
    assert "64 -> 192: " in rows[-1].note and "320 -> 64: " in rows[-1].note


@needs_compiler
@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("odd", ("M 97, float8, careful sums", "M 97, float8, fast sums", "backward, M 97, float8")),
        ("backward", ("backward, M 96, float8", "backward, M 97, float8")),
        ("rounding", ("M 96, rounding one kernel", "M 97, rounding one kernel")),
        ("again", ("computed again, bit for bit",)),
    ],
)
def test_a_wrong_float8_product_fails(
    part: str, told: tuple[str, ...], tmp_path: Path, eight: ScaledProduct, monkeypatch
) -> None:
    def wrong(a, b, **options):
        out = eight(a, b, **options)
        if part == "odd" and len(a) == 97:
            out[-1] = 0
        if part == "backward" and options.get("bias") is None:
            out *= 1.1
        if part == "again" and len(a) == 257:
            out += len(eight.shapes)
        return out

    monkeypatch.setattr(torch, "_scaled_mm", wrong)
    if part == "rounding":
        monkeypatch.setattr(float8, "fused", lambda x: plain(x * 1.02))
    rows = carry_out(checks.CHECKS["float8"], CPU, tmp_path / "rows.json")
    failed = [row.what for row in rows if not row.passed]
    assert len(failed) == (1 if part == "again" else 3 * len(told))
    assert all(what.endswith(told) for what in failed)


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
