"""Jobs on a real Slurm of two nodes: arrays, time limits, requeueing, failures, cancelling."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shards import edit, ways
from tests.slurm.cluster import Cluster, missing
from tests.train.shardset import make_shards

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here"),
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("slurm"),
]

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"dit": "dit.safetensors", "vae": "vae.safetensors", "llm": "llm", "clip": "clip"}
TRAIN = [
    "model.dit=tiny:dit.safetensors", "model.dtype=float32", "data.batch_size=2", "adapter.rank=4",
    "adapter.alpha=4", "run.precision=fp32", "run.recompute=none", "optim.lr=1e-3", "zero.engine=torch",
]


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # pytest's own are closed to the user munge
        found = Cluster(Path(folder))
        try:
            found.start()
            yield found
        finally:
            found.stop()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set", n=12)


@pytest.fixture
def site(tmp_path):
    """Node names mean nothing outside Slurm here, and signals must come early in jobs of one minute."""
    path = tmp_path / "site.yaml"
    variables = f"MASTER_ADDR=localhost, DS_ACCELERATOR=cpu, OMP_NUM_THREADS=1, PYTHONPATH={ROOT}"
    path.write_text(f"gpus: false\ncpus_per_process: 1\ngrace_s: 20\nenvironment: [{variables}]\n")
    return path


def hvtrain(cluster: Cluster, *arguments, check=True) -> subprocess.CompletedProcess:
    return cluster.run(sys.executable, "-m", "launcher.cli", *map(str, arguments), check=check)


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def test_a_job_on_two_nodes(cluster, shards, site, tmp_path):
    log, run = tmp_path / "job.log", tmp_path / "run"
    config = [
        *TRAIN, f"data.shards={shards}", f"run.output_dir={run}", "run.steps=4", "zero.engine=deepspeed",
        "zero.stage=2"
    ]
    done = hvtrain(
        cluster, "launch", "--slurm", "--site", site, "--nproc", 1, "--nnodes", 2, "--log", log, "train",
        *config
    )
    job = re.search(r"job (\d+)", done.stdout)[1]
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "2 process(es) on CPU: data 2 x Ulysses 1 x ring 1" in log.read_text()
    assert (run / "lora.safetensors").exists()


STEPS = 20
TWENTY = [*TRAIN, f"run.steps={STEPS}", "run.grad_accum=20", "run.save_every_steps=2"]


@pytest.fixture(scope="module")
def whole(cluster, shards, tmp_path_factory):
    """The weights of a training that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    hvtrain(cluster, "train", *TWENTY, f"data.shards={shards}", f"run.output_dir={run}")
    return run / "lora.safetensors"


