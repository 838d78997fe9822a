"""`slices run --waves`: who is in which, what each waits for, and how they stand, without training."""

from __future__ import annotations

import json
import signal

import pytest

from hvtrain import config
from launcher.jobs import backends, slices, waves
from tests.slurm.fake import a_run, damage, finish, hvtrain, options, stands, weights, words

N = 5


def waved(run, **more):
    """Five slices in waves of three and two, which nobody has begun."""
    plan = a_run(run, n=N, waves=2, **more)
    merge = (
        "--dit", "d", *waves.loras(run, plan, 2), "--as", "model", "--output",
        f"{run}/merge/merged.safetensors", "--reconcile", "fit", "--keep", "/k"
    )  # fmt: skip
    plan = slices.replace(plan, merge=merge)
    slices.save_slices(run, plan)
    return plan


def test_a_wave_is_a_range_of_slices_and_all_are_in_one():
    for n, n_waves, sizes in ((5, 2, [3, 2]), (6, 3, [2, 2, 2]), (7, 3, [3, 2, 2]), (4, 1, [4])):
        plan = slices.Slices("", None, (), ("d",) * n, n, waves=n_waves)
        found = [waves.members(plan, w) for w in waves.every(plan)]
        assert (
            [len(own) for own in found] == sizes
            and [i for own in found for i in own] == list(range(1, n + 1))
        )
        assert [waves.wave_of(plan, i) for i in range(1, n + 1)] == [
            w for w, k in enumerate(sizes, start=1) for _ in range(k)
        ]


def test_each_merge_takes_the_one_before_it_and_its_own_slices(run):
    plan = waved(run)
    assert waves.merge_arguments(run, plan, 1) == (
        "--dit", "d", "--reconcile", "fit", "--keep", "/k", "--lora", f"{run}/01", "--lora", f"{run}/02",
        "--lora", f"{run}/03", "--as", "lora", "--output", f"{run}/merge/wave-1.safetensors",
    )
    assert waves.merge_arguments(run, plan, 2) == plan.merge
    under = f"{run}/merge/wave-1.safetensors"
    assert waves.loras(run, plan, 2) == ["--lora", under, "--lora", f"{run}/04", "--lora", f"{run}/05"]


def test_a_later_wave_is_trained_on_top_of_the_merge(run):
    plan = waved(run)
    for loraid, under in ((3, ()), (4, (f"{run}/merge/wave-1.safetensors",))):
        cfg = config.load(config.TrainConfig, None, slices.train_arguments(run, plan, loraid)[1:])
        assert tuple(one.path for one in cfg.adapter.base_lora) == under


def test_jobs_of_a_wave_wait_for_the_merge_before_it(fake, run, capsys):
    waved(run)
    assert hvtrain(capsys, "retry", run)[1].splitlines()[:4] == [
        "job 101: slices 1, 2, 3, 1 at a time", "job 102: merge-1, when all have finished",
        "job 103: slices 4, 5, 1 at a time", "job 104: merge, when all have finished",
    ]
    asked = [options(script) for script in fake.scripts()]
    assert [found.get("--dependency") for found in asked] == [
        None, "afterok:101", "afterok:102", "afterok:102:103"
    ]
    assert [found.get("--array") for found in asked] == ["1,2,3%1", None, "4,5%1", None]
    assert f"slices merge {run} --wave 1" in fake.scripts()[1] and "--wave" not in fake.scripts()[3]
    assert (
        slices.load_state(run, "05").jobs == ["103_5"] and slices.load_state(run, "merge-1").jobs == ["102"]
    )
    fake.says(
        "101_1|RUNNING|None", "102|PENDING|Dependency", "103_4|PENDING|Dependency", "103_5|PENDING|Dependency"
    )
    assert [
        words(capsys, run)[name][0] for name in ("01", "04", "merge-1")
    ] == ["running", "queued", "queued"]


def test_what_waited_for_a_job_that_failed_is_started_again(fake, run, capsys):
    """Slice 2 failed, so merge-1 never comes, and what waits for it, queued still, would wait for ever."""
    waved(run)
    hvtrain(capsys, "retry", run)
    for i in (1, 3):
        finish(run, f"0{i}", f"101_{i}")
    stands(run, "02", "101_2", code=2)
    fake.says(
        "102|PENDING|DependencyNeverSatisfied",
        *(f"{job}|PENDING|Dependency" for job in ("103_4", "103_5", "104"))
    )
    said = hvtrain(capsys, "retry", run)[1]
    assert "job 105: slices 2" in said and "job 107: slices 4, 5" in said
    asked = [options(script).get("--dependency") for script in fake.scripts()[4:]]
    assert asked == [None, "afterok:105", "afterok:106", "afterok:106:107"]
    assert sorted(" ".join(fake.asked("scancel")).split()) == ["102", "103_4", "103_5", "104"]


def test_only_the_last_wave_is_left(fake, run, capsys):
    waved(run)
    for i in (1, 2, 3):
        finish(run, f"0{i}", f"7_{i}")
    weights(run / "merge/wave-1.safetensors")
    stands(run, "merge-1", "8", code=0)
    finish(run, "04", "9_4")
    said = hvtrain(capsys, "retry", run)[1].splitlines()
    assert said[:2] == ["job 101: slices 5, 1 at a time", "job 102: merge, when all have finished"]
    assert [options(script).get("--dependency") for script in fake.scripts()] == [None, "afterok:101"]
    damage(run / "merge/wave-1.safetensors", "cut")
    fake.says("101_5|PENDING|Dependency", "102|PENDING|Dependency")
    assert [words(capsys, run)[n][0] for n in ("03", "merge-1", "05")] == ["done", "failed", "queued"]


