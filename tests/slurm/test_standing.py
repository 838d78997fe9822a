"""How each job of a sliced run stands: words, notes, the merge."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.jobs import slices, slurm, standing
from tests.slurm.fake import a_run, damage, finish, stands, weights

AGAIN = "`hvtrain slices retry` makes it again"


@pytest.mark.parametrize(
    ("state", "said", "word", "note"),
    [
        ({}, "", "waiting", ""),
        ({"jobs": ["7_1"]}, "PENDING (Priority)", "queued", "job 7_1 PENDING (Priority)"),
        ({"jobs": ["7_1"], "started": 1.0}, "RUNNING", "running", "job 7_1"),
        # a word we do not know is no end
        ({"jobs": ["7_1"], "started": 1.0}, "SIGNALING", "running", "job 7_1"),
        ({"jobs": ["7_1"], "code": 75}, "PENDING (BeginTime)", "preempted", "job 7_1 PENDING (BeginTime)"),
        ({"jobs": ["7_1"], "code": 75}, "SUSPENDED", "preempted", "job 7_1 SUSPENDED"),
        ({"jobs": ["7_1"], "code": 75}, "FAILED", "preempted", "saved; `hvtrain slices retry` goes on"),
        ({"jobs": ["7_1"], "started": 1.0}, "CANCELLED", "cancelled", ""),
        ({"jobs": ["7_1"], "code": 2}, "FAILED", "failed", "exit code 2"),
        ({"jobs": ["7_1"], "started": 1.0}, "NODE_FAIL", "failed", "job 7_1: Slurm says NODE_FAIL"),
        ({"jobs": ["7_1"], "started": 1.0}, "", "failed", "job 7_1: ended without a word: killed, or its "
        "node died"),
        ({"jobs": ["7_1"]}, "", "failed", "job 7_1: gone from the queue before it began; cancelled by hand?"),
        ({"jobs": ["7_1"], "code": 0}, "COMPLETED", "failed", f"slice-01.safetensors is missing; {AGAIN}"),
        ({"jobs": ["6_1", "7_1"]}, "RUNNING", "running", "job 7_1"),  # the newest attempt counts
        ({"jobs": ["9999999:1"], "started": 1.0}, "", "failed", "job 9999999:1: ended without a word: "
        "killed, or its node died"),
    ],
)
def test_words_for_every_state(run, state, said, word, note):
    plan = a_run(run, n=1)
    slices.save_state(run, "01", slices.JobState(**state))
    states = {"6_1": "FAILED", **({"7_1": said} if said else {})}
    found = standing.standing(run, plan, 1, slurm.Queue(states))
    assert (found.word, found.note) == (word, note)
    assert found.job == (
        "7_1" if said and said.split()[0] not in ("FAILED", "CANCELLED", "NODE_FAIL", "COMPLETED") else ""
    )


def test_the_last_error_is_shown(run):
    plan = a_run(run, n=1)
    stands(run, "01", "7_1", code=2)
    (run / "logs/01.log").write_text("loading\nerror: x is wrong; mend it\nsrun: done\n")
    assert standing.standing(run, plan, 1, slurm.Queue()).note == "error: x is wrong; mend it"


@pytest.mark.parametrize(
    ("code", "word"), [(None, "unknown"), (75, "unknown"), (137, "unknown"), (2, "failed"), (0, "failed")]
)
def test_a_silent_scheduler_leaves_a_job_unknown_unless_it_said_that_it_is_over(run, code, word):
    plan = a_run(run, n=1)
    stands(run, "01", "7_1", code=code)
    found = standing.standing(run, plan, 1, slurm.Queue(silent="no route"))
    assert (
        found.word == word and (word != "unknown" or found.note == "the scheduler does not answer: no route")
    )


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
    assert (
        found.word == "failed" and "slice-01.safetensors is damaged" in found.note and "retry" in found.note
    )


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


def line(step: int, loss: float, **more: float) -> str:
    return json.dumps({"step": step, "train/loss": loss, **more}) + "\n"


def trained(run: Path, metrics: str, config: str = "run: {steps: 100}\n") -> None:
    (run / "01").mkdir(parents=True, exist_ok=True)
    (run / "01/metrics.jsonl").write_text(metrics)
    (run / "01/config.yaml").write_text(config, encoding="utf-8")


PACE = {"speed/slowest_rank_s": 3.0}


@pytest.mark.parametrize(
    ("metrics", "config", "step", "steps", "loss", "eta_s"),
    [
        (line(3, 0.5, **PACE) + line(4, 0.25, **PACE), "run: {steps: 100}", 4, 100, 0.25, 288.0),
        (
            line(4, 0.25, **PACE) + '{"step": 5, "eval/loss": 1}\n{"step": 6, "tr', "run: {steps: 100}", 4,
            100, 0.25, 288.0
        ),
        ('{"step": 4, "train/l\n' + line(5, 0.5, **PACE), "run: {steps: 10}", 5, 10, 0.5, 15.0),
        (line(4, 0.25), "run: {steps: 100}", 4, 100, 0.25, None),
        ("", "run: {steps: 100}", 0, 100, None, None),
        (line(4, 0.25, **PACE), "", 4, 0, 0.25, None),
        (line(4, 0.25, **PACE), "run: {steps: 10, name: é}", 4, 10, 0.25, 18.0),
        (line(4, 0.25, **PACE), "run: {steps: null}", 4, 0, 0.25, None),
        (line(4, 0.25, **PACE), "other: 1", 4, 0, 0.25, None),
        (line(4, 0.25, **PACE), "run: {steps: soon}", 4, 0, 0.25, None),
        (line(4, 0.25, **PACE), "run: {steps", 4, 0, 0.25, None),
    ],
)
def test_how_far_a_slice_is(run, ascii_locale, metrics, config, step, steps, loss, eta_s):
    plan = a_run(run, n=1)
    stands(run, "01", "7_1")
    trained(run, metrics, config)
    found = standing.standing(run, plan, 1, slurm.Queue({"7_1": "RUNNING"}))
    assert found == standing.Standing("01", "running", step, steps, loss, eta_s, "job 7_1", "7_1")
    stands(run, "01", "7_1", code=75)
    found = standing.standing(run, plan, 1, slurm.Queue())
    assert found == standing.Standing(
        "01", "preempted", step, steps, loss, None, "saved; `hvtrain slices retry` goes on"
    )


def test_only_the_last_lines_of_the_metrics_are_read(run):
    plan = a_run(run, n=1)
    for others, found in ((49, (7, 0.5)), (50, (0, None))):
        trained(run, line(7, 0.5) + '{"step": 8}\n' * others)
        got = standing.standing(run, plan, 1, slurm.Queue())
        assert (got.word, got.step, got.loss) == ("waiting", *found)
    (run / "01/metrics.jsonl").unlink()
    (run / "01/config.yaml").unlink()
    assert standing.standing(run, plan, 1, slurm.Queue()) == standing.Standing("01", "waiting")


@pytest.mark.parametrize(
    ("code", "config", "found"),
    [
        (0, "run: {steps: 100}", ("done", 100, 100, 0.25)),
        (None, "run: {steps: 100}", ("done", 100, 100, 0.25)), (0, "", ("done", 4, 0, 0.25)),
        (1, "run: {steps: 100}", ("failed", 4, 100, 0.25)),
    ],
)
def test_a_slice_with_a_sound_result_is_done_unless_its_end_was_bad(run, code, config, found):
    plan = a_run(run, n=1)
    finish(run, "01", "7_1")
    stands(run, "01", "7_1", code=code)
    trained(run, line(4, 0.25), config)
    got = standing.standing(run, plan, 1, slurm.Queue())
    assert got == standing.Standing("01", *found, note="exit code 1" if code else "")


@pytest.mark.parametrize(
    ("state", "queue", "word", "note", "job"),
    [
        ({}, {}, "waiting", "", ""), ({"jobs": ["8"]}, {"8": "RUNNING"}, "running", "job 8", "8"),
        ({"jobs": ["8"]}, {"8": "PENDING (Dependency)"}, "queued", "job 8 PENDING (Dependency)", "8"),
        ({"jobs": ["8"]}, {"8": "PENDING (DependencyNeverSatisfied)"}, "blocked",
         "job 8 waits for jobs that failed; `hvtrain slices retry`", "8"),
        ({"jobs": ["8"], "code": 1}, {}, "failed", "error: of the merge", ""),
        ({"jobs": ["8"], "code": 0}, {}, "failed", f"merged.safetensors is missing; {AGAIN}", ""),
    ],
)
def test_words_for_the_merge(run, state, queue, word, note, job):
    plan = a_run(run, n=1)
    slices.save_state(run, "merge", slices.JobState(**state))
    (run / "logs/merge.log").write_text("error: of the merge\n")
    assert standing.merge_standing(run, plan, slurm.Queue(queue)) == standing.Standing(
        "merge", word, note=note, job=job
    )
    none = standing.merge_standing(run, a_run(run, n=1, merge=False), slurm.Queue(queue))
    assert none == standing.Standing("merge", "none", note="not asked for")


def test_a_merge_that_is_not_over_is_not_done_whatever_lies_there(run):
    plan = a_run(run, n=1)
    weights(run / "merge/merged.safetensors")
    for code, word in ((None, "failed"), (1, "failed"), (0, "done")):
        stands(run, "merge", "8", code=code)
        found = standing.merge_standing(run, plan, slurm.Queue())
        assert (found.name, found.word) == ("merge", word)


def test_a_mark_of_an_attempt_that_was_cancelled(run):
    plan = a_run(run, n=1)
    for marks, jobs, word in (
        ({"01": "7_1"}, ["7_1"], "cancelled"), ({"01": "6_1"}, ["6_1", "7_1"], "failed"),
        ({"01": ""}, [], "cancelled"), ({"02": ""}, [], "waiting"),
    ):
        slices.save_state(run, "01", slices.JobState(jobs, 1.0))
        slices._write(run / "state/cancelled.json", marks)
        assert standing.standing(run, plan, 1, slurm.Queue()).word == word


def test_what_slurm_says_of_an_array_is_not_of_a_task_that_had_begun(run):
    plan = a_run(run, n=1)
    for started, states, word in (
        (None, {"7": "CANCELLED", "7_1": "RUNNING"}, "running"), (None, {"7_2": "RUNNING"}, "failed"),
        (None, {"7": "CANCELLED"}, "cancelled"), (1.0, {"7": "CANCELLED"}, "failed"),
    ):
        stands(run, "01", "7_1", started=started)
        assert standing.standing(run, plan, 1, slurm.Queue(states)).word == word


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nerror: first\nerror: last \n\nsrun: done\n", "error: last"),
        ("ValueError: x\nmore\n", "ValueError: x"), ("the error: no\n  so it was \n\n", "so it was"),
        ("error: " + "x" * 400, "error: " + "x" * 293), ("\n \n", ""), (None, ""),
        ("error: caf\xe9\n", "error: caf\ufffd"),
    ],
)
def test_the_line_of_a_log_that_says_what_went_wrong(tmp_path, text, said):
    if text is not None:
        (tmp_path / "log").write_bytes(text.encode("latin-1"))
    assert standing.last_error(tmp_path / "log") == said


def test_what_status_prints():
    rows = [
        standing.Standing("01", "running", 12, 100, 0.123456, 119.6, "job 7_1", "7_1"),
        standing.Standing("02", "done", 7, 0, 1.0), standing.Standing("merge", "waiting"),
        standing.Standing("03", "failed", note="exit code 2"), standing.Standing("04", "queued", 0, 9),
        *(standing.Standing("05", "running", eta_s=s) for s in (0.0, 119.4, 120.0, 7199.0, 7200.0, 3.6e6)),
    ]
    assert standing.table(rows) == [
        "01    running    12/100        loss 0.1235  120 s left    job 7_1",
        "02    done       7             loss 1.0000",
        "merge waiting",
        "03    failed                                              exit code 2",
        "04    queued     0/9",
        *(
            f"05    {'running':<38}{left} left"
            for left in ("0 s", "119 s", "2 min", "120 min", "2.0 h", "1000.0 h")
        ),
    ]
