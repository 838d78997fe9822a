"""What is asked of Slurm's programs and what their answers mean; values in scripts."""

from __future__ import annotations

import os
import shlex
import subprocess
import time

import pytest

from hvtrain.errors import ConfigError, LaunchError
from launcher import cli, processes
from launcher.jobs import slurm
from launcher.site import Site, load_site
from tests.slurm.fake import DOWN, options

# --- how jobs stand -----------------------------------------------------------------------------------------


def test_one_question_tells_of_all_jobs(fake):
    fake.says(
        "84_1|RUNNING|None", "84_2|PENDING|Resources, or | Priority", "9|TIMEOUT|TimeLimit",
        "no line of a job"
    )
    found = slurm.queue(["84_1", "84_2", "9", "84_7"])
    assert found == slurm.Queue(
        {"84_1": "RUNNING", "84_2": "PENDING (Resources, or | Priority)", "9": "TIMEOUT"}, ""
    )
    assert fake.asked("squeue") == ["--noheader --array --states=all --jobs=84,9 --format=%i|%T|%r"]
    assert slurm.queue([]) == slurm.Queue() and len(fake.asked("squeue")) == 1


def test_a_job_that_is_forgotten_is_an_answer(fake):
    fake.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    assert slurm.queue(["7"]) == slurm.Queue({}, "")


def test_a_squeue_that_fails_says_nothing_of_jobs(fake):
    fake.says("84_1|RUNNING|None")
    fake.fails("squeue")
    assert slurm.queue(["84_1"]) == slurm.Queue({}, DOWN)


def test_a_squeue_that_hangs_is_given_up_with_what_it_started(fake, monkeypatch):
    monkeypatch.setattr(slurm, "ANSWER_S", 0.5)
    (fake.root / "slow").touch()
    begun = time.monotonic()
    assert slurm.queue(["84_1"]).silent == "squeue took more than 0.5 s"
    assert time.monotonic() - begun < 10  # its `sleep 30` held the pipe


def test_a_host_without_squeue_knows_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.queue(["84_1"]).silent == "squeue is not installed here"


# --- submitting and cancelling ------------------------------------------------------------------------------


def test_a_submitted_job_has_a_number(fake):
    assert slurm.submit("#!/bin/sh\necho é\n") == "101"
    assert fake.scripts() == ["#!/bin/sh\necho é\n"]


@pytest.mark.parametrize(
    ("said", "number"),
    [("123\n", "123"), ("123;big\n", "123"), ("Welcome to us\n123\n", "123"), ("ok\n", None), ("", None)]
)
def test_the_number_is_found_or_it_is_an_error(said, number):
    done = subprocess.CompletedProcess([], 0, said, "")
    if number:
        assert slurm._job_id(done) == number
    else:
        with pytest.raises(LaunchError, match="gave no job number.*squeue --me"):
            slurm._job_id(done)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            "may have been accepted"
        ),
        ("sbatch: error: Invalid generic resource (gres) specification", "site file says: gpus, gres, "
        "cpus_per_process"),
        ("sbatch: error: Requested node configuration is not available", "site file says: gpus, gres, "
        "cpus_per_process"),
        ("sbatch: error: invalid partition specified: gpu", "partition specified: gpu$"),
    ],
)
def test_a_refusal_says_what_to_do(fake, said, hint):
    fake.fails("sbatch", said)
    with pytest.raises(LaunchError, match=hint) as caught:
        slurm.submit("#!/bin/sh\n")
    assert said in str(caught.value)


def test_scancel_is_believed_only_when_it_worked(fake):
    slurm.cancel([])
    slurm.cancel(["84_1", "85"])
    assert fake.asked("scancel") == ["84_1 85"]
    fake.fails("scancel", "scancel: error: Kill job error on job id 84_1: Invalid job id specified")
    slurm.cancel(["84_1"])
    fake.fails(
        "scancel", "scancel: error: Kill job error on job id 84_1: Job/step already completing or completed"
    )
    slurm.cancel(["84_1"])
    fake.fails("scancel", "scancel: error: Unable to contact slurm controller")
    with pytest.raises(LaunchError, match="Unable to contact.*running still: 84_1 85"):
        slurm.cancel(["84_1", "85"])


