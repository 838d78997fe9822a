"""What a cluster wants to be told: the site file, one for everybody who uses it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hvtrain.config.load import load
from hvtrain.errors import ConfigError

VARIABLE = "HVTRAIN_SITE"


@dataclass(frozen=True)
class Site:
    """Slurm options and the environment of jobs. Empty: not said."""

    partition: str = ""
    """--partition"""
    account: str = ""
    """--account"""
    qos: str = ""
    """--qos"""
    constraint: str = ""
    """--constraint"""
    time: str = ""
    """Time limit of a job, as in 12:00:00 or 2-00:00:00"""
    gpus: bool = True
    """Ask for a GPU for each process, by --gpus-per-node; false on a cluster without GPUs"""
    gres: str = ""
    """--gres instead of --gpus-per-node; {n} stands for the processes per node, as in gpu:h100:{n}"""
    cpus_per_process: int = 4
    """CPU cores for each process (GPU): it, its data readers, CPU offload; 0 leaves it to the cluster"""
    mem: str = ""
    """Memory of a node, as in 200G; 0 takes all"""
    options: tuple[str, ...] = ()
    """Other sbatch options, each as in --exclusive"""
    grace_s: int = 120
    """Seconds before the time limit at which a job is asked to save and go on later"""
    modules: tuple[str, ...] = ()
    """Loaded by `module load`"""
    setup: tuple[str, ...] = ()
    """Shell lines before the job, as in source /opt/venv/bin/activate"""
    environment: tuple[str, ...] = ()
    """Variables, each as NAME=value"""
    prefix: str = ""
    """Before the command, as in apptainer exec --nv hvtrain.sif"""
    command: str = ""
    """How hvtrain is called on the nodes; empty: this very installation"""


def load_site(path: str | None) -> Site:
    """The file that is given, or that $HVTRAIN_SITE names, or none."""
    path = path or os.environ.get(VARIABLE)
    site = load(Site, path) if path else Site()
    where = path or "site"
    for item in site.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", item):
            raise ConfigError(f"{where}: environment: '{item}', expected NAME=value")
    for item in site.options:
        if not item.startswith("-") or not item.isprintable():
            raise ConfigError(f"{where}: options: '{item}', expected an sbatch option as in --exclusive")
    check_time(f"{where}: time:", site.time)
    if site.gres and not site.gpus:
        raise ConfigError(f"{where}: gres is '{site.gres}' and gpus is false; leave one of them out")
    if site.cpus_per_process < 0:
        raise ConfigError(
            f"{where}: cpus_per_process is {site.cpus_per_process}, expected 0 (the cluster's default) or "
            "more"
        )
    if site.grace_s < 1:
        raise ConfigError(f"{where}: grace_s is {site.grace_s}, expected seconds, 1 or more")
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"{path}: no such site file")
    return site


def check_time(where: str, time: str) -> None:
    """Of a job, as Slurm writes it; empty is the cluster's default."""
    if time and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time, re.ASCII):
        raise ConfigError(f"{where} {time!r}, expected minutes, H:M:S or D-H:M:S")