def test_a_merge_under_way_is_waited_for(fake, run, capsys):
    waved(run)
    for i in (1, 2, 3):
        finish(run, f"0{i}", f"7_{i}")
    stands(run, "merge-1", "8")
    fake.says("8|RUNNING|None")
    hvtrain(capsys, "retry", run)
    assert [
        options(script).get("--dependency") for script in fake.scripts()
    ] == ["afterok:8", "afterok:8:101"]


def test_runs_without_waves_look_as_before(run, tmp_path):
    slices.save_slices(run, plan := a_run(run, n=2))
    assert "waves" not in json.loads((run / slices.FILE).read_text())
    slices.save_slices(tmp_path / "w", plan := slices.replace(plan, waves=2))
    assert slices.load_slices(tmp_path / "w") == plan


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--waves", "3"], "--waves 3: there are 2 slices"),
        (["--waves", "0"], "--waves 0: expected 1 or more"),
        (
            ["--waves", "2", "--merge-as", "none"],
            "--waves 2: a wave is trained on top of the merge before it"
        ),
        (["--waves", "2", "--plan", "plan.json", "--reconcile", "fit"], "slices of a plan are added up "
        "between waves"),
        (["adapter.base_lora=[{path: parts}]"], "model.dit is not that model; put it in first"),
    ],
)
def test_waves_that_cannot_be_meant_are_refused(tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 2}))
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "manifest.json").write_text("{}")
    given = ["model.dit=tiny:dit.safetensors", "run.steps=1", "--data", "parts", "--output", "run", *more]
    code, said = hvtrain(capsys, "run", *given)
    assert code == 2 and says in said and not (tmp_path / "run").exists(), said


def test_every_wave_s_scripts_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "manifest.json").write_text("{}")
    given = [
        "model.dit=tiny:dit.safetensors", "run.steps=1", "--data", "parts", "--output", "run", "--waves", "2"
    ]
    code, said = hvtrain(capsys, "run", *given, "--backend", "slurm", "--dry-run")
    assert code == 0 and said.count("#!/usr/bin/env bash") == 4 and "afterok:MERGE" in said


def test_waves_here_go_one_after_the_other(run, monkeypatch):
    """Each wave's slices, its merge, then the next; what is done is left alone, and
    a merge that fails ends it."""
    plan, seen, code = waved(run, backend="local"), [], {"merge-1": 0}
    monkeypatch.setattr(backends, "POLL_S", 0.0)

    class Ended:
        def __init__(self, returncode: int) -> None:
            self.returncode = returncode

        def poll(self) -> int:
            return self.returncode

    def start(run, slices_, loraid, gpus, together):
        seen.append(loraid)
        finish(run, f"0{loraid}", "1:1")
        return Ended(0)

    def merge(run, slices_, wave, asked):
        name = waves.merge_name(slices_, wave)
        seen.append(name)
        arguments = waves.merge_arguments(run, slices_, wave)
        if not code.get(name, 0):
            weights(slices.Path(arguments[arguments.index("--output") + 1]))
        stands(run, name, "1:1", code=code.get(name, 0))
        return code.get(name, 0)

    monkeypatch.setattr(backends, "_start", start)
    monkeypatch.setattr(backends, "_merge_here", merge)
    code["merge-1"] = 2
    assert backends.run_here(run, plan, [1, 2, 3, 4, 5]) == 2 and seen == [1, 2, 3, "merge-1"]
    code["merge-1"] = 0
    seen.clear()
    assert backends.run_here(run, plan, [4, 5]) == 0 and seen == ["merge-1", 4, 5, "merge"]
    (run / "05/slice-05.safetensors").unlink()
    seen.clear()
    assert backends.run_here(run, plan, [5]) == 0 and seen == [5, "merge"]
    (run / "merge/wave-1.safetensors").unlink()
    seen.clear()
    assert backends.run_here(run, plan, []) == 0 and seen == ["merge-1"]  # the last one is there


@pytest.mark.parametrize("asks", [1, 2])
def test_one_that_is_asked_to_end_as_a_merge_ends_well_begins_no_other_wave(run, monkeypatch, capsys, asks):
    plan, sent = waved(run, backend="local"), []
    for i in (1, 2, 3):
        finish(run, f"0{i}", "1:1")

    class Merge:
        returncode = 0

        def __init__(self, command, **options) -> None:
            self.left = asks

        def poll(self) -> int | None:
            if self.left:
                return None
            weights(run / "merge/wave-1.safetensors")
            stands(run, "merge-1", "1:1", code=0)
            return 0

        def send_signal(self, number: int) -> None:
            sent.append(number)

        def sleep(self, seconds: float) -> None:
            self.left -= 1
            signal.raise_signal(signal.SIGTERM)

    running = Merge(())
    monkeypatch.setattr(backends.subprocess, "Popen", lambda *given, **options: running)
    monkeypatch.setattr(backends, "time", running)
    assert backends.run_here(run, plan, [4, 5]) == 75
    assert sent == [signal.SIGTERM] * (asks - 1)  # the last came too late for it
    assert capsys.readouterr().out.splitlines() == [
        f"3 of 5 slices are done; `hvtrain slices status {run}` says more"
    ]
