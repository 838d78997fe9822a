"""Nothing in a step makes the CPU wait for the GPU: by reading the code, for no CPU can count it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "hvtrain"
# All that runs between a batch's arrival and the optimizer: models, attention, adapters, what is around them.
FILES = sorted({
    *ROOT.glob("models/*/model.py"), *ROOT.glob("models/*/inputs.py"), *ROOT.glob("adapters/l*.py"),
    # which --show-timesteps draws before a run
    *(set(ROOT.glob("flow/*.py")) - {ROOT / "flow" / "picture.py"}),
    *(
        ROOT / f"models/{name}.py"
        for name in ("attention", "attend_op", "kernels", "layers", "fused", "rope", "dit", "tokens")
    ),
    ROOT / "models" / "later.py",
    *(ROOT / "parallel" / f"{name}.py" for name in ("usp", "collectives", "recompute", "hostcopy", "apply")),
    ROOT / "train" / "objective.py",
})  # fmt: skip
# Each copies to the host, or needs a value that is still being computed.
WAITS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "synchronize", "unique", "masked_select", "is_nonzero",
    "any", "all"
}
# What looks like it, and is of the CPU: lengths, which never leave it; numbers of
# sampling, drawn before a step.
FINE = {
    ("inputs.py", "tolist"),  # of *_len fields and flags, see below
    ("objective.py", "any"),  # of a draw on the CPU: whose caption is dropped
    ("lora.py", "cpu"),  # of what is written to a file
    ("solvers.py", "tolist"),  # of the schedule, which is on the CPU
}


def waits(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS
            and not node.args
        ):
            found.append((node.func.attr, node.lineno, ast.unparse(node.func.value)))
    return [f"{path.name}:{line}: {of}.{name}()" for name, line, of in found if (path.name, name) not in FINE]


def test_there_is_code_to_read() -> None:
    assert len(FILES) >= 20 and all(path.is_file() for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(p.parts[-2:]))
def test_a_step_waits_for_nothing(path: Path) -> None:
    assert waits(path) == []


def test_lengths_are_the_only_lists() -> None:
    """A model's inputs read lengths and flags, which the loader leaves on the CPU."""
    for path in ROOT.glob("models/*/inputs.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr == "tolist"
            ):
                assert "_len" in ast.unparse(node.func.value) or "_given" in ast.unparse(
                    node.func.value
                ), ast.unparse(node)


def test_a_wait_is_seen(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "def f(x):\n    n = x.sum().item()\n    return x.cpu(), x.mean(1).tolist(), x.max(0)\n"
    )
    assert len(waits(tmp_path / "model.py")) == 3
