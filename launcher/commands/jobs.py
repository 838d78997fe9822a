"""slices run, status, retry, cancel: the jobs of a sliced training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvtrain.errors import ConfigError, LaunchError
from launcher.table import at_least, command, config_options, load_config, split_items


def _run_options(parser: argparse.ArgumentParser) -> None:
    config_options(parser)
    add = parser.add_argument
    add(
        "--plan", metavar="FILE",
        help="plan.json of `hvtrain slices plan`; without, every slice is a LoRA as the config says"
    )
    add(
        "--data", required=True, metavar="DIR",
        help="the parts of `hvtrain shards split` (01, 02, ...), or one set for all"
    )
    add(
        "--output", required=True, metavar="DIR",
        help="everything of this run; an earlier one of the same settings goes on"
    )
    add(
        "--backend", default="local", metavar="NAME",
        help="local (default): on this machine; slurm: a job array and a merge job"
    )
    add(
        "--at-once", type=int, default=1, metavar="N",
        help="slices that run together (default: 1); on one machine they share its cores"
    )
    add(
        "--nproc", type=int, default=1, metavar="N", help="processes (GPUs) of a slice, per node (default: 1)"
    )
    add("--nodes", type=int, default=1, metavar="N", help="slurm: nodes of a slice (default: 1)")
    add(
        "--gpus", metavar="LIST",
        help="local: GPUs that are handed out, as in 0,1,2,3 (needs at-once x nproc of them)"
    )
    add(
        "--time", default="", metavar="H:M:S",
        help="slurm: time limit of a job; a slice that needs longer goes on in the next"
    )
    add("--site", metavar="FILE", help="slurm: the cluster's own settings (default: $HVTRAIN_SITE)")
    add("--max-restarts", type=int, metavar="N",
        help="start a slice's processes again when one of them dies, up to N times in a job (default: 3)")
    add(
        "--merge-as", default="lora", metavar="KIND",
        help="what the slices become: lora (default), model or none"
    )
    add("--reconcile", metavar="HOW",
        help="merge by what each slice does to samples of its data: fit, distill or fit+distill (default); "
        "none: add the slices up. Keys reconcile.KEY=value are the merge's")
    add("--keep", action="append", metavar="SET",
        help="what the base knows and the merge must not change (default: keep/ of --data, "
        "if it is there)")
    add("--silence", type=float, default=0.0, metavar="SHARE",
        help="share of samples, as 0.3, that are the other slices', and teach each LoRA to do nothing there "
        "(default: 0)")
    add("--waves", type=int, default=1, metavar="N",
        help="train the slices in N waves, each on top of the merge of those before it (default: 1, all "
        "independent)")
    add("--dry-run", action="store_true", help="slurm: print the scripts")


@command(
    "slices run", "train all slices of a dataset as independent jobs, then merge them", options=_run_options
)
def _run(args: argparse.Namespace) -> int | None:
    from launcher.jobs import slices

    wanted = _slices(args)
    run = Path(args.output).resolve()
    _check_configs(run, wanted)
    scripts = []
    if wanted.backend == "slurm":  # rendered before anything is written: a value may be refused
        scripts = _scripts(run, wanted)
    if args.dry_run:
        if not scripts:
            raise LaunchError("--dry-run goes with --backend slurm")
        print("\n".join(scripts if wanted.merge else scripts[:1]))
        return None
    if (run / slices.FILE).exists():
        begun = slices.load_slices(run)
        wanted = replace(wanted, cwd=begun.cwd)
        if begun != wanted:
            raise ConfigError(
                f"--output: {run} is another sliced run ({slices.FILE} differs); choose another directory, "
                f"or go on with it as it was begun: hvtrain slices retry {run}"
            )
    else:
        slices.save_slices(run, wanted)
    return _go(run, wanted)


def _scripts(run: Path, wanted) -> list[str]:
    """Of every job; the numbers of those that they wait for are not known yet."""
    from launcher.jobs import backends, waves

    found = []
    for wave in waves.every(wanted):
        found.append(
            backends.array_script(run, wanted, waves.members(wanted, wave), ["MERGE"] if wave > 1 else [])
        )
        found.append(backends.merge_script(run, wanted, ["ARRAY"], wave))
    return found


def _slices(args: argparse.Namespace):
    from launcher.jobs import merging, slices, slurm

    file, overrides = split_items(args.items)
    of_merge = [item for item in overrides if item.startswith(merging.OWN)]
    args.items = [item for item in args.items if item not in of_merge]
    overrides = [item for item in overrides if item not in of_merge]
    if args.backend not in ("local", "slurm"):
        raise ConfigError(f"--backend {args.backend}: expected local or slurm")
    at_least(args, 1, "at_once", "nproc", "nodes", "waves")
    at_least(args, 0, "max_restarts")
    gpus = tuple(g.strip() for g in args.gpus.split(",")) if args.gpus else ()
    if gpus and (args.backend != "local" or len(gpus) < args.at_once * args.nproc):
        needed = args.at_once * args.nproc
        raise ConfigError(
            f"--gpus {args.gpus}: {args.at_once} slices of {args.nproc} need {needed} GPUs, and backend local"
        )
    if args.backend == "local" and (args.nodes > 1 or args.time or args.site):
        raise ConfigError("--nodes, --time and --site are for --backend slurm")
    if not 0 <= args.silence < 1:
        raise ConfigError(f"--silence {args.silence}: expected a share, 0 or more and less than 1")
    data = slices.data_of(args.data, slices.plan_size(args.plan) if args.plan else None)
    if args.silence and len(set(data)) < 2:
        raise ConfigError(
            f"--silence {args.silence}: all slices have the same data, {data[0]}; it takes other slices' "
            "parts"
        )
    if args.waves > 1:
        _check_waves(args, len(data))
    wanted = slices.Slices(
        plan=str(Path(args.plan).resolve()) if args.plan else "",
        config=str(Path(file).resolve()) if file else None, overrides=tuple(overrides), data=data,
        n=len(data), nproc=args.nproc, nodes=args.nodes, time=args.time,
        site=str(Path(args.site).resolve()) if args.site else None, backend=args.backend,
        at_once=args.at_once, gpus=gpus, silence=args.silence, waves=args.waves, cwd=str(Path.cwd()),
        max_restarts=slurm.RESTARTS if args.max_restarts is None else args.max_restarts,
    )
    asked = merging.MergeAsked(args.merge_as, args.reconcile, args.keep or (), of_merge, Path(args.data))
    dit = merging.trained(load_config("train", args).model)
    return replace(wanted, merge=merging.arguments(Path(args.output).resolve(), wanted, asked, dit))


def _check_waves(args: argparse.Namespace, n: int) -> None:
    if args.waves > n:
        raise ConfigError(f"--waves {args.waves}: there are {n} slices; a wave needs one at least")
    if args.merge_as == "none":
        raise ConfigError(
            f"--waves {args.waves}: a wave is trained on top of the merge before it; give --merge-as lora or "
            "model"
        )
    if args.plan and args.reconcile not in (None, "none"):
        raise ConfigError(
            f"--waves {args.waves}: slices of a plan are added up between waves; leave --reconcile or --plan "
            "away"
        )


def _check_configs(run: Path, wanted) -> None:
    """Every slice's config, before anything is submitted."""
    from hvtrain import config
    from hvtrain.config import rules
    from launcher.jobs import merging, waves
    from launcher.jobs.slices import train_arguments

    for loraid in range(1, wanted.n + 1):
        arguments = train_arguments(run, wanted, loraid)[1:]
        file = arguments.pop(0) if wanted.config else None
        cfg = config.load(config.TrainConfig, file, arguments)
        if not wanted.plan and cfg.adapter.type != "lora":
            raise ConfigError(
                f"adapter.type is {cfg.adapter.type}: without --plan (`hvtrain slices plan`) each slice "
                "trains a LoRA of the whole model; give adapter.type=lora"
            )
        if waves.under(run, wanted, loraid):  # not there yet
            cfg = replace(cfg, adapter=replace(cfg.adapter, base_lora=()))
        elif cfg.adapter.base_lora and (wanted.waves > 1 or "--reconcile" in wanted.merge):
            raise ConfigError(
                "adapter.base_lora: the merge compares each slice with the model that it was trained on, and "
                "model.dit is not that model; put it in first (`hvtrain merge`), and give the result as "
                "model.dit, or --reconcile none"
            )
        rules.check_train(cfg)
        merging.check(cfg, wanted)