# --- values in scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain-1.2_x:y/z,a=b+c@d%j", "plain-1.2_x:y/z,a=b+c@d%j"),
        ("my run", '"my run"'),
        ("a#b", '"a#b"'),
        ("it's", '"it\'s"'),
        ('say "x" \\ y', '"say \\"x\\" \\\\ y"'),
        ("$(touch x);`y`", '"$(touch x);`y`"'),
        ("été", '"été"'),
        ("", '""'),
    ],
)
def test_an_option_is_quoted_as_sbatch_reads_it(value, written):
    assert slurm.quoted("--job-name", value) == written


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "a\x1bb", "\n"])
def test_a_line_break_is_no_part_of_an_option(bad):
    with pytest.raises(LaunchError, match="--job-name .*line break"):
        slurm.quoted("--job-name", bad)


def test_a_path_is_no_pattern():
    assert slurm.literal("/runs/50%j_%u/x") == "/runs/50%%j_%%u/x"
    with pytest.raises(LaunchError, match="backslash"):
        slurm.literal("/runs/a\\b")


def job(**more) -> slurm.BatchJob:
    given = {"template": "job", "name": "n", "folder": "/w", "log": "/x.log", "command": ["train"]}
    return slurm.BatchJob(**{**given, "resources": slurm.Resources(), **more})


@pytest.mark.parametrize(
    ("of_job", "of_site", "option"),
    [
        ({"name": "x\ntouch /tmp/pwn\n#"}, {}, "--job-name"),
        ({"log": "/x\ntouch /tmp/pwn\n#"}, {}, "--output"),
        *(
            ({}, {key: "x\ntouch /tmp/pwn"}, f"--{key}")
            for key in ("partition", "account", "qos", "constraint", "mem", "gres")
        ),
    ],
)
def test_no_value_becomes_shell_code(of_job, of_site, option):
    with pytest.raises(LaunchError, match=f"{option} .*line break"):
        slurm.render(job(**of_job), Site(**of_site))


def test_a_time_is_a_time():
    for good in ("30", "30:00", "4:00:00", "2-00:00:00", "1-12"):
        assert options(slurm.render(job(resources=slurm.Resources(time=good)), Site()))["--time"] == good
    for bad in ("x", "1:00\ntouch /tmp/pwn", "1:00 ", "١:00", "-5", "1:2:3:4"):
        with pytest.raises(ConfigError, match="--time .*expected minutes"):
            slurm.render(job(resources=slurm.Resources(time=bad)), Site())


def test_the_command_reaches_the_shell_as_it_was_typed(tmp_path):
    words = ["launch", "prompt=a\n\n\n\nb  c", "$(x) `y` ; 'z' \"w\" \\", "@{name}", "#SBATCH --x"]
    text = slurm.render(job(command=words, folder="/a dir/$x"), Site(command="printf '%s\\0'"))
    start = text.index("srun ")
    call = text[start : text.index("\n    code=$?", start)]
    assert shlex.split(call)[-len(words):] == words
    assert "cd '/a dir/$x' || exit 2" in text


def test_modules_are_names_and_variables_values():
    text = slurm.render(job(), Site(modules=("cuda/12.4 gcc", "a;b"), environment=("A=x y$(z)", "B=")))
    assert (
        "module load cuda/12.4 gcc\nmodule load 'a;b'\n" in text
        and "export A='x y$(z)'\nexport B=''\n" in text
    )


