"""The jobs of a slice plan, as files: what is to be run, what has been submitted, how it ended. Any login node can read them.

    RUN/slices.json     the plan, the base config, data per slice, resources
    RUN/01, RUN/02 ...  the slices' own training runs
    RUN/state/01.json   its attempts: job or process, exit code, when
    RUN/logs/01.log     its output
    RUN/state/merge.json, RUN/logs/merge.log
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.errors import ConfigError, LaunchError

FILE = "slices.json"
PLAN_FORMAT = "hvtrain-slices/1"
MERGE = "merge"


@dataclass(frozen=True)
class Slices:
    """One sliced training, as it was asked for."""

    plan: str
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

    def width(self) -> int:
        return max(2, len(str(self.n)))

    def name(self, loraid: int) -> str:
        return f"{loraid:0{self.width()}d}"


@dataclass
class State:
    """How one slice (or the merge) stands. Written by whoever submits it and by the job itself."""

    jobs: list[str] = field(default_factory=list)  # Slurm ids 12_3, or pid:BOOT
    started: float | None = None  # of the last attempt
    ended: float | None = None
    code: int | None = None  # exit code; 75: stopped in time, to go on


def load_slices(run: str | Path) -> Slices:
    path = Path(run) / FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return Slices(**values)
    except OSError as error:
        raise LaunchError(f"{path}: cannot be read ({error.strerror}); `hvtrain slices run` writes it") from None
    except (ValueError, TypeError) as error:
        raise LaunchError(f"{path}: damaged ({error})") from None


def save_slices(run: Path, slices: Slices) -> None:
    for folder in ("state", "logs"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    _write(run / FILE, asdict(slices))


def load_state(run: Path, name: str) -> State:
    try:
        return State(**json.loads((run / "state" / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return State()


def save_state(run: Path, name: str, state: State) -> None:
    _write(run / "state" / f"{name}.json", asdict(state))


def _write(path: Path, body: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(body, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def plan_size(path: str) -> int:
    """How many slices a plan has. Reads no more of it: the training checks it whole."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if raw["format"] != PLAN_FORMAT:
            raise ConfigError(f"--plan {path}: format {raw['format']!r}, expected {PLAN_FORMAT!r}")
        return int(raw["n"])
    except OSError as error:
        raise ConfigError(f"--plan {path}: cannot be read ({error.strerror}); `hvtrain slices plan` writes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--plan {path}: not a slice plan ({error})") from None


def data_of(path: str, n: int) -> tuple[str, ...]:
    """Each slice's shard set: the parts of `hvtrain shards split`, or one set for all."""
    folder = Path(path)
    if (folder / "manifest.json").is_file() or "://" in path:
        return (path,) * n
    if not folder.is_dir():
        raise ConfigError(f"--data {path}: no such directory")
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    if [int(p.name) for p in parts] != list(range(1, n + 1)):
        found = ", ".join(p.name for p in parts) or "none"
        raise ConfigError(
            f"--data {path}: {n} slices need the parts 01 to {n:02d} (`hvtrain shards split --n {n}`) or one shard set; "
            f"found {found}"
        )
    return tuple(str(p.resolve()) for p in parts)


def train_arguments(run: Path, slices: Slices, loraid: int) -> list[str]:
    """Of `hvtrain train` for one slice. The slice's own keys come last, so they win."""
    name = slices.name(loraid)
    return [
        "train", *([slices.config] if slices.config else []), *slices.overrides,
        "adapter.type=loraid", f"adapter.plan={slices.plan}", f"adapter.loraid={loraid}", "adapter.blocks_per_loraid=null",
        f"data.shards=[{slices.data[loraid - 1]}]", f"run.output_dir={run / name}", f"run.name=slice-{name}",
    ]


# --- how it stands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """One line of `hvtrain slices status`."""

    name: str
    word: str  # waiting, queued, running, preempted, failed, cancelled, done
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eta_s: float | None = None
    note: str = ""


