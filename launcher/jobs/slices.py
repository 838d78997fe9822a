"""The jobs of a sliced training, as files: what is to be run, what was submitted, how it
ended. Any login node can read them.

    RUN/slices.json     the plan, the base config, data per slice, resources
    RUN/01, RUN/02 ...  the slices' own training runs
    RUN/state/01.json   its attempts: job or process, exit code, when
    RUN/state/cancelled.json, RUN/state/lock
    RUN/logs/01.log     its output
    RUN/state/merge.json, RUN/logs/merge.log
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hvtrain.config.load import build, override
from hvtrain.errors import ConfigError, LaunchError
from launcher.jobs import waves
from launcher.jobs.slurm import RESTARTS
from shards.atomic import write_text

FILE = "slices.json"
PLAN_FORMAT = "hvtrain-slices/1"


@dataclass(frozen=True)
class Slices:
    """One sliced training, as it was asked for."""

    plan: str  # empty: none, every slice trains the config's own LoRA
    config: str | None  # the base training config
    overrides: tuple[str, ...]
    data: tuple[str, ...]  # shard set of each slice, by LORAID
    n: int
    nproc: int = 1
    nodes: int = 1
    time: str = ""
    site: str | None = None
    backend: str = "local"
    at_once: int = 1
    gpus: tuple[str, ...] = ()  # local: handed out to slices
    merge: tuple[str, ...] = ()  # arguments of `hvtrain merge`; empty: no merge
    max_restarts: int = RESTARTS  # of a slice's processes, when one of them dies
    # share of each slice's samples that are the other slices', on which its LoRA learns to do nothing
    silence: float = 0.0
    waves: int = 1  # one after the other, each on top of the merge of those before it: waves.py
    cwd: str = ""  # where relative paths of the above count from; empty: not known (an older version's file)

    def width(self) -> int:
        return max(2, len(str(self.n)))

    def name(self, loraid: int) -> str:
        return f"{loraid:0{self.width()}d}"


@dataclass
class JobState:
    """How one slice (or the merge) stands. Written by whoever submits it and by the job itself."""

    jobs: list[str] = field(default_factory=list)  # Slurm ids 12_3, or pid:STARTTIME
    started: float | None = None  # of the last attempt
    ended: float | None = None
    code: int | None = None  # exit code; 75: stopped in time, to go on


def load_slices(run: str | Path) -> Slices:
    path = Path(run) / FILE
    try:
        raw = json.loads(path.read_text())
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        build(Slices, raw, where=FILE)  # the type of each value
        return Slices(**{**values, "merge": _of_before(values.get("merge", ()))})
    except OSError as error:
        raise LaunchError(
            f"{path}: cannot be read ({error.strerror}); `hvtrain slices run` writes it"
        ) from None
    except (ConfigError, ValueError, TypeError, AttributeError) as error:
        raise LaunchError(f"{path}: damaged ({error})") from None


def _of_before(merge: tuple[str, ...]) -> tuple[str, ...]:
    """An older version said where a reconciling merge computes, which finds a GPU by itself now; and not that
    slices are added up, which a merge no longer does by itself."""
    at = merge.index("--device") if "--device" in merge else len(merge)
    if merge and "--output" not in merge[:-1]:
        raise ValueError("merge: no --output")
    said = "--plan" not in merge or "--reconcile" in merge or "--on-overlap" in merge
    return merge[:at] + merge[at + 2 :] + (() if said else ("--on-overlap", "sum"))


def save_slices(run: Path, slices: Slices) -> None:
    for folder in ("state", "logs"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    body = asdict(slices)
    for key, usual in {"silence": 0.0, "waves": 1}.items():
        if body[key] == usual:
            del body[key]  # an older version knows no such key, and its jobs read the file too
    _write(run / FILE, body)


def load_state(run: Path, name: str) -> JobState:
    """Raises LaunchError for a file that cannot be read: what it would say is not "never started"."""
    path = run / "state" / f"{name}.json"
    try:
        return JobState(**json.loads(path.read_text()))
    except FileNotFoundError:
        return JobState()
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(
            f"{path}: cannot be read ({error}); remove it once you know that {name} is not running"
        ) from None


def save_state(run: Path, name: str, state: JobState) -> None:
    _write(run / "state" / f"{name}.json", asdict(state))


def _write(path: Path, body: Any) -> None:
    write_text(path, json.dumps(body, indent=1) + "\n")


def cancelled(run: Path) -> dict[str, str]:
    try:
        return dict(json.loads((run / "state" / "cancelled.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def mark_cancelled(run: Path, jobs: Mapping[str, str]) -> None:
    """Remember the wish: name -> the attempt that it ended, "" if there had been none. In a file of its own,
    since the jobs write their states meanwhile; a later attempt is another job, which no mark touches."""
    if jobs:
        _write(run / "state" / "cancelled.json", {**cancelled(run), **jobs})


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Nobody else starts jobs of this run meanwhile. The kernel takes the lock back when its
    holder ends, in whatever way."""
    path = run / "state" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"{run}: its slices are being started already, by process "
                f"{starter(run).partition(':')[0] or 'unknown'}; `hvtrain slices status {run}` shows them, "
                f"`hvtrain slices cancel {run}` stops them"
            ) from None
        except OSError as error:
            print(
                f"warning: {path}: this file system has no locks ({error.strerror}): start {run} once only",
                file=sys.stderr
            )
        file.truncate(0)
        file.write(job_of(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def starter(run: Path) -> str:
    """The process that holds the lock, as pid:STARTTIME, or nothing."""
    try:
        job = (run / "state" / "lock").read_text()
    except OSError:
        return ""
    return job if alive(job) else ""


def plan_size(path: str) -> int:
    """How many slices a plan has. Reads no more of it: the training checks it whole."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if raw["format"] != PLAN_FORMAT:
            raise ConfigError(f"--plan {path}: format {raw['format']!r}, expected {PLAN_FORMAT!r}")
        return int(raw["n"])
    except OSError as error:
        raise ConfigError(
            f"--plan {path}: cannot be read ({error.strerror}); `hvtrain slices plan` writes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--plan {path}: not a slice plan ({error})") from None


def data_of(path: str, n: int | None) -> tuple[str, ...]:
    """Each slice's shard set: the parts of `hvtrain shards split`, or one set for all. `n`:
    slices; None: as many as parts."""
    folder = Path(path)
    if (folder / "manifest.json").is_file() or "://" in path:
        if n is None:
            raise ConfigError(
                f"--data {path}: one shard set; without --plan every part of `hvtrain shards split` is a "
                "slice"
            )
        return (path,) * n
    if not folder.is_dir():
        raise ConfigError(f"--data {path}: no such directory")
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())
    n = max(1, len(parts)) if n is None else n
    if [int(p.name) for p in parts] != list(range(1, n + 1)):
        found = ", ".join(p.name for p in parts) or "none"
        raise ConfigError(
            f"--data {path}: {n} slices need the parts 01 to {n:02d} (`hvtrain shards split --n {n}`) or one "
            f"shard set; found {found}"
        )
    return tuple(str(p.resolve()) for p in parts)


def train_arguments(run: Path, slices: Slices, loraid: int) -> list[str]:
    """Of `hvtrain train` for one slice. The slice's own keys come last, so they win."""
    name = slices.name(loraid)
    slot = {
        "adapter.type": "loraid", "adapter.plan": slices.plan, "adapter.loraid": loraid,
        "adapter.blocks_per_loraid": None,
    }
    own = {
        **(slot if slices.plan else {}),
        **(
            {"adapter.base_lora": [{"path": str(under)}]}
            if (under := waves.under(run, slices, loraid)) else {}
        ),
        **_data_keys(slices, loraid), "run.output_dir": str(run / name), "run.name": f"slice-{name}",
    }
    return [
        "train", *([slices.config] if slices.config else []), *slices.overrides,
        *(override(key, value) for key, value in own.items()),
    ]


def _data_keys(slices: Slices, loraid: int) -> dict[str, Any]:
    own = slices.data[loraid - 1]
    if not slices.silence:
        return {"data.shards": [own]}
    others, share = [path for path in slices.data if path != own], slices.silence
    silent = [{"path": path, "weight": share / len(others), "silent": True} for path in others]
    return {"data.shards": [], "data.mixture": [{"path": own, "weight": 1 - share}, *silent]}


def result(run: Path, slices: Slices, loraid: int) -> Path:
    name = slices.name(loraid)
    return run / name / f"slice-{name}.safetensors"


def amiss(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size; its
    values are not read. "": nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(min(length, size)))
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        return "" if ends and 8 + length + max(ends) == size else f"{path.name} is damaged ({size} bytes)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        return f"{path.name} is damaged ({error})"


def set_damaged_aside(run: Path, slices: Slices, loraid: int) -> None:
    """A result that is damaged makes room for the one that this attempt writes."""
    path = result(run, slices, loraid)
    if path.exists() and (wrong := amiss(path)):
        print(f"{wrong}; it is now {path.name}.damaged", flush=True)
        path.replace(path.with_name(f"{path.name}.damaged"))


def note_submitted(run: Path, name: str, job: str) -> None:
    save_state(run, name, JobState([*load_state(run, name).jobs, job]))


def note_start(run: Path, name: str, job: str) -> None:
    jobs = load_state(run, name).jobs
    save_state(run, name, JobState(jobs if jobs[-1:] == [job] else [*jobs, job], started=time.time()))


def note_end(run: Path, name: str, code: int) -> None:
    save_state(run, name, replace(load_state(run, name), ended=time.time(), code=code))


def job_of(pid: int) -> str:
    """A local process as an attempt."""
    return f"{pid}:{process_start(pid)}"


def alive(job: str) -> bool:
    """Whether a local process pid:STARTTIME still runs."""
    pid, _, begun = job.partition(":")
    return begun != "" and process_start(int(pid)) == begun


def process_start(pid: int) -> str:
    """Distinguishes a process from a later one with its number. "": it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""