@pytest.mark.parametrize(
    ("site", "asked"),
    [
        (Site(), {"--gpus-per-node": "8", "--cpus-per-task": "32"}),
        (Site(cpus_per_process=12), {"--gpus-per-node": "8", "--cpus-per-task": "96"}),
        (Site(gres="gpu:h100:{n}", cpus_per_process=0), {"--gres": "gpu:h100:8"}),
        (Site(gpus=False), {"--cpus-per-task": "32"}),
    ],
)
def test_gpus_and_cores_are_asked_for_unless_the_site_says_otherwise(site, asked):
    found = options(slurm.render(job(resources=slurm.Resources(2, 8)), site))
    assert {k: v for k, v in found.items() if k.startswith(("--gpus", "--gres", "--cpus"))} == asked
    merge = options(slurm.render(job(template="merge", resources=slurm.Resources(gpus=False)), site))
    assert not merge.keys() & {"--gpus-per-node", "--gres"}
    assert merge.get("--cpus-per-task", "0") == str(site.cpus_per_process)


def test_a_job_alone_waits_for_nothing():
    assert "--dependency" not in options(slurm.render(job(template="merge"), Site()))
    assert options(
        slurm.render(job(template="merge", after=("7_1", "8")), Site())
    )["--dependency"] == "afterok:7_1:8"


@pytest.mark.parametrize(
    ("body", "says"),
    [("gpus: false\ngres: gpu:1", "leave one of them out"), ("cpus_per_process: -1", "or more"),
     ('options: ["--a\\ntouch x"]', "sbatch option"), ("gpus_per_node: true", "unknown key")],
)
def test_more_mistakes_of_a_site_file(tmp_path, body, says):
    (tmp_path / "site.yaml").write_text(body)
    with pytest.raises(ConfigError, match=says):
        load_site(str(tmp_path / "site.yaml"))


# --- launch -------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "50%j dir").mkdir()
    monkeypatch.chdir(tmp_path / "50%j dir")
    config = [
        "train", "model.dit=tiny:dit.safetensors", f"data.shards={tmp_path / 'set'}", "run.output_dir=x",
        "run.steps=1"
    ]
    return lambda *given: cli.main(["launch", "--slurm", "--nproc", "2", *given, *config])


def test_launch_submits_what_it_was_told(fake, train, capsys):
    assert train("--name", "my run", "--time", "1:00:00", "--max-restarts", "5") == 0
    assert capsys.readouterr().out == "job 101: my run on 1 x 2 processes\n"
    assert train("--log", "a b-%j.log") == 0
    assert train("--log", "/dev/null") == 0
    first, second, third = map(options, fake.scripts())
    here = os.getcwd().replace("%", "%%")
    assert (
        (first["--job-name"], first["--time"]) == ('"my run"', "1:00:00")
        and first["--output"] == f'"{here}/my run-%j.log"'
    )
    assert (second["--job-name"], second["--output"]) == ("hvtrain-train", f'"{here}/a b-%j.log"')
    assert third["--output"] == "/dev/null"
    assert '[ "$restarts" -lt 5 ]' in fake.scripts()[0] and '[ "$restarts" -lt 3 ]' in fake.scripts()[1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--name", "x\ntouch pwn\n#"], "line break"), (["--name", "a/b"], "cannot hold a '/'"),
        (["--log", "a\nb.log"], "line break"), (["--log", "no/such/x.log"], "there is no directory no/such"),
        (["--time", "1\n2"], "expected minutes"), (["--max-restarts", "-1"], "expected 0 or more"),
    ],
)
def test_launch_refuses_and_submits_nothing(fake, train, capsys, given, says):
    assert train(*given) == 2
    assert says in capsys.readouterr().err and not fake.scripts()


def test_this_node_s_part_of_a_job(monkeypatch):
    variables = {
        "SLURM_NNODES": "4", "SLURM_NODEID": "3", "SLURM_PROCID": "1", "MASTER_ADDR": "n1",
        "MASTER_PORT": "20123"
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slurm.topology(8) == processes.Topology(
        8, nnodes=4, node_rank=3, master_addr="n1", master_port=20123
    )
    monkeypatch.delenv("SLURM_NODEID")
    with pytest.raises(LaunchError, match="'SLURM_NODEID' is not set"):
        slurm.topology(8)
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert slurm.topology(2) == processes.Topology(2)
