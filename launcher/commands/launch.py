"""launch: a command as several processes, here or as a Slurm job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hvtrain import stopping
from hvtrain.errors import LaunchError, suggest
from launcher.table import COMMANDS, at_least, command, parse


def _launch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nproc", type=int, required=True, help="processes on each machine: one per GPU")
    add("--nnodes", type=int, default=1, help="machines; without --slurm, start this command on each of them")
    add("--node-rank", type=int, default=0, help="which of them this is, from 0")
    add("--master-addr", default="127.0.0.1", help="host name of machine 0")
    add("--master-port", type=int, help="a free port on machine 0 (one machine: chosen)")
    add("--max-restarts", type=int, metavar="N",
        help="start the processes again after a failure, up to N times (default: 0; with --slurm: 3 in a "
        "job)")
    add(
        "--slurm", action="store_true",
        help="submit it as a Slurm job, which goes on by itself after its time limit"
    )
    add("--dry-run", action="store_true", help="with --slurm: print the script")
    add("--site", metavar="FILE", help="with --slurm: the cluster's own settings (default: $HVTRAIN_SITE)")
    add("--time", default="", metavar="H:M:S", help="with --slurm: time limit of a job")
    add("--name", default="", metavar="NAME", help="with --slurm: name of the job (default: hvtrain-COMMAND)")
    add(
        "--log", default="", metavar="FILE",
        help="with --slurm: where output goes (default: NAME-%%j.log here)"
    )
    add("--in-job", action="store_true", help=argparse.SUPPRESS)  # what the submitted script calls
    about = "encode, train or generate, and its own arguments"
    add("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=about)


@command("launch", "run a command as several processes, here or as a Slurm job", options=_launch_options)
def _launch(args: argparse.Namespace) -> int | None:
    if args.in_job:
        stopping.remember()
    inner = [a for i, a in enumerate(args.arguments) if not (i == 0 and a == "--")]
    able = [c.name for c in COMMANDS.values() if c.check]
    if not inner or inner[0] not in able:
        given = f"'{inner[0]}'" if inner else "nothing"
        known = [name for name in able if name != "selftest"]
        raise LaunchError(
            f"launch: cannot start {given} as several processes; {suggest(given.strip(chr(39)), known)}"
        )
    at_least(args, 0, "max_restarts")
    for option in ("dry_run", "site", "time", "name", "log"):
        if getattr(args, option) and not args.slurm:
            raise LaunchError(f"--{option.replace('_', '-')} goes with --slurm")
    parsed = parse(inner)
    check = COMMANDS[parsed.command].check
    assert check is not None
    check(parsed)
    if args.slurm:
        _submit(args, inner)
        return None
    from launcher import processes
    from launcher.jobs import slurm

    if args.max_restarts and args.nnodes > 1:
        raise LaunchError(
            f"--max-restarts {args.max_restarts}: on one machine only; for several use torchrun's option of "
            "that name with `--no-python hvtrain train ...`, or --slurm, whose jobs go on by themselves"
        )
    if args.in_job:
        return processes.launch(inner, slurm.topology(args.nproc))
    topology = processes.Topology(
        nproc=args.nproc, nnodes=args.nnodes, node_rank=args.node_rank, master_addr=args.master_addr,
        master_port=args.master_port,
    )
    return processes.launch(inner, topology, max_restarts=args.max_restarts or 0)


def _submit(args: argparse.Namespace, inner: Sequence[str]) -> None:
    from launcher.jobs import slurm
    from launcher.site import load_site

    if args.node_rank or args.master_port or args.master_addr != "127.0.0.1":
        raise LaunchError(
            "--node-rank, --master-addr and --master-port are for launching by hand; Slurm's job knows them"
        )
    if args.nproc < 1 or args.nnodes < 1:
        raise LaunchError(f"--nproc {args.nproc} --nnodes {args.nnodes}: both must be at least 1")
    name = args.name or f"hvtrain-{inner[0]}"
    restarts = slurm.RESTARTS if args.max_restarts is None else args.max_restarts
    job = slurm.BatchJob(
        "job", name, Path.cwd(), _log(args.log, name),
        ["launch", "--nproc", str(args.nproc), "--in-job", *inner],
        slurm.Resources(args.nnodes, args.nproc, args.time, max_restarts=restarts),
    )
    text = slurm.render(job, load_site(args.site))
    if args.dry_run:
        print(text, end="")
        return
    print(f"job {slurm.submit(text)}: {name} on {args.nnodes} x {args.nproc} processes")


def _log(pattern: str, name: str) -> str:
    """Where the job's output goes, as Slurm reads it: %j and its like are filled in,
    in what the user has given."""
    from launcher.jobs import slurm

    if not pattern and "/" in name:
        raise LaunchError(f"--name {name}: the log is named by it and cannot hold a '/'; give --log too")
    path = Path(pattern or f"{slurm.literal(name)}-%j.log")
    if "%" not in str(path.parent) and not path.parent.is_dir():
        raise LaunchError(
            f"--log {pattern}: there is no directory {path.parent}; without it the job would end and say "
            "nothing"
        )
    return str(path) if path.is_absolute() else f"{slurm.literal(Path.cwd())}/{path}"
