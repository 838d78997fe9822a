"""Sliced runs on Slurm, without training: what is started, what is cancelled, what is noted inside a job."""

from __future__ import annotations

import os

import pytest

from launcher.jobs import backends, slices, slurm, standing
from tests.slurm.fake import DOWN, a_run, finish, hvtrain, options, stands, words


def stood(*parts: str, merge: str = "waiting") -> list[standing.Standing]:
    """From words; a `*` says that it is in the queue."""
    made = [(f"{i:02d}", word) for i, word in enumerate(parts, start=1)] + [("merge", merge)]
    return [standing.Standing(n, w.rstrip("*"), job=f"j-{n}" if w.endswith("*") else "") for n, w in made]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (stood("waiting", "waiting"), backends.Start((1, 2), True)),
        (stood("waiting", "waiting", merge="none"), backends.Start((1, 2), False)),
        (stood("done", "failed", "cancelled", "preempted"), backends.Start((2, 3, 4), True)),
        (stood("done", "done"), backends.Start((), True)),
        (stood("done", "done", merge="done"), backends.Start((), False)),
        (stood("done", "done", merge="failed"), backends.Start((), True)),
        (stood("done", "done", merge="none"), backends.Start((), False)),
        (stood("done", "done", merge="running*"), backends.Start((), False)),
        (stood("running*", "done", merge="queued*"), backends.Start((), False, ("j-01",))),
        (stood("running*", "failed", merge="queued*"), backends.Start((2,), True, ("j-01",), ("j-merge",))),
        (stood("queued*", "failed", merge="blocked*"), backends.Start((2,), True, ("j-01",), ("j-merge",))),
        (stood("queued*", "done", merge="cancelled"), backends.Start((), True, ("j-01",))),
        (stood("done", "done", merge="blocked*"), backends.Start((), True, (), ("j-merge",))),
        (
            stood("preempted*", "preempted", merge="queued*"),
            backends.Start((2,), True, ("j-01",), ("j-merge",))
        ),
        (stood("done", "failed", merge="done"), backends.Start((2,), True)),
    ],
)
def test_what_is_neither_done_nor_under_way_is_started(found, expected):
    assert backends.not_begun(found) == expected


def test_an_array_and_the_merge_after_it(fake, run, capsys):
    a_run(run, n=3, at_once=2, nproc=4, nodes=2, time="1:00:00", max_restarts=1)
    code, said = hvtrain(capsys, "retry", run)
    assert code == 0
    assert said == (
        "job 101: slices 1, 2, 3, 2 at a time\njob 102: merge, when all have finished\nhvtrain slices "
        f"status {run}\n"
    )
    array, merge = fake.scripts()
    asked = options(array)
    assert (asked["--array"], asked["--nodes"], asked["--time"], asked["--gpus-per-node"]) == (
        "1,2,3%2", "2", "1:00:00", "4"
    )
    assert (
        asked["--output"] == f"{run}/logs/%2a.log" and asked["--job-name"] == "run-slices"
        and '-lt 1 ]' in array
    )
    assert (
        options(merge)["--dependency"] == "afterok:101"
        and options(merge)["--output"] == f"{run}/logs/merge.log"
    )
    assert slices.load_state(run, "03").jobs == ["101_3"] and slices.load_state(run, "merge").jobs == ["102"]
    assert fake.asked("scancel") == []


def test_names_that_slurm_would_read_otherwise(fake, tmp_path, capsys):
    run = tmp_path / "50%j_%u my run"
    a_run(run, n=120)
    assert hvtrain(capsys, "retry", run)[0] == 0
    array, merge = map(options, fake.scripts())
    there = str(run).replace("%", "%%")
    assert (array["--job-name"], array["--output"]) == ('"50%j_%u my run-slices"', f'"{there}/logs/%3a.log"')
    assert merge["--output"] == f'"{there}/logs/merge.log"'


def test_a_retry_while_others_run_lets_the_merge_wait_for_all(fake, run, capsys):
    a_run(run, n=4)
    finish(run, "01", "84_1")
    stands(run, "02", "84_2")
    stands(run, "03", "84_3", code=2)
    stands(run, "04", "84_4", code=75)
    stands(run, "merge", "85", started=None)
    fake.says(
        "84_2|RUNNING|None", "84_3|FAILED|NonZeroExitCode", "84_4|PENDING|BeginTime",
        "85|PENDING|DependencyNeverSatisfied"
    )
    assert words(capsys, run)["merge"][0] == "blocked"
    code, said = hvtrain(capsys, "retry", run)
    assert code == 0 and "job 101: slices 3," in said
    array, merge = map(options, fake.scripts())
    assert array["--array"] == "3%1"
    # 4 has saved and is in the queue again: not started twice
    assert merge["--dependency"] == "afterok:84_2:84_4:101"
    assert fake.asked("scancel") == ["85"]
    assert (
        slices.load_state(run, "merge").jobs == ["85", "102"]
        and slices.load_state(run, "03").jobs == ["84_3", "101_3"]
    )


def test_a_merge_that_failed_alone_is_submitted_alone(fake, run, capsys):
    a_run(run, n=2)
    finish(run, "01", "84_1")
    finish(run, "02", "84_2")
    stands(run, "merge", "85", code=-9)
    assert words(capsys, run)["merge"] == ["failed", "exit code -9"]
    code, said = hvtrain(capsys, "retry", run)
    assert code == 0 and "job 101: merge, at once: all slices are done" in said
    [merge] = fake.scripts()
    assert "--dependency" not in options(merge) and "slices merge" in merge
    assert slices.load_state(run, "merge") == slices.JobState(["85", "101"])
    fake.says("101|PENDING|Priority")
    code, said = hvtrain(capsys, "retry", run)
    assert code == 0 and "nothing to start, the rest is under way" in said and len(fake.scripts()) == 1


