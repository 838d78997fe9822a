"""Sliced runs, without training: how each slice stands, what is started, what is cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvtrain import config
from hvtrain.configload import override
from hvtrain.errors import LaunchError
from launcher import backends, cli, slices, slurm, standing
from tests.slurm.fake import DOWN, Fake, a_run, finish, options, stands, weights


@dataclass(frozen=True)
class Values:
    text: str = ""
    number: int = 0
    switch: bool = False
    texts: tuple[str, ...] = ()
    perhaps: str | None = "x"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def hvtrain(capsys, *arguments) -> tuple[int, str]:
    code = cli.main(["slices", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out + said.err


def words(capsys, run: Path) -> dict[str, list[str]]:
    """Name -> word and note of `slices status`."""
    return {line.split()[0]: line.split(None, 2)[1:] for line in hvtrain(capsys, "status", run)[1].splitlines()}


# --- how it stands ----------------------------------------------------------------------------------------------------


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


def damage(path: Path, kind: str) -> None:
    sound = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": sound[:-1], "header": sound[:20], "longer": sound + b"x", "text": b"{" * 40}[kind])


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


def test_a_result_that_is_damaged_makes_room(run, capsys):
    plan = a_run(run, n=1)
    finish(run, "01", "7_1")
    path = run / "01/slice-01.safetensors"
    slices.set_damaged_aside(run, plan, 1)
    assert path.exists()
    damage(path, "cut")
    slices.set_damaged_aside(run, plan, 1)
    assert not path.exists() and path.with_name("slice-01.safetensors.damaged").exists()
    slices.set_damaged_aside(run, plan, 1)  # nothing there: nothing to do
    assert "is damaged" in capsys.readouterr().out


def test_a_state_that_cannot_be_read_is_not_a_slice_that_never_started(run, fake, capsys):
    a_run(run, n=1)
    (run / "state/01.json").write_text('{"jobs": ["7_1"')
    code, said = hvtrain(capsys, "retry", run)
    assert code == 2 and "state/01.json: cannot be read" in said and not fake.scripts()


# --- what a slice is told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["pa,rts", "pa[1]", "pa: x", "pa #x", "{a}", "'q\" \\", "é", "null", "*a", "12"])
def test_paths_reach_the_training_as_they_are(tmp_path, odd):
    """YAML reads the values of overrides; none of these is text to it."""
    run = tmp_path / odd
    plan = slices.Slices(f"/plans/{odd}", None, ("adapter.rank=2",), (f"{odd}/1", f"{odd}/2"), 2)
    cfg = config.load(config.TrainConfig, None, ["model.dit=x", *slices.train_arguments(run, plan, 2)[1:]])
    assert cfg.data.shards == (f"{odd}/2",) and cfg.adapter.plan == f"/plans/{odd}" and cfg.run.output_dir == f"{run}/02"
    assert (cfg.run.name, cfg.adapter.type, cfg.adapter.loraid) == ("slice-02", "loraid", 2)


def test_relative_paths_count_from_where_the_run_was_begun(tmp_path, monkeypatch, capsys):
    """`slices retry` from another directory: model.dit=dit.safetensors is still the same file."""
    begun, run, went = tmp_path / "begun", tmp_path / "run", []
    for folder in (begun, run, begun / "set"):
        folder.mkdir()
    (begun / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 1}))
    (begun / "set" / "manifest.json").write_text("{}")
    (begun / "dit.safetensors").touch()
    asked = ["slices", "run", "model.dit=dit.safetensors", "run.steps=3", "--plan", str(begun / "plan.json"), "--data", "set",
             "--output", str(run)]  # fmt: skip
    monkeypatch.setattr(backends, "run_here", lambda *a: went.append(os.getcwd()) or 0)
    monkeypatch.chdir(begun)
    assert cli.main(asked) == 0 and went == [str(begun)]
    os.chdir(tmp_path)
    assert cli.main(["slices", "retry", str(run)]) == 0 and went == [str(begun)] * 2
    assert f"relative paths count from {begun}" in capsys.readouterr().out
    os.chdir(tmp_path)
    begun.rename(tmp_path / "gone")
    assert cli.main(["slices", "retry", str(run)]) == 2 and f"{begun}: this run was begun there" in capsys.readouterr().err


def test_an_override_is_read_as_it_was_meant():
    for text in ("", "~", "a\nb", "1e-4", " x ", "x" * 300 + " y", "a=b", "yes"):
        assert config.load(Values, None, [override("text", text)]).text == text
    more = {"number": 3, "switch": True, "texts": ["a,b", "c: d", ""], "perhaps": None}
    found = config.load(Values, None, [override(k, v) for k, v in more.items()])
    assert found == Values("", 3, True, ("a,b", "c: d", ""), None)


def test_the_slice_s_own_keys_win_over_the_user_s():
    typed = ("adapter.loraid=7", "data.shards=[x]", "run.output_dir=z", "run.name=mine", "adapter.plan=y", "adapter.type=lora")
    plan = slices.Slices("/p.json", "base.yaml", typed, ("/a", "/b"), 2)
    arguments = slices.train_arguments(Path("/run"), plan, 2)
    assert arguments[:8] == ["train", "base.yaml", *typed]
    assert arguments[8:] == [
        "adapter.type=loraid", "adapter.plan=/p.json", "adapter.loraid=2", "adapter.blocks_per_loraid=null", "data.shards=[/b]",
        "run.output_dir=/run/02", "run.name=slice-02",
    ]


# --- what is started --------------------------------------------------------------------------------------------------


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
        (stood("preempted*", "preempted", merge="queued*"), backends.Start((2,), True, ("j-01",), ("j-merge",))),
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
        f"job 101: slices 1, 2, 3, 2 at a time\njob 102: merge, when all have finished\nhvtrain slices status {run}\n"
    )
    array, merge = fake.scripts()
    asked = options(array)
    assert (asked["--array"], asked["--nodes"], asked["--time"], asked["--gpus-per-node"]) == ("1,2,3%2", "2", "1:00:00", "4")
    assert asked["--output"] == f"{run}/logs/%2a.log" and asked["--job-name"] == "run-slices" and '-lt 1 ]' in array
    assert options(merge)["--dependency"] == "afterok:101" and options(merge)["--output"] == f"{run}/logs/merge.log"
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
    fake.says("84_2|RUNNING|None", "84_3|FAILED|NonZeroExitCode", "84_4|PENDING|BeginTime", "85|PENDING|DependencyNeverSatisfied")
    assert words(capsys, run)["merge"][0] == "blocked"
    code, said = hvtrain(capsys, "retry", run)
    assert code == 0 and "job 101: slices 3," in said
    array, merge = map(options, fake.scripts())
    assert array["--array"] == "3%1"
    assert merge["--dependency"] == "afterok:84_2:84_4:101"  # 4 has saved and is in the queue again: not started twice
    assert fake.asked("scancel") == ["85"]
    assert slices.load_state(run, "merge").jobs == ["85", "102"] and slices.load_state(run, "03").jobs == ["84_3", "101_3"]


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
    assert slices.load_state(run, "merge") == slices.State(["85", "101"])
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
    why = {"fails": DOWN, "hangs": "squeue took more than 0.5 s", "no squeue": "squeue is not installed here"}[silence]
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
    assert [words(capsys, run)[n][0] for n in ("01", "02", "03", "merge")] == ["done", "running", "cancelled", "cancelled"]
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
        assert code == 2 and f"being started already, by process {os.getpid()};" in said and not fake.scripts()
    assert slices.starter(run) == ""
    (run / "state/lock").write_text("999999999:1")  # its holder was killed: the kernel took the lock back
    assert slices.starter(run) == "" and hvtrain(capsys, "retry", run)[0] == 0


# --- this machine -----------------------------------------------------------------------------------------------------

SLICE = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from launcher import slices
from tests.slurm.fake import weights
run, verb, name = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
wish = json.loads((run / "wish.json").read_text()).get(name, "done")
with (run / "seen").open("a") as file:
    file.write(f"{{name}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}}\\n")
if wish == "waits":
    signal.signal(signal.SIGTERM, lambda *_: (slices.note_end(run, name, 75), os._exit(75)))
    (run / f"ready-{{name}}").touch()
    time.sleep(60)
code = 0 if wish == "done" else int(wish)
if code == 0:
    weights(run / "merge/merged.safetensors" if name == "merge" else run / name / f"slice-{{name}}.safetensors")
if name == "merge":
    slices.note_start(run, name, "1:1")
slices.note_end(run, name, code)
sys.exit(code)
"""


