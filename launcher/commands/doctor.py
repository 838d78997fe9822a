"""doctor: this machine, or the nodes of a cluster; selftest: what it has all processes do."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from hvtrain.errors import LaunchError
from launcher.program import HVTRAIN
from launcher.table import command


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--nproc", type=int, default=0, metavar="N",
        help="processes of the collective checks, per node (default: GPUs, else 2)"
    )
    add(
        "--dir", default=".", metavar="DIR",
        help="directory that all processes must see, e.g. where runs go (default: here)"
    )
    add("--slurm", action="store_true", help="run the checks inside a Slurm allocation")
    add("--nnodes", type=int, default=2, metavar="N", help="with --slurm: nodes (default: 2)")
    add("--site", metavar="FILE", help="with --slurm: the cluster's own settings (default: $HVTRAIN_SITE)")


@command(
    "doctor",
    "check machines: packages, GPUs, memory, disk, collectives and their speed, attention on all processes",
    options=_options, prints=True
)
def _doctor(args: argparse.Namespace) -> int:
    from launcher import doctor

    if args.nproc < 0 or args.nnodes < 1:
        raise LaunchError(f"--nproc {args.nproc} --nnodes {args.nnodes}: expected 1 or more")
    if not Path(args.dir).is_dir():
        raise LaunchError(f"--dir {args.dir}: no such directory")
    code = doctor.run()
    nproc = args.nproc or doctor.count_gpus() or 2
    inner = ["selftest", "--dir", str(Path(args.dir).resolve())]
    if not args.slurm:
        return code or subprocess.run([*HVTRAIN, "launch", "--nproc", str(nproc), *inner]).returncode
    from launcher.jobs import slurm
    from launcher.site import load_site

    log = Path("hvtrain-doctor.log").resolve()
    log.unlink(missing_ok=True)
    job = slurm.BatchJob(
        "job", "hvtrain-doctor", Path.cwd(), slurm.literal(log),
        ["launch", "--nproc", str(nproc), "--in-job", *inner], slurm.Resources(args.nnodes, nproc, "10"),
    )
    failed = slurm.submit_and_wait(slurm.render(job, load_site(args.site)))
    print(log.read_text() if log.exists() else "the job left no output", end="")
    return code or failed


def _selftest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="DIR", help="directory that all processes must see")


@command("selftest", "what doctor has all processes do: collectives, attention, a shared directory",
         options=_selftest_options, check=lambda args: None)
def _selftest(args: argparse.Namespace) -> int:
    from hvtrain.parallel import selftest

    return selftest.run(args.dir)
