"""Everything that only a GPU can confirm, in the order of worth, within a time.

    python -m tests.gpu.check --minutes 9 --out DIR
    python -m tests.gpu.check --list
    python -m tests.gpu.check --only kernels attention

Each check is a process of its own: what one breaks (an illegal access ends a CUDA context) the next does not
see. At the limit the check at hand is ended, keeps the rows that it had, and the rest is named as not run.
DIR gets report.txt, report.json and each check's rows. The exit code is 1 if a row failed. Without a GPU the
same code runs at tiny sizes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from tests.gpu.checks import CHECKS
from tests.gpu.report import Row, carry_out, keep, read, setup, table_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", choices=list(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.list:
        for check in CHECKS.values():
            print(f"{check.name:12}{check.seconds:4} s  {check.about}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    if args.one:
        carry_out(CHECKS[args.one], setup(device), args.out / f"{args.one}.json")
        return 0
    return _all(args.only, args.out, device, time.monotonic() + 60 * args.minutes)


def _all(names: Sequence[str], out: Path, device: torch.device, deadline: float) -> int:
    found: dict[str, list[Row]] = {}
    for name in [n for n in CHECKS if n in names]:
        file, left = out / f"{name}.json", deadline - time.monotonic()
        file.unlink(missing_ok=True)
        note = "not run: the time is over" if left <= 1 else _in_child(name, out, device, left)
        found[name] = read(file)
        if note:
            found[name].append(Row("-", passed=left <= 1 or note.startswith("ended"), note=note))
            keep(file, found[name])
        print(f"{name}: {sum(r.passed for r in found[name])} of {len(found[name])} rows pass", flush=True)
    _report(found, out, device)
    return 1 if any(not row.passed for rows in found.values() for row in rows) else 0


def _in_child(name: str, out: Path, device: torch.device, left: float) -> str:
    command = [
        sys.executable, "-m", "tests.gpu.check", "--one", name, "--out", str(out), "--device", device.type
    ]
    try:
        with (out / f"{name}.log").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=left).returncode
    except subprocess.TimeoutExpired:
        return "ended here: the time is over"
    return "" if code == 0 else f"its process ended with code {code}: see {name}.log"


def _report(found: dict[str, list[Row]], out: Path, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, tiny sizes"
    table = table_of(found, f"{name}, torch {torch.__version__}")
    with (out / "report.txt").open("w") as file:
        Console(width=170, file=file).print(table)
    Console(width=170).print(table)
    rows = {check: [asdict(row) for row in rows] for check, rows in found.items()}
    (out / "report.json").write_text(
        json.dumps({"device": name, "torch": torch.__version__, "checks": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