def _go(run: Path, wanted, settings: Sequence[str] = ()) -> int | None:
    """Start what is neither done nor under way, in the directory where the run was begun. `settings`: of
    the merge, from now on."""
    from launcher.jobs import backends, merging, slices

    if wanted.cwd and wanted.cwd != str(Path.cwd()):
        print(f"relative paths count from {wanted.cwd}, where this run was begun")
        try:
            os.chdir(wanted.cwd)
        except OSError as error:
            raise LaunchError(
                f"{wanted.cwd}: this run was begun there, and cannot go on there ({error.strerror})"
            ) from None
    with slices.only_one(run):
        found = backends.standings(run, wanted)
        backends.refuse_unknown(run, found)
        if wanted.backend == "local" and any(s.job for s in found):
            raise LaunchError(f"{run}: its slices are running already; `hvtrain slices status {run}`")
        if settings:
            words = [s.word for s in found[wanted.n :]]  # merges of earlier waves stay as they are
            if "running" in words or words[-1] == "done":
                raise LaunchError(
                    f"{settings[0]}: a merge of {run} is done or running by other settings; make another one "
                    "of its slices by `hvtrain merge`"
                )
            wanted = merging.set_again(wanted, settings)
            slices.save_slices(run, wanted)
        todo = backends.starts(wanted, found)
        if not any(todo):
            under_way = any(s.job for s in found)
            print(
                f"{run}: nothing to start, "
                f"{'the rest is under way' if under_way else 'all slices are done and merged'}"
            )
            return 0
        if wanted.backend == "local":
            return backends.run_here(run, wanted, tuple(loraid for start in todo for loraid in start.loraids))
        for line in backends.submit_all(run, wanted, todo):
            print(line)
    print(f"hvtrain slices status {run}")
    return None


