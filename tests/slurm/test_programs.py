"""What Slurm's programs are asked, word by word, what is concluded from their
answers; and what fills a script."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from hvtrain.errors import ConfigError, LaunchError
from launcher import processes
from launcher.jobs import slurm
from launcher.site import Site

PERHAPS = "the job may have been accepted all the same: look at `squeue --me` before you submit it again"


class Programs:
    """Instead of processes. `answers`: what each question gets, in order: (exit code,
    stdout, stderr) or an error."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.answers: list[tuple[int, str, str] | Exception] = []

    def __call__(
        self, command: list[str], wait_s: float | None, text: str | None = None
    ) -> subprocess.CompletedProcess:
        self.asked.append((" ".join(command), wait_s, text))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, *answer)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setattr(slurm, "_ask", asked := Programs())
    return asked


def message(of) -> str:
    with pytest.raises(LaunchError) as caught:
        of()
    return str(caught.value)


LATE = subprocess.TimeoutExpired("x", 1)


def test_jobs_are_submitted_by_their_text(programs):
    programs.answers = [(0, "12\n", ""), (0, "13;big\n", "")]
    assert (slurm.submit("text"), slurm.submit("more", hold=True)) == ("12", "13")
    assert programs.asked == [("sbatch --parsable", 120, "text"), ("sbatch --parsable --hold", 120, "more")]
    programs.answers = [LATE]
    assert message(lambda: slurm.submit("text")) == f"sbatch did not answer in 120 s; {PERHAPS}"


@pytest.mark.parametrize(("answer", "code"), [((0, "12\n", ""), 0), ((9, "12\n", ""), 9)])
def test_a_job_that_is_waited_for_gives_its_exit_code(programs, answer, code):
    programs.answers = [answer]
    assert slurm.submit_and_wait("text") == code
    assert programs.asked == [("sbatch --parsable --wait", None, "text")]


SITE_FILE = (
    "; GPUs and cores are asked for as the site file says: gpus, gres, cpus_per_process (docs/slurm.md)"
)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((1, " \n", "sbatch: error:\n  no\n"), "sbatch refused the job: sbatch: error: no"),
        ((1, "", "Socket timed out"), f"sbatch refused the job: Socket timed out; {PERHAPS}"),
        ((1, "", "Zero Bytes were transmitted"), "sbatch refused the job: Zero Bytes were transmitted; "
        f"{PERHAPS}"),
        ((1, "", "Invalid generic resource"), f"sbatch refused the job: Invalid generic resource{SITE_FILE}"),
        ((1, "", "x: node configuration is not available"),
         f"sbatch refused the job: x: node configuration is not available{SITE_FILE}"),
        ((1, "", "x" * 400), f"sbatch refused the job: {'x' * 300}"),
    ],
)
def test_why_a_job_was_refused(programs, answer, says):
    for submit in (slurm.submit, slurm.submit_and_wait):
        programs.answers = [answer]
        assert message(lambda submit=submit: submit("text")) == says


@pytest.mark.parametrize("said", ["x12", "12x", "12;", "12; x", "job 12", "-1"])
def test_what_is_no_job_number(programs, said):
    programs.answers = [(0, f"{said}\n", "")]
    assert message(lambda: slurm.submit("text")) == f"sbatch gave no job number but {said!r}; {PERHAPS}"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((0, "7|RUNNING|None\n 8|PENDING|a|b \n9|FAILED\n|x\n10|CANCELLED by 0|\n", ""),
         slurm.Queue({"7": "RUNNING", "8": "PENDING (a|b)", "10": "CANCELLED by 0"})),
        ((1, "", "slurm_load_jobs error: Invalid job id specified\n"), slurm.Queue()),
        ((1, "7|RUNNING|None", "no\n route"), slurm.Queue(silent="no route")),
        ((3, "", " \n"), slurm.Queue(silent="squeue ended with 3")),
        ((0, "7|RUNNING|None", "a warning"), slurm.Queue({"7": "RUNNING"})),
        (LATE, slurm.Queue(silent="squeue took more than 20 s")),
        (LaunchError("x"), slurm.Queue(silent="squeue is not installed here")),
    ],
)
def test_what_slurm_says_of_jobs(programs, answer, found):
    programs.answers = [answer]
    assert slurm.queue(["7_10", "7_2", "9", "10_1_x"]) == found
    question = "squeue --noheader --array --states=all --jobs=10,7,9 --format=%i|%T|%r"
    assert programs.asked == [(question, 20, None)]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((0, "", "anything"), None),
        ((1, "", "error: Invalid job id specified\nerror: Job/step already completing or completed\n"), None),
        ((1, "", "Invalid job id 7\nno\n route\n"), "scancel: no route; jobs may be running still: 7_1 8"),
        ((1, "", " \n"), "scancel: failed; jobs may be running still: 7_1 8"),
        (LATE, "scancel did not answer in 20 s; jobs may be running still: 7_1 8"),
    ],
)
def test_jobs_are_cancelled_or_it_is_an_error(programs, answer, says):
    programs.answers = [answer]
    if says:
        assert message(lambda: slurm.cancel(["7_1", "8"])) == says
    else:
        slurm.cancel(["7_1", "8"])
    slurm.cancel([])
    assert programs.asked == [("scancel 7_1 8", 20, None)]


def test_a_program_gets_the_text_and_is_heard_byte_by_byte(ascii_locale):
    done = slurm._ask(["sh", "-c", "cat; cat /proc/self/stat >&2; exit 3"], 20, "é\udcff\n")
    assert (done.returncode, done.stdout, done.args[0]) == (3, "é\udcff\n", "sh")
    group, session = map(int, done.stderr.rpartition(")")[2].split()[2:4])
    assert group == session != os.getsid(0)  # whoever ends the group ends what it started, and not us


