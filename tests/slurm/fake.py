"""A Slurm of four shell scripts: what was asked of it is written down, what it says is in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import cli
from launcher.jobs import slices

SBATCH = """#!/bin/sh
n=$(cat "{0}/last"); n=$((n + 1)); echo $n > "{0}/last"
cat > "{0}/script-$n"
if [ -f "{0}/sbatch.err" ]; then cat "{0}/sbatch.err" >&2; exit 1; fi
echo $n
"""
SQUEUE = """#!/bin/sh
echo "$@" >> "{0}/squeue.asked"
[ -f "{0}/slow" ] && sleep 30
cat "{0}/squeue.err" >&2 2> /dev/null && exit 1
cat "{0}/squeue.out"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> "{0}/scancel.asked"
if [ -f "{0}/scancel.err" ]; then cat "{0}/scancel.err" >&2; exit 1; fi
"""
DOWN = "slurm_load_jobs error: Socket timed out on send/recv operation"


class Fake:
    """`says`: lines of squeue, as 84_1|RUNNING|None."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "fake"
        self.root.mkdir()
        for name, body in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
            (self.root / name).write_text(body.replace("{0}", str(self.root)))
            (self.root / name).chmod(0o755)
        (self.root / "last").write_text("100")
        monkeypatch.setenv("PATH", f"{self.root}:/usr/bin:/bin")
        self.says()

    def says(self, *lines: str) -> None:
        (self.root / "squeue.err").unlink(missing_ok=True)
        (self.root / "squeue.out").write_text("".join(f"{line}\n" for line in lines))

    def fails(self, program: str, words: str = DOWN) -> None:
        (self.root / f"{program}.err").write_text(words + "\n")

    def asked(self, program: str) -> list[str]:
        path = self.root / f"{program}.asked"
        return path.read_text().splitlines() if path.exists() else []

    def scripts(self) -> list[str]:
        """What was submitted, oldest first; the first job has the number 101."""
        return [path.read_text() for path in sorted(self.root.glob("script-*"))]


def options(script: str) -> dict[str, str]:
    """Of a script, as written: --name -> value."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def weights(path: Path) -> None:
    """A small safetensors file, written by hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps(
        {"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def a_run(folder: Path, *, n: int = 3, backend: str = "slurm", merge: bool = True, **more) -> slices.Slices:
    """A sliced run that has not begun."""
    arguments = (
        ("--slices", str(folder), "--output", str(folder / "merge/merged.safetensors")) if merge else ()
    )
    plan = slices.Slices("p.json", None, (), ("set",) * n, n, backend=backend, merge=arguments, **more)
    slices.save_slices(folder, plan)
    return plan


def stands(folder: Path, name: str, *jobs: str, code: int | None = None, started: float | None = 1.0) -> None:
    slices.save_state(folder, name, slices.JobState(list(jobs), started, None, code))


def finish(folder: Path, name: str, job: str) -> None:
    weights(folder / name / f"slice-{name}.safetensors")
    stands(folder, name, job, code=0)


def damage(path: Path, kind: str) -> None:
    sound = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"", "cut": sound[:-1], "header": sound[:20], "longer": sound + b"x", "text": b"{" * 40
        }[kind]
    )


def hvtrain(capsys, *arguments) -> tuple[int, str]:
    code = cli.main(["slices", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out + said.err


def words(capsys, run: Path) -> dict[str, list[str]]:
    """Name -> word and note of `slices status`."""
    return {
        line.split()[0]: line.split(None, 2)[1:] for line in hvtrain(capsys, "status", run)[1].splitlines()
    }
