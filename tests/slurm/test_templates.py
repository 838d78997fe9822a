"""The sbatch templates, run by bash with stand-ins for Slurm's commands and for hvtrain."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"
ARGUMENTS = "lora.yaml data.shards=/data/a optim.lr=1e-4"

# Runs the task once for each node, at the same time, and ends with the highest exit code, as srun does.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid"; c=$?; (( c > code )) && code=$c; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node-a\\nnode-b\\n'; else echo "scontrol $*" >> "$RECORD/asked"; fi
"""
HVTRAIN = """#!/usr/bin/env bash
while [ $# -gt 0 ]; do printf '%s\\n' "$1"; shift; done > "$RECORD/node$SLURM_NODEID"
exit "$ENDS_WITH"
"""


def submit(tmp_path: Path, template: str, ends_with: int) -> tuple[int, list[str], str]:
    """(exit code of the job, arguments of hvtrain on node 1, what was asked of scontrol)"""
    values = {
        "name": "n", "nodes": "2", "gpus": "8", "cpus": "64", "time": "1:00", "logs": str(tmp_path),
        "repository": str(tmp_path), "arguments": ARGUMENTS,
    }
    text = re.sub(r"@\{(\w+)\}", lambda m: values[m[1]], (SLURM / template).read_text())
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), (".venv/bin/hvtrain", HVTRAIN)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
        path.chmod(0o755)
    env = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path), "ENDS_WITH": str(ends_with),
        "SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2",
    }
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    asked = tmp_path / "asked"
    said = asked.read_text() if asked.exists() else ""
    return done.returncode, (tmp_path / "node1").read_text().splitlines(), said


@pytest.mark.parametrize("template", ["train.sbatch", "encode.sbatch"])
def test_every_node_starts_its_part(tmp_path: Path, template: str) -> None:
    code, arguments, asked = submit(tmp_path, template, ends_with=0)
    assert (code, asked) == (0, "")
    port = str(20000 + 31234 % 12000)
    expected = f"launch --nproc 8 --nnodes 2 --node-rank 1 --master-addr node-a --master-port {port}"
    assert arguments == [*expected.split(), template.removesuffix(".sbatch"), *ARGUMENTS.split()]


@pytest.mark.parametrize(("ends_with", "requeued"), [(75, True), (2, False), (1, False)])
def test_only_a_saved_run_is_requeued(tmp_path: Path, ends_with: int, requeued: bool) -> None:
    code, _, asked = submit(tmp_path, "train.sbatch", ends_with=ends_with)
    assert code == ends_with
    assert asked == ("scontrol requeue 31234\n" if requeued else "")


@pytest.mark.parametrize("template", ["train.sbatch", "encode.sbatch"])
def test_the_readme_fills_every_placeholder(template: str) -> None:
    placeholders = set(re.findall(r"@\{(\w+)\}", (SLURM / template).read_text().split("\n", 2)[2]))
    filled = set(re.findall(r"s\|@\{(\w+)\}\|", (SLURM / "README.md").read_text()))
    assert placeholders == filled