def test_a_program_that_takes_too_long_is_ended():
    with pytest.raises(subprocess.TimeoutExpired):
        slurm._ask(["sleep", "3"], 0.1)


def test_a_program_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert message(lambda: slurm._ask(["sbatch"], 1)) == (
        "sbatch is not installed here: run this on a login node of the Slurm cluster, or use --dry-run"
    )


@pytest.mark.parametrize(
    ("name", "wrong"), [("SLURM_NNODES", "'SLURM_NNODES'"), ("SLURM_NODEID", "'SLURM_NODEID'"),
                        ("MASTER_ADDR", "'MASTER_ADDR'"), ("MASTER_PORT", "'MASTER_PORT'")],
)
def test_what_a_job_must_have_set(monkeypatch, name, wrong):
    for variable, value in (
        ("SLURM_NNODES", "2"), ("SLURM_NODEID", "1"), ("MASTER_ADDR", "n"), ("MASTER_PORT", "5")
    ):
        monkeypatch.setenv(variable, value)
    assert slurm.topology(3) == processes.Topology(3, nnodes=2, node_rank=1, master_addr="n", master_port=5)
    monkeypatch.delenv(name)
    assert message(
        lambda: slurm.topology(3)
    ) == f"not inside a job that hvtrain submitted: {wrong} is not set"


# --- scripts ------------------------------------------------------------------------------------------------

PLACES = "name nodes log grace max_restarts folder options setup environment srun command array".split()


@pytest.fixture
def template(monkeypatch, tmp_path):
    """Every value of a script, one a line or several."""
    (tmp_path / "job.sbatch").write_text(
        "".join(f"{place} = @{{{place}}}\n" for place in PLACES) + "# é\n", encoding="utf-8"
    )
    monkeypatch.setattr(slurm, "TEMPLATES", tmp_path)
    monkeypatch.setattr(slurm, "HVTRAIN", ("/a b/python", "main.py"))


def test_what_fills_a_script(template, ascii_locale):
    everything = Site(
        partition="p", account="a", qos="q", constraint="c", time="5:00", gres="gpu:x:{n}:{n}",
        cpus_per_process=3, mem="9G", options=("--exclusive", "-H"), grace_s=7, modules=("m/1 n", "o"),
        setup=("source x", "ulimit -l 1"), environment=("A=b c", "D=e f=g"), prefix="in x", command="hv -q",
    )
    resources = slurm.Resources(2, 4, "6:00", True, 5)
    job = slurm.BatchJob(
        "job", "n m", Path("/w x"), "l%j", ["train", "a b"], resources, "1,2%1", ["7", "8_1"]
    )
    assert slurm.render(job, everything) == (
        'name = "n m"\nnodes = 2\nlog = l%j\ngrace = 7\nmax_restarts = 5\nfolder = \'/w x\'\n'
        "options = #SBATCH --partition=p\n#SBATCH --account=a\n#SBATCH --qos=q\n#SBATCH "
        "--constraint=c\n#SBATCH --time=6:00\n#SBATCH --mem=9G\n#SBATCH --cpus-per-task=12\n#SBATCH "
        "--dependency=afterok:7:8_1\n#SBATCH --gres=gpu:x:4:4\n#SBATCH --exclusive\n#SBATCH -H\n"
        "setup = module load m/1 n\nmodule load o\nsource x\nulimit -l 1\nenvironment = export A='b "
        "c'\nexport D='e f=g'\nsrun = --cpus-per-task=12\ncommand = in x hv -q train 'a b'\narray = 1,2%1\n# "
        "é\n"
    )


def test_what_fills_a_script_where_nothing_was_said(template):
    job = slurm.BatchJob("job", "n", Path("/w"), "l", ["train"], slurm.Resources())
    empty = (
        "name = n\nnodes = 1\nlog = l\ngrace = 120\nmax_restarts = 3\nfolder = /w\noptions = {}\nsetup = "
        "\nenvironment = \nsrun = {}\ncommand = '/a b/python' main.py train\narray = \n# é\n"
    )
    assert slurm.render(job, Site(gpus=False, cpus_per_process=0)) == empty.format("", "")
    options = "#SBATCH --time=9\n#SBATCH --cpus-per-task=4\n#SBATCH --gpus-per-node=1"
    assert slurm.render(job, Site(time="9")) == empty.format(options, "--cpus-per-task=4")


def test_a_script_without_its_template_or_with_a_time_that_is_none(template, tmp_path):
    job = slurm.BatchJob("merge", "n", Path("/w"), "l", [], slurm.Resources())
    assert message(lambda: slurm.render(job, Site())) == (
        f"{tmp_path / 'merge.sbatch'} is missing: jobs are submitted from a checkout of the repository"
    )
    job = slurm.BatchJob("job", "n", Path("/w"), "l", [], slurm.Resources(time="soon"))
    with pytest.raises(ConfigError, match=re.escape("--time 'soon', expected minutes, H:M:S or D-H:M:S")):
        slurm.render(job, Site())
    (tmp_path / "job.sbatch").write_text("@{nothing}")
    with pytest.raises(KeyError, match="nothing"):  # a bug of ours, not an empty line
        slurm.render(slurm.BatchJob("job", "n", Path("/w"), "l", [], slurm.Resources()), Site())


def test_values_that_no_option_can_hold():
    assert message(lambda: slurm.quoted("--mem", "a\x7f")) == (
        "--mem 'a\\x7f': has a line break or control character, which no Slurm option can hold"
    )
    assert message(lambda: slurm.literal("/a\\b")) == (
        "/a\\b: a backslash in a log's path stops Slurm from filling in job numbers; choose another name"
    )