def standing(run: Path, slices: Slices, loraid: int, queue: dict[str, str]) -> Standing:
    """Of a slice, from its files and from what the queue says of its job."""
    name = slices.name(loraid)
    state, folder = load_state(run, name), run / name
    step, loss, pace = _progress(folder)
    steps = _steps(folder)
    if (folder / f"slice-{name}.safetensors").is_file() and state.code in (0, None):
        return Standing(name, "done", steps or step, steps, loss)
    word, note = _word(state, queue)
    if word == "failed":
        note = last_error(run / "logs" / f"{name}.log") or note
    eta = (steps - step) * pace if word == "running" and steps and pace else None
    return Standing(name, word, step, steps, loss, eta, note)


def merge_standing(run: Path, slices: Slices, queue: dict[str, str]) -> Standing:
    if not slices.merge:
        return Standing(MERGE, "none", note="not asked for")
    state = load_state(run, MERGE)
    if state.code == 0:
        return Standing(MERGE, "done", note=f"{run / MERGE}")
    word, note = _word(state, queue)
    if word == "failed":
        note = last_error(run / "logs" / "merge.log") or note
    return Standing(MERGE, word, note=note)


def _word(state: State, queue: dict[str, str]) -> tuple[str, str]:
    if not state.jobs:
        return "waiting", ""
    job = state.jobs[-1]
    said = queue.get(job) if ":" not in job else ("RUNNING" if alive(job) else "")
    word = (said or "").split(" ")[0]
    if word in ("RUNNING", "COMPLETING", "CONFIGURING"):
        return "running", f"job {job}"
    if word in ("PENDING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"):
        kind = "preempted" if state.code == 75 else "queued"
        return kind, f"job {job} {said}"
    if word == "CANCELLED":
        return "cancelled", f"job {job}"
    if state.code == 75:
        return "preempted", "saved; `hvtrain slices retry` goes on"
    if state.code == 0:
        return "failed", "ended without its file"
    if state.code is not None:
        return "failed", f"exit code {state.code}"
    why = f"Slurm says {said}" if said else "ended without a word: killed, or its node failed"
    return "failed", f"job {job}: {why}"


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


def _progress(folder: Path) -> tuple[int, float | None, float]:
    """(last step, its loss, seconds per step) of a run."""
    step, loss, pace = 0, None, 0.0
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()[-50:]
    except OSError:
        return step, loss, pace
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # being written
        if "train/loss" in row:
            step, loss, pace = row["step"], row["train/loss"], row.get("speed/slowest_rank_s", 0.0)
    return step, loss, pace


def _steps(folder: Path) -> int:
    import yaml

    try:
        return int((yaml.safe_load((folder / "config.yaml").read_text()) or {}).get("run", {}).get("steps") or 0)
    except (OSError, ValueError, yaml.YAMLError):
        return 0


def last_error(log: Path) -> str:
    """The last line that says what went wrong."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error:") or "Error:" in line]
    return (errors or lines or [""])[-1][:300]


def table(standings: Sequence[Standing]) -> list[str]:
    lines = []
    for s in standings:
        progress = f"{s.step}/{s.steps}" if s.steps else (str(s.step) if s.step else "")
        loss = f"loss {s.loss:.4f}" if s.loss is not None else ""
        eta = f"{_span(s.eta_s)} left" if s.eta_s is not None else ""
        parts = [f"{s.name:<6}{s.word:<11}", f"{progress:<14}", f"{loss:<13}", f"{eta:<14}", s.note]
        lines.append("".join(parts).rstrip())
    return lines


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def note_start(run: Path, name: str, job: str) -> None:
    state = load_state(run, name)
    if not state.jobs or state.jobs[-1] != job:
        state.jobs.append(job)
    state.started, state.ended, state.code = time.time(), None, None
    save_state(run, name, state)


def note_end(run: Path, name: str, code: int) -> None:
    state = load_state(run, name)
    state.ended, state.code = time.time(), code
    save_state(run, name, state)