@pytest.mark.parametrize("silence", ["fails", "hangs", "no squeue"])
def test_a_scheduler_that_does_not_answer_is_not_a_finished_job(fake, run, capsys, monkeypatch, silence):
    a_run(run, n=3)
    finish(run, "01", "84_1")
    stands(run, "02", "84_2")
    stands(run, "03", "84_3", started=None)
    stands(run, "merge", "85", started=None)
    fake.says("84_2|RUNNING|None", "84_3|PENDING|Resources", "85|PENDING|Dependency")
    monkeypatch.setattr(slurm, "ANSWER_S", 0.5)
    why = {
        "fails": DOWN, "hangs": "squeue took more than 0.5 s", "no squeue": "squeue is not installed here"
    }[silence]
    if silence == "fails":
        fake.fails("squeue")
    elif silence == "hangs":
        (fake.root / "slow").touch()
    else:
        (fake.root / "squeue").unlink()
        monkeypatch.setenv("PATH", str(fake.root))
    before = {path: path.read_text() for path in (run / "state").glob("*.json")}
    code, said = hvtrain(capsys, "status", run)
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert code == 1 and "done" in lines["01"]
    for name in ("02", "03", "merge"):
        assert lines[name].split()[1] == "unknown" and f"the scheduler does not answer: {why}" in lines[name]
    for verb in ("retry", "cancel"):
        code, said = hvtrain(capsys, verb, run)
        assert code == 2 and "nothing was done" in said and "02, 03, merge" in said
    assert not fake.scripts() and not fake.asked("scancel")
    assert {path: path.read_text() for path in (run / "state").glob("*.json")} == before


def test_status_after_a_cancel_tells_the_truth(fake, run, capsys):
    a_run(run, n=3)
    finish(run, "01", "84_1")
    stands(run, "02", "84_2")
    stands(run, "03", "84_3", started=None)
    stands(run, "merge", "85", started=None)
    fake.says("84_2|RUNNING|None", "84_3|PENDING|Resources", "85|PENDING|Dependency")
    assert hvtrain(capsys, "cancel", run) == (0, "cancelled: 02, 03, merge\n")
    assert fake.asked("scancel") == ["84_2 84_3 85"]
    fake.says("84_2|COMPLETING|None")  # it saves; the pending ones are gone without a trace
    stands(run, "02", "84_2", code=75)
    assert [words(capsys, run)[n][0] for n in ("01", "02", "03", "merge")] == [
        "done", "running", "cancelled", "cancelled"
    ]
    fake.says()
    found = words(capsys, run)
    assert [found[n][0] for n in ("02", "03", "merge")] == ["cancelled"] * 3
    assert found["02"][1:] == ["saved; `hvtrain slices retry` goes on"]
    assert hvtrain(capsys, "retry", run)[0] == 0
    fake.says("101_2|RUNNING|None", "101_3|PENDING|Resources", "102|PENDING|Dependency")
    assert [words(capsys, run)[n][0] for n in ("02", "03", "merge")] == ["running", "queued", "queued"]
    fake.says()
    assert words(capsys, run)["03"][0] == "failed"  # the new attempt was cancelled by nobody


def test_a_cancel_that_was_not_heard_is_no_cancel(fake, run, capsys):
    a_run(run, n=1)
    stands(run, "01", "84_1")
    fake.says("84_1|RUNNING|None")
    fake.fails("scancel", "scancel: error: Unable to contact slurm controller")
    code, said = hvtrain(capsys, "cancel", run)
    assert code == 2 and "running still: 84_1" in said
    fake.says()
    assert words(capsys, run)["01"][0] == "failed"


def test_a_run_is_started_by_one_at_a_time(fake, run, capsys):
    a_run(run, n=1)
    with slices.only_one(run):
        assert slices.starter(run) == f"{os.getpid()}:{slices.process_start(os.getpid())}"
        code, said = hvtrain(capsys, "retry", run)
        assert (
            code == 2 and f"being started already, by process {os.getpid()};" in said and not fake.scripts()
        )
    assert slices.starter(run) == ""
    (run / "state/lock").write_text("999999999:1")  # its holder was killed: the kernel took the lock back
    assert slices.starter(run) == "" and hvtrain(capsys, "retry", run)[0] == 0


# --- inside a job -------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """What processes.launch was called with; it ends with 75."""
    from launcher import processes

    calls = []
    monkeypatch.setattr(processes, "launch", lambda *given, **more: calls.append((given, more)) or 75)
    return calls


@pytest.mark.parametrize("node", [0, 1])
def test_a_slice_in_a_job_is_noted_by_node_0(run, launched, monkeypatch, node):
    plan = a_run(run, n=2, nproc=2, nodes=2, max_restarts=5)
    variables = {
        "SLURM_NNODES": 2, "SLURM_NODEID": node, "SLURM_ARRAY_JOB_ID": 84, "MASTER_ADDR": "n1",
        "MASTER_PORT": 20001
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert backends.run_one(run, plan, 2) == 75
    [((_, topology), more)] = launched
    # the script restarts all nodes together
    assert topology.node_rank == node and more == {"max_restarts": 0}
    state = slices.load_state(run, "02")
    assert (state.jobs, state.code) == ((["84_2"], 75) if node == 0 else ([], None))