def _run_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="DIR", help="the --output of `hvtrain slices run`")


def _opened(args: argparse.Namespace):
    from launcher.jobs import slices

    run = Path(args.run).resolve()
    return run, slices.load_slices(run)


@command("slices status", "how each slice stands: step, loss, time left, or its last error line",
         options=_run_folder, prints=True)
def _status(args: argparse.Namespace) -> int:
    from launcher.jobs import backends, standing

    found = backends.standings(*_opened(args))
    for line in standing.table(found):
        print(line)
    return 1 if any(s.word in ("failed", "blocked", "unknown") for s in found) else 0


def _retry_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument(
        "settings", nargs="*", metavar="reconcile.KEY=value",
        help="for the merge, as in reconcile.allow_lost=true (`hvtrain config merge` lists them); kept"
    )


@command(
    "slices retry",
    "start what is neither done nor under way: failed, cancelled, preempted; and the merge after it",
    options=_retry_options
)
def _retry(args: argparse.Namespace) -> int | None:
    from launcher.jobs import merging

    run, wanted = _opened(args)
    if args.settings:
        merging.set_again(wanted, args.settings)  # or they are refused
    return _go(run, wanted, args.settings)


@command("slices cancel", "stop what is queued or running", options=_run_folder)
def _cancel(args: argparse.Namespace) -> None:
    from launcher.jobs import backends

    for line in backends.cancel(*_opened(args)):
        print(line)


def _one_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument("loraid", type=int, metavar="N", help="which slice")


@command("slices one", "train one slice here; what the jobs of `slices run` call", options=_one_options)
def _one(args: argparse.Namespace) -> int:
    from hvtrain import stopping
    from launcher.jobs import backends

    stopping.remember()
    run, wanted = _opened(args)
    if not 1 <= args.loraid <= wanted.n:
        raise LaunchError(f"slice {args.loraid}: expected 1 to {wanted.n}")
    return backends.run_one(run, wanted, args.loraid)


def _merge_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument("--wave", type=int, metavar="N", help="of the waves up to N only (default: all)")


@command(
    "slices merge", "merge the finished slices here; what the merge job of `slices run` calls",
    options=_merge_options
)
def _merge(args: argparse.Namespace) -> int:
    from launcher.jobs import backends

    run, wanted = _opened(args)
    if not wanted.merge:
        which = (
            f"--plan {wanted.plan} --slices {run}" if wanted.plan else f"--lora {run / wanted.name(1)} ..."
        )
        raise LaunchError(f"{run}: was started with --merge-as none; use `hvtrain merge {which}`")
    if args.wave is not None and not 1 <= args.wave <= wanted.waves:
        raise LaunchError(f"--wave {args.wave}: expected 1 to {wanted.waves}")
    (run / "merge").mkdir(exist_ok=True)
    return backends.run_merge(run, wanted, args.wave)