def processes_of(run: Path) -> list[int]:
    """Of a job's training: the launcher's and its worker's, the newest."""
    found = subprocess.run(["pgrep", "-f", f"train.*run.output_dir={run}$"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def text(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def saved(cluster: Cluster, job: str, log: Path, step: int) -> None:
    """Returns when the log says so."""
    end = time.monotonic() + 120
    while f"step {step}: saved" not in text(log):
        assert time.monotonic() < end, text(log) or cluster.out("scontrol", "show", "job", job)
        time.sleep(0.05)


def is_asked(pid: int) -> bool:
    """Whether SIGUSR1 waits for a process that stands still."""
    (waiting,) = re.findall(r"^ShdPnd:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(waiting, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_a_job_with_a_time_limit_goes_on_after_it(cluster, shards, site, whole, tmp_path):
    """The limit is one minute; 45 s before it, Slurm asks the job to save.
    Weights as without interruption."""
    site.write_text(site.read_text().replace("grace_s: 20", "grace_s: 45"))
    log, run = tmp_path / "job.log", tmp_path / "run"
    done = hvtrain(
        cluster, "launch", "--slurm", "--site", site, "--time", "0:01:00", "--nproc", 1, "--log", log,
        "train", *TWENTY, f"data.shards={shards}", f"run.output_dir={run}",
    )
    job = re.search(r"job (\d+)", done.stdout)[1]
    # it stands still, so that on a machine of any speed it trains when the warning comes
    still, end = 0, time.monotonic() + 180
    while "stopped on request; start again to continue" not in text(log):
        assert time.monotonic() < end, text(log)
        with suppress(IndexError, ProcessLookupError, FileNotFoundError):  # it has stopped just now
            if not still and "step 2: saved" in text(log):
                os.kill(still := processes_of(run)[-1], signal.SIGSTOP)
            elif still and is_asked(still):
                os.kill(still, signal.SIGCONT)
        time.sleep(0.05)
    assert cluster.wait(
        job, "COMPLETED", "FAILED", "TIMEOUT", seconds=300
    ) == "COMPLETED", log.read_text()[-3000:]
    restarts = int(re.search(r"Restarts=(\d+)", cluster.out("scontrol", "show", "job", job))[1])
    assert restarts >= 1
    assert same(whole, run / "lora.safetensors")


def test_a_process_that_is_killed_starts_again_in_a_job_with_odd_names(cluster, shards, site, tmp_path):
    """Nothing in a name or path is read by sbatch, Slurm's patterns or a shell."""
    name, logs, run = (
        "it's a $(touch pwned) \"job\" \\ #1 %j", tmp_path / "50%j_%u 'my' logs #$x é", tmp_path / "run"
    )
    logs.mkdir()
    pattern = str(logs).replace("%", "%%")  # --log is a pattern of Slurm's
    done = hvtrain(
        cluster, "launch", "--slurm", "--site", site, "--nproc", 1, "--name", name, "--log",
        f"{pattern}/%j x.log", "train", *TWENTY, f"data.shards={shards}", f"run.output_dir={run}",
    )
    job = re.search(r"job (\d+)", done.stdout)[1]
    log = logs / f"{job} x.log"
    saved(cluster, job, log, 2)
    assert cluster.out("squeue", "-h", "-j", job, "-o", "%j").strip() == name
    launcher, *_, worker = processes_of(run)
    assert launcher != worker
    os.kill(worker, signal.SIGKILL)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=200) == "COMPLETED", log.read_text()[-3000:]
    assert (
        "exit code 137: starting again (1 of 3)" in log.read_text()
        and log.read_text().count(f"steps 1 to {STEPS}") == 1
    )
    assert (
        "Restarts=0" in cluster.out("scontrol", "show", "job", job) and not list(cluster.root.glob("pwned*"))
    )


def test_generate_keeps_what_it_has_made_at_its_warning_and_goes_on(cluster, site, tmp_path):
    prompts, output, log = tmp_path / "prompts.txt", tmp_path / "videos", tmp_path / "job.log"
    prompts.write_text("".join(f"a red circle moves left {i}\n" for i in range(4)))
    parts = [f"model.{part}=tiny:{file}" for part, file in MODEL.items()]
    config = [
        *parts, "model.dtype=float32", "model.vae_dtype=float32", "precision=fp32", "width=80", "height=48",
        "frames=9"
    ]
    done = hvtrain(
        cluster, "launch", "--slurm", "--site", site, "--nproc", 1, "--log", log, "generate", *config,
        "steps=100", f"prompt_file={prompts}", f"output={output}",
    )
    job = re.search(r"job (\d+)", done.stdout)[1]
    end = time.monotonic() + 200
    while not (first := sorted(output.glob("*.mp4"))):
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)
    made = first[0].stat().st_mtime_ns
    # to the steps, not to the script: as --signal does before the limit
    cluster.run("scancel", "--signal=USR1", job)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=200) == "COMPLETED", log.read_text()[-3000:]
    assert (
        "Restarts=1" in cluster.out("scontrol", "show", "job", job)
        and "starting again" not in log.read_text()
    )
    assert len(list(output.glob("*.mp4"))) == 4 and first[0].stat().st_mtime_ns == made


@pytest.fixture
def sliced(cluster, shards, site, tmp_path):
    """A plan of four slices with a part of the data each, and the command that runs them."""
    edit.split(str(shards), tmp_path / "parts", ways.by_number(4))
    plan = [
        "slices", "plan", "--dit", "tiny:dit.safetensors", "--n", 4, "--granularity", "rows", "--order",
        "interleaved"
    ]
    hvtrain(cluster, *plan, "--output", tmp_path / "plan")
    return [
        "slices", "run", *TRAIN, "run.steps=3", "--plan", tmp_path / "plan" / "plan.json", "--data",
        tmp_path / "parts", "--backend", "slurm", "--at-once", 2, "--site", site, "--output",
        tmp_path / "run", "--reconcile", "none",
    ]


def words(cluster: Cluster, run: Path) -> dict[str, str]:
    done = hvtrain(cluster, "slices", "status", run, check=False)
    return {line.split()[0]: line for line in done.stdout.splitlines()}


def merge_job(run: Path) -> str:
    return json.loads((run / "state/merge.json").read_text())["jobs"][-1]


def test_four_slices_as_an_array_and_the_merge_after_them(cluster, sliced, tmp_path):
    run = tmp_path / "run"
    assert "%2" in hvtrain(cluster, *sliced, "--dry-run").stdout and not run.exists()
    out = hvtrain(cluster, *sliced).stdout
    assert "slices 1, 2, 3, 4, 2 at a time" in out
    assert cluster.wait(
        merge_job(run), "COMPLETED", "FAILED"
    ) == "COMPLETED", (run / "logs/merge.log").read_text()
    found = words(cluster, run)
    assert all("done" in found[name] for name in ("01", "02", "03", "04", "merge")), found
    assert "3/3" in found["03"] and "loss" in found["03"]
    report = json.loads((run / "merge/merged-lora-merge.json").read_text())
    assert report["overlap_rows"] == 0 and [e["loraid"] for e in report["loras"]] == ["1", "2", "3", "4"]
    assert "nothing to start" in hvtrain(cluster, *sliced).stdout
    (run / "merge/merged-lora.safetensors").unlink()
    assert "merged-lora.safetensors is missing" in words(cluster, run)["merge"]
    # alone, and it waits for nothing
    assert "merge, at once" in hvtrain(cluster, "slices", "retry", run).stdout
    assert cluster.wait(
        merge_job(run), "COMPLETED", "FAILED"
    ) == "COMPLETED", (run / "logs/merge.log").read_text()
    assert "done" in words(cluster, run)["merge"]


def test_a_merge_goes_on_after_its_time_limit(cluster, sliced, tmp_path):
    """Warned in its steps, it goes back into the queue, and on from where it noted that it was."""
    run, settings = tmp_path / "run", ["states=4", "held_out=2", "steps=200", "allow_lost=true"]
    own = [f"reconcile.{item}" for item in settings]
    hvtrain(
        cluster, *sliced[:-2], "run.steps=20", "optim.lr=1e-2", *own, "--time", "5:00", "--reconcile",
        "distill"
    )
    log, job, end = run / "logs/merge.log", merge_job(run), time.monotonic() + 200
    while not log.exists() or "distill: step 50/200" not in log.read_text():
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)
    assert "TimeLimit=00:05:00" in cluster.out("scontrol", "show", "job", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B: does before the limit
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=250) == "COMPLETED", log.read_text()[-2000:]
    assert "Restarts=1" in cluster.out("scontrol", "show", "job", job)
    assert log.read_text().count("distill: step 10/200") == 1
    assert "done" in words(cluster, run)["merge"]


