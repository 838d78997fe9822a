"""sbatch scripts as text, run by bash with stand-ins for Slurm's commands; the
site file; states of slices."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from hvtrain.errors import ConfigError, LaunchError
from launcher import cli
from launcher.jobs import slices, slurm, standing
from launcher.site import Site, load_site
from tests.typed import hvtrain

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid"; c=$?; (( c > code )) && code=$c; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node-a\\nnode-b\\n'
else echo "scontrol $*" >> "$RECORD/asked"; fi
"""
HVTRAIN = """#!/usr/bin/env bash
{ printf '%s\\n' "$@"; echo "$MASTER_ADDR $MASTER_PORT $EXTRA"; } >> "$RECORD/node$SLURM_NODEID"
exit "$ENDS_WITH"
"""


def play(tmp_path: Path, text: str, ends_with: int) -> tuple[int, list[str], str]:
    """(exit code, what hvtrain on node 1 saw, what was asked of scontrol)"""
    sleep = "#!/usr/bin/env bash\nexit $ENDS_WITH\n"  # the real one is ended by Slurm
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("hvtrain", HVTRAIN), ("sleep", sleep)):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path),
        "ENDS_WITH": str(ends_with), "SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2", "SLURM_ARRAY_JOB_ID": "31230", "SLURM_ARRAY_TASK_ID": "3",
    }
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, timeout=60)
    assert all(": starting again (" in line for line in done.stderr.splitlines()), done.stderr
    asked = tmp_path / "asked"
    return (
        done.returncode, (tmp_path / "node1").read_text().splitlines(),
        asked.read_text() if asked.exists() else ""
    )


@pytest.mark.parametrize(
    ("ends_with", "requeued", "starts"),
    [
        (0, "", 1), (75, "31234", 1), (2, "", 1), (130, "", 1), (143, "", 1), (1, "", 3), (137, "", 3),
        (138, "31234", 1)
    ],
)
def test_a_job_starts_on_every_node_again_when_one_dies_and_is_requeued_when_it_has_saved(
    tmp_path, ends_with, requeued, starts
):
    site = Site(command="hvtrain", environment=("EXTRA=a b",), cpus_per_process=4)
    command = ["launch", "--nproc", "8", "--in-job", "train", "a=b c"]
    job = slurm.BatchJob("job", "n", tmp_path, "x.log", command, slurm.Resources(2, 8, max_restarts=2))
    code, seen, asked = play(tmp_path, slurm.render(job, site), ends_with)
    assert code == ends_with
    ports = [20000 + (31234 + 1009 * i) % 12000 for i in range(starts)]  # the one before may still be held
    assert seen == [part for port in ports for part in (*command, f"node-a {port} a b")]
    assert [(tmp_path / f"node{i}").read_text().count("launch") for i in (0, 1)] == [starts, starts]
    assert asked == (f"scontrol requeue {requeued}\n" if requeued else "")


def test_an_array_task_gets_its_number_and_requeues_itself(tmp_path):
    job = slurm.BatchJob(
        "array", "n", tmp_path, "x.log", ["slices", "one", "/run"], slurm.Resources(), array="1,2,3%2"
    )
    text = slurm.render(job, Site(command="hvtrain"))
    assert "#SBATCH --array=1,2,3%2\n" in text
    code, seen, asked = play(tmp_path, text, 75)
    assert (
        seen[:-1] == ["slices", "one", "/run", "3"] and asked == "scontrol requeue 31230_3\n" and code == 75
    )


def test_what_a_site_says_reaches_the_script(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(
        "partition: gpu\naccount: me\nqos: high\ngres: 'gpu:h100:{n}'\ntime: 4:00:00\nmem: '0'\noptions: "
        "[--exclusive]\ncpus_per_process: 12\nmodules: [cuda/12.4]\nsetup: [source "
        "/opt/venv/bin/activate]\nprefix: apptainer exec --nv x.sif\ncommand: hvtrain\ngrace_s: 300\n"
    )
    job = slurm.BatchJob(
        "job", "n", tmp_path, "x.log", ["launch", "train"], slurm.Resources(4, 8, "1-00:00:00")
    )
    text = slurm.render(job, load_site(str(path)))
    for line in (
        "--nodes=4", "--partition=gpu", "--account=me", "--qos=high", "--gres=gpu:h100:8",
        "--time=1-00:00:00", "--mem=0", "--exclusive", "--cpus-per-task=96", "--signal=USR1@300",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "module load cuda/12.4\nsource /opt/venv/bin/activate\n" in text
    assert (
        "srun --kill-on-bad-exit=0 --wait=50 --cpus-per-task=96 apptainer exec --nv x.sif hvtrain launch "
        "train\n" in text
    )
    assert "@{" not in text
    merge = slurm.BatchJob(
        "merge", "m", tmp_path, "x.log", ["slices", "merge", "/r"], slurm.Resources(gpus=False), after=["1"]
    )
    text = slurm.render(merge, load_site(str(path)))
    assert "gres" not in text and "--dependency=afterok:1\n" in text and "--cpus-per-task=12\n" in text


@pytest.mark.parametrize(
    ("body", "says"),
    [("partitoin: x", "did you mean 'partition'"), ("environment: [x]", "expected NAME=value"),
     (
         "options: [exclusive]", "sbatch option"
     ), ("time: soon", "expected minutes"), ("grace_s: 0", "1 or more")],
)
def test_mistakes_of_a_site_file(tmp_path, body, says):
    (tmp_path / "site.yaml").write_text(body)
    with pytest.raises(ConfigError, match=says):
        load_site(str(tmp_path / "site.yaml"))


def test_the_site_file_may_come_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "site.yaml").write_text("partition: p\n")
    monkeypatch.setenv("HVTRAIN_SITE", str(tmp_path / "site.yaml"))
    assert load_site(None).partition == "p"
    monkeypatch.setenv("HVTRAIN_SITE", str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="gone.yaml"):
        load_site(None)


def test_launch_prints_its_script_and_needs_slurm_to_submit(tmp_path, capsys, monkeypatch):
    (tmp_path / "set").mkdir()
    train = [
        "train", "model.dit=tiny:dit.safetensors", f"data.shards={tmp_path / 'set'}", "run.output_dir=x",
        "run.steps=1"
    ]
    assert cli.main(["launch", "--slurm", "--dry-run", "--nproc", "2", "--nnodes", "3", *train]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --nodes=3\n" in out and "launch --nproc 2 --in-job train" in out
    assert cli.main(["launch", "--dry-run", "--nproc", "2", *train]) == 2
    assert "goes with --slurm" in capsys.readouterr().err
    # before anything is submitted
    assert cli.main(["launch", "--slurm", "--nproc", "2", *train[:-1], "run.stepz=1"]) == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "--slurm", "--nproc", "2", *train]) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err


