"""launch."""

from __future__ import annotations

import argparse

from hvtrain.errors import LaunchError, suggest
from launcher.table import COMMANDS, command, parse


def _launch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nproc", type=int, required=True, help="processes on this machine: one per GPU")
    add("--nnodes", type=int, default=1, help="machines; start this command on each of them")
    add("--node-rank", type=int, default=0, help="which of them this is, from 0")
    add("--master-addr", default="127.0.0.1", help="host name of machine 0")
    add("--master-port", type=int, help="a free port on machine 0 (one machine: chosen)")
    about = "encode, train or generate, and its own arguments"
    add("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=about)


@command("launch", "run a command as several processes", options=_launch_options)
def _launch(args: argparse.Namespace) -> int:
    inner = [a for i, a in enumerate(args.arguments) if not (i == 0 and a == "--")]
    able = [c.name for c in COMMANDS.values() if c.check]
    if not inner or inner[0] not in able:
        given = f"'{inner[0]}'" if inner else "nothing"
        raise LaunchError(f"launch: cannot start {given} as several processes; {suggest(given.strip(chr(39)), able)}")
    parsed = parse(inner)
    check = COMMANDS[parsed.command].check
    assert check is not None
    check(parsed)
    from launcher import local

    topology = local.Topology(
        nproc=args.nproc,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
    )
    return local.launch(inner, topology)