def test_a_failed_slice_holds_the_merge_until_it_is_retried(cluster, sliced, tmp_path):
    run, part = tmp_path / "run", tmp_path / "parts" / "03"
    sound = (part / "manifest.json").read_text()
    (part / "manifest.json").write_text("{}")
    hvtrain(cluster, *sliced)
    array = json.loads((run / "state/03.json").read_text())["jobs"][-1]
    assert cluster.wait(array, "FAILED", "COMPLETED") == "FAILED"
    for n in ("01", "02", "04"):
        cluster.wait(json.loads((run / f"state/{n}.json").read_text())["jobs"][-1], "COMPLETED")
    end = time.monotonic() + 60
    while "blocked" not in (found := words(cluster, run))["merge"]:  # Slurm notices it in its next round
        assert time.monotonic() < end and "queued" in found["merge"], found
        time.sleep(1)
    assert "failed" in found["03"] and "damaged manifest" in found["03"] and "done" in found["04"]
    assert not (run / "merge").exists()
    (part / "manifest.json").write_text(sound)
    assert "slices 3, 2 at a time" in hvtrain(cluster, "slices", "retry", run).stdout
    assert cluster.wait(merge_job(run), "COMPLETED", "FAILED") == "COMPLETED"
    assert all("done" in line for line in words(cluster, run).values())


def test_cancelling_is_told_as_it_is(cluster, sliced, tmp_path):
    run = tmp_path / "run"
    hvtrain(cluster, *[a if a != "run.steps=3" else "run.steps=3000" for a in sliced])
    end = time.monotonic() + 120
    while "running" not in (found := words(cluster, run))["01"] or "/3000" not in found["01"]:
        assert time.monotonic() < end, found
        time.sleep(1)
    cluster.run("scancel", json.loads((run / "state/01.json").read_text())["jobs"][-1])
    cluster.wait(json.loads((run / "state/01.json").read_text())["jobs"][-1], "CANCELLED")
    found = words(cluster, run)
    assert "cancelled" in found["01"] and "running" in found["02"]
    assert "cancelled: " in hvtrain(cluster, "slices", "cancel", run).stdout
    end = time.monotonic() + 90
    while "running" in str(found := words(cluster, run)):  # they save first
        assert time.monotonic() < end, found
        time.sleep(1)
    # also those that Slurm has dropped while pending
    assert {line.split()[1] for line in found.values()} == {"cancelled"}
    cluster.run("scancel", "--user=root")


def test_doctor_looks_at_the_nodes_of_an_allocation(cluster, site, tmp_path):
    done = hvtrain(
        cluster, "doctor", "--slurm", "--site", site, "--nproc", 1, "--nnodes", 2, "--dir", tmp_path
    )
    for words_ in ("2 on", "all-reduce", "all-to-all", "Ulysses 2 = one", "ring 2 = one", "seen by all"):
        assert words_ in done.stdout, done.stdout
    assert "FAIL" not in done.stdout


def test_a_preempted_job_loses_nothing(cluster, shards, site, whole, tmp_path):
    log, run = tmp_path / "job.log", tmp_path / "run"
    start = [
        "launch", "--slurm", "--site", site, "--nproc", 1, "--log", log, "train", *TWENTY,
        f"data.shards={shards}"
    ]
    job = re.search(r"job (\d+)", hvtrain(cluster, *start, f"run.output_dir={run}").stdout)[1]
    saved(cluster, job, log, 2)
    cluster.run("scontrol", "requeue", job)  # what preemption does, and what follows the failure of a node
    assert cluster.wait(
        job, "COMPLETED", "FAILED", "CANCELLED", seconds=200
    ) == "COMPLETED", log.read_text()[-3000:]
    assert int(re.search(r"Restarts=(\d+)", cluster.out("scontrol", "show", "job", job))[1]) == 1
    assert log.read_text().count(f"steps 1 to {STEPS}") == 1  # it went on, it did not begin again
    assert same(whole, run / "lora.safetensors")
