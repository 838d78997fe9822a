"""The next architecture is one folder: a copy of the strange one under another name, with
other sizes, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvtrain.models import find
from hvtrain.parallel.context import ParallelContext
from tests.parallel.any_model import gradients, of_layouts
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny_run import Case, relative_errors
from tests.strange import FOUND, discovered

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "dim=48, num_heads=4, ffn_dim=80, num_layers=2, words_dim=24, letters_dim=16":
        "dim=96, num_heads=8, ffn_dim=64, num_layers=1, words_dim=8, letters_dim=12",
    "num_layers=3, sight_dim=20": "num_layers=2, sight_dim=16",
    "frames=9, height=32, width=96": "frames=5, height=64, width=64",
}  # fmt: skip


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "hvtrain" / "models" / "odd"
    shutil.copytree(
        FOUND / "hvtrain" / "models" / "strange", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in folder.iterdir():
        text = path.read_text()
        for old, new in {
            **(SIZES if path.name == "arch.py" else {}), "strange": "odd", "Strange": "Odd"
        }.items():
            assert old in text or old.lower() == "strange", f"{path.name} has no '{old}'"
            text = text.replace(old, new)
        path.write_text(text)
    return tmp_path


def test_a_copy_keeps_every_promise(odd: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(odd)}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_model_contract.py", "-k",
        "odd"
    ]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed" in ended.stdout and int(
        ended.stdout.split(" passed")[0].split()[-1]
    ) >= 25, ended.stdout[-500:]


def test_a_copy_is_split_over_ranks(odd: Path) -> None:
    case = Case(ulysses=2, stage=3)
    with discovered(odd):
        spec = find("odd")
        results = run_ranks(2, of_layouts, [("odd", "further")], [case])[0]
        want = gradients(spec, spec.flavor("further"), Case(engine="torch", stage=0), ParallelContext())
        errors = relative_errors(results["odd-further", case], want)
    assert errors and max(errors.values()) < 1e-4
