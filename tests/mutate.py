"""`make mutate`: plant bugs one at a time and see whether the tests notice. `python -m tests.mutate --help`.

mutmut plants them, in copies under `mutants/` (settings: [tool.mutmut] in pyproject.toml), and keeps what it
learnt there: a run that was stopped goes on, and a later one tries only functions that changed. This script
prints the score of each module and every survivor as a diff. A survivor that is an equal program (no test can
tell the two apart) is listed in tests/equal_mutants/ with the reason, and counted apart.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EQUAL = ROOT / "tests" / "equal_mutants"
MUTMUT = (sys.executable, "-c", (ROOT / "tests" / "mutant_limits.py").read_text())
CAUGHT = ("killed", "timeout", "caught by type check", "segfault")
RESULT = re.compile(r"^\s*(?P<name>\S+): (?P<status>[a-z ]+)$", re.M)


@dataclass(frozen=True)
class Mutant:
    name: str  # hvtrain.flow.loss.x_add_noise__mutmut_3
    status: str

    @property
    def function(self) -> str:
        return self.name.rpartition("__mutmut_")[0]

    @property
    def module(self) -> str:
        return re.split(r"\.x_|\.xǁ", self.function)[0]


def mutmut(*arguments: str, output: bool) -> str:
    """Runs it; with output=False it draws its progress on the terminal, where there is one."""
    quiet = subprocess.DEVNULL if not (output or sys.stdout.isatty()) else None
    done = subprocess.run(
        [*MUTMUT, *arguments], text=True, stdout=subprocess.PIPE if output else quiet,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    if done.returncode and not output:
        raise SystemExit(
            f"mutmut ended with exit code {done.returncode}; `{' '.join(arguments)}` in {ROOT} shows why"
        )
    return done.stdout or ""


def diff(name: str) -> str:
    """The lines that the mutant takes away and puts in."""
    from mutmut.__main__ import (  # reads the settings of the working directory
        find_mutant,
        get_diff_for_mutant,
    )

    lines = get_diff_for_mutant(name, path=find_mutant(name).path).splitlines()
    return "\n".join(line for line in lines if re.match(r"[-+](?![-+])", line))


def equals() -> dict[tuple[str, str], str]:
    """(function, diff without white space) -> the reason why no test can see it."""
    entries = [
        entry for path in sorted(EQUAL.glob("*.toml")) for entry in tomllib.loads(path.read_text())["mutant"]
    ]
    return {(entry["function"], _bare(entry["diff"])): entry["reason"] for entry in entries}


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("only", nargs="*", help="names of mutants, with *: hvtrain.flow.*")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is known")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.chdir(ROOT)
    if not args.report:
        mutmut("run", "--max-children", str(args.processes), *args.only, output=False)
    found = [
        Mutant(m["name"], m["status"])
        for m in RESULT.finditer(mutmut("results", "--all", "true", output=True))
    ]
    known = equals()
    score: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in found:
        kind = "caught" if mutant.status in CAUGHT else mutant.status
        if kind == "survived" or kind == "no tests":
            lines = diff(mutant.name)
            reason = known.get((mutant.function, _bare(lines)))
            kind = "equal" if reason else kind
            if not reason:
                print(f"{mutant.name}: {mutant.status}\n{lines}\n")
        score[mutant.module][kind] += 1
    _print_table(score)
    return 0


def _print_table(score: dict[str, Counter[str]]) -> None:
    total: Counter[str] = sum(score.values(), Counter())
    columns = ("caught", "survived", "no tests", "equal", "not checked")
    print(f"{'module':40}" + "".join(f"{c:>13}" for c in columns) + f"{'caught of':>13}")
    for module, counts in [*sorted(score.items()), ("all", total)]:
        tried = sum(counts[c] for c in ("caught", "survived", "no tests"))
        share = f"{100 * counts['caught'] / tried:.1f} %" if tried else "-"
        print(f"{module:40}" + "".join(f"{counts[c]:>13}" for c in columns) + f"{share:>13}")


if __name__ == "__main__":
    raise SystemExit(main())