@pytest.fixture
def here(run, monkeypatch):
    """A local run whose slices only pretend; `wish`: name -> exit code, or "waits"."""
    root = str(Path(__file__).resolve().parents[2])

    def command(folder, verb, *rest):
        name = plan.name(int(rest[1])) if verb == "one" else "merge"
        return [sys.executable, "-c", SLICE.format(root=root), str(folder), verb, name]

    monkeypatch.setattr(backends, "command", command)
    monkeypatch.setattr(backends, "POLL_S", 0.02)
    plan = None

    def make(wish: dict | None = None, **more):
        nonlocal plan
        plan = a_run(run, backend="local", **more)
        (run / "wish.json").write_text(json.dumps(wish or {}))
        return plan

    return make


def seen(run: Path) -> list[str]:
    return (run / "seen").read_text().splitlines()


def test_each_slice_gets_as_many_gpus_as_it_has_processes(here, run, capsys):
    here(n=4, nproc=2, at_once=2, gpus=("0", "1", "5", "7"))
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert sorted(line.split()[0] for line in seen(run)[:-1]) == ["01", "02", "03", "04"] and seen(run)[-1].startswith("merge ")
    assert {line.split()[1] for line in seen(run)[:2]} == {"0,1", "5,7"}
    assert {line.split()[1] for line in seen(run)[2:4]} <= {"0,1", "5,7"}
    assert hvtrain(capsys, "retry", run) == (0, f"{run}: nothing to start, all slices are done and merged\n")


