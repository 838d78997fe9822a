"""How each job of a sliced run stands: words, notes, the merge."""

from __future__ import annotations

import os

import pytest

from launcher import slices, slurm, standing
from tests.slurm.fake import a_run, damage, finish, stands, weights

AGAIN = "`hvtrain slices retry` makes it again"


@pytest.mark.parametrize(
    ("state", "said", "word", "note"),
    [
        ({}, "", "waiting", ""),
        ({"jobs": ["7_1"]}, "PENDING (Priority)", "queued", "job 7_1 PENDING (Priority)"),
        ({"jobs": ["7_1"], "started": 1.0}, "RUNNING", "running", "job 7_1"),
        ({"jobs": ["7_1"], "started": 1.0}, "SIGNALING", "running", "job 7_1"),  # a word we do not know is no end
        ({"jobs": ["7_1"], "code": 75}, "PENDING (BeginTime)", "preempted", "job 7_1 PENDING (BeginTime)"),
        ({"jobs": ["7_1"], "code": 75}, "SUSPENDED", "preempted", "job 7_1 SUSPENDED"),
        ({"jobs": ["7_1"], "code": 75}, "FAILED", "preempted", "saved; `hvtrain slices retry` goes on"),
        ({"jobs": ["7_1"], "started": 1.0}, "CANCELLED", "cancelled", ""),
        ({"jobs": ["7_1"], "code": 2}, "FAILED", "failed", "exit code 2"),
        ({"jobs": ["7_1"], "started": 1.0}, "NODE_FAIL", "failed", "job 7_1: Slurm says NODE_FAIL"),
        ({"jobs": ["7_1"], "started": 1.0}, "", "failed", "job 7_1: ended without a word: killed, or its node died"),
        ({"jobs": ["7_1"]}, "", "failed", "job 7_1: gone from the queue before it began; cancelled by hand?"),
        ({"jobs": ["7_1"], "code": 0}, "COMPLETED", "failed", f"slice-01.safetensors is missing; {AGAIN}"),
        ({"jobs": ["6_1", "7_1"]}, "RUNNING", "running", "job 7_1"),  # the newest attempt counts
        ({"jobs": ["9999999:1"], "started": 1.0}, "", "failed", "job 9999999:1: ended without a word: killed, or its node died"),
    ],
)
def test_words_for_every_state(run, state, said, word, note):
    plan = a_run(run, n=1)
    slices.save_state(run, "01", slices.State(**state))
    states = {"6_1": "FAILED", **({"7_1": said} if said else {})}
    found = standing.standing(run, plan, 1, slurm.Queue(states))
    assert (found.word, found.note) == (word, note)
    assert found.job == ("7_1" if said and said.split()[0] not in ("FAILED", "CANCELLED", "NODE_FAIL", "COMPLETED") else "")


def test_the_last_error_is_shown(run):
    plan = a_run(run, n=1)
    stands(run, "01", "7_1", code=2)
    (run / "logs/01.log").write_text("loading\nerror: x is wrong; mend it\nsrun: done\n")
    assert standing.standing(run, plan, 1, slurm.Queue()).note == "error: x is wrong; mend it"


@pytest.mark.parametrize(("code", "word"), [(None, "unknown"), (75, "unknown"), (137, "unknown"), (2, "failed"), (0, "failed")])
def test_a_silent_scheduler_leaves_a_job_unknown_unless_it_said_that_it_is_over(run, code, word):
    plan = a_run(run, n=1)
    stands(run, "01", "7_1", code=code)
    found = standing.standing(run, plan, 1, slurm.Queue(silent="no route"))
    assert found.word == word and (word != "unknown" or found.note == "the scheduler does not answer: no route")


def test_a_process_counts_by_its_number_and_its_start(run):
    plan, me = a_run(run, n=1, backend="local"), os.getpid()
    stands(run, "01", f"{me}:{slices.process_start(me)}")
    assert standing.standing(run, plan, 1, slurm.Queue()).word == "running"
    stands(run, "01", f"{me}:1")
    assert standing.standing(run, plan, 1, slurm.Queue()).word == "failed"


def test_pending_tasks_that_slurm_dropped_are_cancelled(run):
    """All of an array's pending tasks cancelled together: Slurm tells of them by the array's number."""
    plan = a_run(run, n=2)
    stands(run, "01", "7_1", started=None)
    stands(run, "02", "7_2", started=1.0)
    queue = slurm.Queue({"7": "CANCELLED"})
    assert [standing.standing(run, plan, i, queue).word for i in (1, 2)] == ["cancelled", "failed"]



@pytest.mark.parametrize("kind", ["empty", "cut", "header", "longer", "text"])
def test_a_damaged_result_is_not_done(run, kind):
    plan = a_run(run, n=1)
    finish(run, "01", "7_1")
    assert standing.standing(run, plan, 1, slurm.Queue()).word == "done"
    damage(run / "01/slice-01.safetensors", kind)
    found = standing.standing(run, plan, 1, slurm.Queue())
    assert found.word == "failed" and "slice-01.safetensors is damaged" in found.note and "retry" in found.note


def test_a_merge_is_done_when_its_output_is_there_and_whole(run):
    plan = a_run(run, n=1)
    stands(run, "merge", "8", code=0)
    merged = run / "merge/merged.safetensors"
    found = standing.merge_standing(run, plan, slurm.Queue())
    assert (found.word, found.note) == ("failed", f"merged.safetensors is missing; {AGAIN}")
    weights(merged)
    found = standing.merge_standing(run, plan, slurm.Queue())
    assert (found.word, found.note) == ("done", str(merged))
    damage(merged, "cut")
    assert standing.merge_standing(run, plan, slurm.Queue()).word == "failed"
    assert standing.merge_standing(run, a_run(run, n=1, merge=False), slurm.Queue()).word == "none"
