"""A run's directory: whose it is, what it was asked to be, and what a kill left in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hvtrain.config import RunSettings, TrainConfig, to_dict
from hvtrain.config.load import read_yaml
from hvtrain.errors import ConfigError
from hvtrain.parallel.context import ParallelContext
from hvtrain.train import runlock
from hvtrain.train.runlock import RunLock
from hvtrain.train.status import STATUS_FILE
from shards.atomic import write_text

RUN_FILE, CONFIG_FILE, METRICS_FILE = "run.json", "config.yaml", "metrics.jsonl"
# run.json of older versions kept these as bare lists.
_LISTS = {
    "adapter": ("type", "rank", "alpha", "dropout", "include", "exclude", "plan", "loraid"),
    "flow": (
        "timestep_sampling", "shift", "sigmoid_scale", "logit_mean", "min_sigma", "max_sigma", "guidance"
    ),
}
_MAY_DIFFER = ("run.output_dir", "run.resume")  # not worth a word


def claim(
    run: RunSettings, config: str, identity: Mapping[str, object], ctx: ParallelContext,
    say: Callable[[str], None]
) -> RunLock:
    """Make run.output_dir this run's, held until the lock is released. For one rank only. `config`: all of it
    as YAML, to be kept there, without passwords.

    Raises ConfigError where it holds another run or files that no run wrote, and Busy
    where another process trains in it.
    """
    output = Path(run.output_dir)
    marker = output / RUN_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        _no_strangers(output)
        again = ctx.requeues or ctx.restarts
        lock = RunLock(output, job=ctx.job).acquire(runlock.REQUEUED_WAIT_S if again else runlock.WAIT_S)
    except OSError as error:
        raise ConfigError(
            f"run.output_dir: {output} cannot be made a directory to write in ({error.strerror})"
        ) from None
    try:
        if marker.exists():
            _same_run(marker, identity, resume=run.resume == "auto")
            _tell_changes(output / CONFIG_FILE, config, say)
        clear_leftovers(output, run.name)
        write_text(marker, json.dumps(identity, indent=1) + "\n")
        write_text(output / CONFIG_FILE, config)
    except BaseException:
        lock.release()
        raise
    return lock


def _no_strangers(output: Path) -> None:
    ours = (RUN_FILE, f".{RUN_FILE}.", runlock.NAME)  # those with a dot: killed at the very start
    if not (output / RUN_FILE).exists() and any(not p.name.startswith(ours) for p in output.iterdir()):
        raise ConfigError(
            f"run.output_dir: {output} holds files but no run of hvtrain; choose an empty or new directory"
        )


def clear_leftovers(output: Path, name: str) -> None:
    """What killed processes were writing. The lock is ours, so nobody writes these now,
    on whatever machine it was."""
    for folder in (output / "checkpoints").glob(".writing-step-*"):
        shutil.rmtree(folder, ignore_errors=True)
    finals = "|".join(re.escape(n) for n in (RUN_FILE, CONFIG_FILE, METRICS_FILE, STATUS_FILE, "COMPLETE"))
    temporary = re.compile(
        rf"\.({finals}|{re.escape(name)}.*\.safetensors)\.([0-9a-f]+-)?\d+(-[0-9a-f]+)?\.tmp"
    )
    for path in [*output.iterdir(), *output.glob("checkpoints/step-*/.COMPLETE.*")]:
        if temporary.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _same_run(marker: Path, identity: Mapping[str, object], *, resume: bool) -> None:
    where = marker.parent
    if not resume:
        raise ConfigError(
            f"run.output_dir: {where} holds a run already and run.resume is 'never'; "
            "choose another directory, or run.resume=auto to continue it"
        )
    try:
        before = _by_key(json.loads(marker.read_text()))
    except (ValueError, AttributeError):
        raise ConfigError(f"run.output_dir: {marker} is damaged; choose another directory") from None
    defaults = _flat(to_dict(TrainConfig()))  # of a key that the run's version did not know yet
    differ = []
    for key, value in json.loads(json.dumps(identity)).items():
        there = before.get(key, defaults.get(key))
        if there != value and value is not None:  # null: nothing uses it, whatever an older version kept
            differ.append(f"{key} is {_shown(there)} there, {_shown(value)} here")
    if differ:
        raise ConfigError(
            f"run.output_dir: {where} holds another run: {'; '.join(differ)}; "
            "choose another directory, or give the same values to continue that run"
        )


def _by_key(run: dict[str, Any]) -> dict[str, Any]:
    for section, names in _LISTS.items():
        if isinstance(values := run.pop(section, None), list):
            run |= {f"{section}.{name}": value for name, value in zip(names, values)}
    if "model.experts" in run:
        run["model.experts"] = run.pop("model.experts")
    if isinstance(plan := run.get("adapter.plan"), str):
        run["adapter.plan"] = plan.removeprefix("plan ")
    if isinstance(loraid := run.get("adapter.loraid"), str):
        run["adapter.loraid"] = int(loraid.removeprefix("LORAID "))
    return run


def _tell_changes(path: Path, config: str, say: Callable[[str], None]) -> None:
    """What may change is taken as it is given now; said, because a forgotten override would change it too."""
    try:
        before = _flat(read_yaml(path))
    except ConfigError:
        return  # config.yaml is for people: run.json decides
    now = _flat(yaml.safe_load(config))
    changed = [k for k in now if k in before and before[k] != now[k] and k not in _MAY_DIFFER]
    if changed:
        values = ", ".join(f"{k} {_shown(before[k])} -> {_shown(now[k])}" for k in changed)
        say(f"this run goes on with other settings than before: {values}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        section = isinstance(value, Mapping) and value  # an empty one is a value, as of a table of patterns
        found |= _flat(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return found


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " ..."


def cut_metrics(output: Path, step: int) -> None:
    """Drop the rows after `step`, which are about to be written again, and a row that a kill cut off."""
    path = output / METRICS_FILE
    if not path.exists():
        return
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [row for row in rows if row.endswith("\n") and _step(row) <= step]
    if len(kept) < len(rows):
        write_text(path, "".join(kept))


def _step(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