# --- states -------------------------------------------------------------------------------------------------


def test_status_shows_progress_and_time_left(tmp_path):
    plan = slices.Slices("p", None, (), ("s",), 1)
    slices.save_slices(tmp_path, plan)
    slices.save_state(tmp_path, "01", slices.JobState(jobs=["7_1"], started=1.0))
    (tmp_path / "01").mkdir()
    (tmp_path / "01/config.yaml").write_text("run: {steps: 100, name: slice-01}\n")
    rows = [
        {"step": s, "train/loss": 1 / s, "speed/slowest_rank_s": 30.0} for s in (1, 2)
    ] + [{"step": 2, "eval/loss": 1}]
    (tmp_path / "01/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "tr')
    line = standing.table([standing.standing(tmp_path, plan, 1, slurm.Queue({"7_1": "RUNNING"}))])[0]
    assert re.split(r"\s{2,}", line)[:5] == ["01", "running", "2/100", "loss 0.5000", "49 min left"]


def test_data_of_slices(tmp_path):
    for name in ("01", "02", "rest"):
        (tmp_path / name).mkdir()
    assert [Path(p).name for p in slices.data_of(str(tmp_path), 2)] == ["01", "02"]
    with pytest.raises(ConfigError, match="3 slices need the parts 01 to 03.*found 01, 02"):
        slices.data_of(str(tmp_path), 3)
    (tmp_path / "manifest.json").touch()
    assert slices.data_of(str(tmp_path), 3) == (str(tmp_path),) * 3
    with pytest.raises(LaunchError, match="hvtrain slices run"):
        slices.load_slices(tmp_path / "rest")


def test_slices_on_this_machine_fail_are_retried_and_merge(tmp_path, monkeypatch):
    """No Slurm: two at a time, one with damaged data."""
    from shards import edit, ways
    from tests.slurm.test_real_slurm import TRAIN
    from tests.train.shardset import make_shards

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(ROOT)
    edit.split(str(make_shards(tmp_path / "set", n=8)), tmp_path / "parts", ways.by_number(2))
    plan, run = tmp_path / "plan", tmp_path / "run"
    done = hvtrain(
        "slices", "plan", "--dit", "tiny:dit.safetensors", "--n", 2, "--granularity", "module", "--output",
        plan
    )
    assert done.returncode == 0, done.stderr
    start = [
        "slices", "run", *TRAIN, "run.steps=2", "--plan", plan / "plan.json", "--data", tmp_path / "parts",
        "--output", run, "--reconcile", "none"
    ]
    manifest = tmp_path / "parts/02/manifest.json"
    sound = manifest.read_text()
    manifest.write_text("{}")
    done = hvtrain(*start, "--at-once", 2)
    assert done.returncode == 1 and "1 of 2 slices are done" in done.stdout, (done.stdout, done.stderr)
    done = hvtrain("slices", "status", run)
    assert done.returncode == 1 and "damaged manifest" in done.stdout and not (run / "merge").exists()
    manifest.write_text(sound)
    done = hvtrain("slices", "retry", run)
    assert done.returncode == 0 and "slice 2: done" in done.stdout and "slice 1" not in done.stdout, (
        done.stderr
    )
    assert (run / "merge/merged-lora.safetensors").is_file()
    assert "nothing to start" in hvtrain(*start, "--at-once", 2).stdout
    done = hvtrain(*start, "--at-once", 1)
    assert done.returncode == 2 and "another sliced run" in done.stderr


def test_the_committed_site_file_is_the_defaults():
    assert load_site(str(ROOT / "configs" / "cluster.yaml")) == Site()