def test_one_failure_keeps_the_merge_back_and_only_it_is_tried_again(here, run, capsys):
    here({"02": "2"}, n=3)
    code, said = hvtrain(capsys, "retry", run)
    assert code == 1 and "slice 2: failed (exit code 2)" in said and "2 of 3 slices are done" in said
    assert [line.split()[0] for line in seen(run)] == ["01", "02", "03"]
    (run / "wish.json").write_text('{"merge": "1"}')
    assert hvtrain(capsys, "retry", run)[0] == 1
    (run / "wish.json").write_text("{}")
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert [line.split()[0] for line in seen(run)[3:]] == ["02", "merge", "merge"]


def in_another_process(run: Path, here_command) -> subprocess.Popen:
    """`slices retry` as a program of its own, with the pretending slices."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "from launcher import backends, cli\n"
        f"backends.POLL_S = 0.02\nbackends.command = lambda folder, verb, *rest: [sys.executable, '-c', {here_command[2]!r}, "
        "str(folder), verb, f'{int(rest[1]):02d}' if verb == 'one' else 'merge']\n"
        "sys.exit(cli.main(['slices', 'retry', sys.argv[1]]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)


def until(there, seconds=20):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_cancelling_ends_what_runs_and_starts_no_more(here, run, capsys):
    here({"01": "waits"}, n=3)
    process = in_another_process(run, backends.command(run, "one", run, 1))
    until((run / "ready-01").exists)
    code, said = hvtrain(capsys, "retry", run)
    assert code == 2 and f"by process {process.pid};" in said
    assert hvtrain(capsys, "cancel", run) == (0, "cancelled: 01, 02, 03, merge\n")
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and said.splitlines()[:2] == ["slice 1: started", "slice 1: stopped, saved"]
    assert "slice 2" not in said and [line.split()[0] for line in seen(run)] == ["01"]
    found = words(capsys, run)
    assert [found[n][0] for n in ("01", "02", "03", "merge")] == ["cancelled"] * 4
    assert hvtrain(capsys, "cancel", run) == (0, "nothing was queued or running\n")
    (run / "wish.json").write_text("{}")
    assert hvtrain(capsys, "retry", run)[0] == 0
    assert [words(capsys, run)[n][0] for n in ("01", "02", "03", "merge")] == ["done"] * 4


def test_cancelling_reaches_slices_whose_starter_was_killed_and_the_merge(here, run, capsys):
    here({"01": "waits"}, n=1)
    process = in_another_process(run, backends.command(run, "one", run, 1))
    until((run / "ready-01").exists)
    process.kill()
    process.wait()
    code, said = hvtrain(capsys, "retry", run)
    assert code == 2 and "its slices are running already" in said
    assert hvtrain(capsys, "cancel", run) == (0, "cancelled: 01\n")
    until(lambda: words(capsys, run)["01"][0] == "cancelled")


def test_a_stop_during_the_merge_ends_the_merge(here, run):
    here({"merge": "waits"}, n=1)
    process = in_another_process(run, backends.command(run, "one", run, 1))
    until((run / "ready-merge").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_cancelling_ends_nobody_else(run, capsys):
    """The number of a slice that is gone belongs to another process now."""
    a_run(run, n=3, backend="local")
    innocent = subprocess.Popen(["sleep", "60"])
    try:
        stands(run, "01", f"{innocent.pid}:1", code=75)
        stands(run, "02", f"{innocent.pid}:1")
        stands(run, "03", "999999999:5", code=75)
        assert hvtrain(capsys, "cancel", run) == (0, "nothing was queued or running\n")
        backends._ask_to_end(f"{innocent.pid}:1")
        time.sleep(0.2)
        assert innocent.poll() is None
        backends._ask_to_end(f"{innocent.pid}:{slices.process_start(innocent.pid)}")
        assert innocent.wait(20) == -signal.SIGTERM
    finally:
        innocent.kill()
        innocent.wait()


@pytest.mark.parametrize(("error", "says"), [(ProcessLookupError(), None), (PermissionError(), "belongs to another user")])
def test_a_process_that_cannot_be_asked(monkeypatch, error, says):
    def kill(pid, number):
        raise error

    monkeypatch.setattr(os, "kill", kill)
    me = f"{os.getpid()}:{slices.process_start(os.getpid())}"
    if says:
        with pytest.raises(LaunchError, match=says):
            backends._ask_to_end(me)
    else:
        backends._ask_to_end(me)


# --- inside a job -----------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """What local.launch was called with; it ends with 75."""
    from launcher import local

    calls = []
    monkeypatch.setattr(local, "launch", lambda *given, **more: calls.append((given, more)) or 75)
    return calls


def test_a_slice_here_restarts_its_own_processes(run, launched):
    plan = a_run(run, n=2, backend="local", nproc=2, max_restarts=5)
    assert backends.run_one(run, plan, 2) == 75
    [((arguments, topology), more)] = launched
    assert arguments == slices.train_arguments(run, plan, 2) and topology.nproc == 2 and more == {"max_restarts": 5}
    state = slices.load_state(run, "02")
    assert state.jobs == [f"{os.getpid()}:{slices.process_start(os.getpid())}"]
    assert state.code == 75 and state.ended >= state.started


@pytest.mark.parametrize("node", [0, 1])
def test_a_slice_in_a_job_is_noted_by_node_0(run, launched, monkeypatch, node):
    plan = a_run(run, n=2, nproc=2, nodes=2, max_restarts=5)
    variables = {"SLURM_NNODES": 2, "SLURM_NODEID": node, "SLURM_ARRAY_JOB_ID": 84, "MASTER_ADDR": "n1", "MASTER_PORT": 20001}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert backends.run_one(run, plan, 2) == 75
    [((_, topology), more)] = launched
    assert topology.node_rank == node and more == {"max_restarts": 0}  # the script restarts all nodes together
    state = slices.load_state(run, "02")
    assert (state.jobs, state.code) == ((["84_2"], 75) if node == 0 else ([], None))


def test_the_merge_is_noted(run, monkeypatch):
    plan = a_run(run, n=1)
    seen = []
    monkeypatch.setattr(cli, "main", lambda arguments: seen.append(arguments) or 3)
    monkeypatch.setenv("SLURM_JOB_ID", "85")
    assert backends.run_merge(run, plan) == 3
    assert seen == [["merge", *plan.merge]] and slices.load_state(run, "merge").code == 3
    assert slices.load_state(run, "merge").jobs == ["85"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "more", "says"),
    [
        ("a\ntouch pwned\n#", [], "line break"), ("run", ["--time", "1\ntouch pwned"], "--time"), ("a\\b", [], "backslash"),
        ("run", ["--max-restarts", "-1"], "expected 0 or more"), ("run", ["--site", "gone.yaml"], "gone.yaml"),
    ],
)
def test_what_cannot_be_a_job_is_refused_before_anything_is_written(fake, tmp_path, capsys, monkeypatch, output, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 2}))
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
    given = ["model.dit=tiny:dit.safetensors", "run.steps=1", "--plan", "plan.json", "--data", "parts", "--backend", "slurm"]
    code, said = hvtrain(capsys, "run", *given, "--output", output, *more)
    assert code == 2 and says in said, said
    assert not fake.scripts() and not (tmp_path / output).exists() and not (tmp_path / "pwned").exists()
    assert hvtrain(capsys, "run", *given, "--output", "a b", "--site", site(tmp_path))[0] == 0
    found = slices.load_slices(tmp_path / "a b")
    assert (found.site, found.max_restarts, found.at_once) == (str(tmp_path / "site.yaml"), 3, 1)
    assert slices.load_state(tmp_path / "a b", "02").jobs == ["101_2"] and options(fake.scripts()[0])["--partition"] == "p"


def site(folder: Path) -> str:
    (folder / "site.yaml").write_text("partition: p\n")
    return "site.yaml"
