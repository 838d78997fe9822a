"""The files of a sliced run, and what each slice is told."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hvtrain import config
from hvtrain.config.load import override
from launcher import cli
from launcher.jobs import backends, slices, waves
from tests.slurm.fake import a_run, damage, finish, hvtrain, options


@dataclass(frozen=True)
class Values:
    text: str = ""
    number: int = 0
    switch: bool = False
    texts: tuple[str, ...] = ()
    perhaps: str | None = "x"


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



# --- what a slice is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", ["pa,rts", "pa[1]", "pa: x", "pa #x", "{a}", "'q\" \\", "é", "null", "*a", "12"]
)
def test_paths_reach_the_training_as_they_are(tmp_path, odd):
    """YAML reads the values of overrides; none of these is text to it."""
    run = tmp_path / odd
    plan = slices.Slices(f"/plans/{odd}", None, ("adapter.rank=2",), (f"{odd}/1", f"{odd}/2"), 2)
    cfg = config.load(config.TrainConfig, None, ["model.dit=x", *slices.train_arguments(run, plan, 2)[1:]])
    assert (
        cfg.data.shards == (f"{odd}/2",) and cfg.adapter.plan == f"/plans/{odd}"
        and cfg.run.output_dir == f"{run}/02"
    )
    assert (cfg.run.name, cfg.adapter.type, cfg.adapter.loraid) == ("slice-02", "loraid", 2)


def test_relative_paths_count_from_where_the_run_was_begun(tmp_path, monkeypatch, capsys):
    """`slices retry` from another directory: model.dit=dit.safetensors is still the same file."""
    begun, run, went = tmp_path / "begun", tmp_path / "run", []
    for folder in (begun, run, begun / "set"):
        folder.mkdir()
    (begun / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 1}))
    (begun / "set" / "manifest.json").write_text("{}")
    (begun / "dit.safetensors").touch()
    asked = [
        "slices", "run", "model.dit=dit.safetensors", "run.steps=3", "--plan", str(begun / "plan.json"),
        "--data", "set", "--output", str(run)
    ]  # fmt: skip
    monkeypatch.setattr(backends, "run_here", lambda *a: went.append(os.getcwd()) or 0)
    monkeypatch.chdir(begun)
    assert cli.main(asked) == 0 and went == [str(begun)]
    os.chdir(tmp_path)
    assert cli.main(["slices", "retry", str(run)]) == 0 and went == [str(begun)] * 2
    assert f"relative paths count from {begun}" in capsys.readouterr().out
    os.chdir(tmp_path)
    begun.rename(tmp_path / "gone")
    assert (
        cli.main(["slices", "retry", str(run)]) == 2
        and f"{begun}: this run was begun there" in capsys.readouterr().err
    )


def test_an_override_is_read_as_it_was_meant():
    for text in ("", "~", "a\nb", "1e-4", " x ", "x" * 300 + " y", "a=b", "yes"):
        assert config.load(Values, None, [override("text", text)]).text == text
    more = {"number": 3, "switch": True, "texts": ["a,b", "c: d", ""], "perhaps": None}
    found = config.load(Values, None, [override(k, v) for k, v in more.items()])
    assert found == Values("", 3, True, ("a,b", "c: d", ""), None)


def test_the_slice_s_own_keys_win_over_the_user_s():
    typed = (
        "adapter.loraid=7", "data.shards=[x]", "run.output_dir=z", "run.name=mine", "adapter.plan=y",
        "adapter.type=lora"
    )
    plan = slices.Slices("/p.json", "base.yaml", typed, ("/a", "/b"), 2)
    arguments = slices.train_arguments(Path("/run"), plan, 2)
    assert arguments[:8] == ["train", "base.yaml", *typed]
    assert arguments[8:] == [
        "adapter.type=loraid", "adapter.plan=/p.json", "adapter.loraid=2", "adapter.blocks_per_loraid=null",
        "data.shards=[/b]", "run.output_dir=/run/02", "run.name=slice-02",
    ]



def test_without_a_plan_every_slice_is_a_lora_as_the_config_says():
    plan = slices.Slices("", "base.yaml", ("adapter.rank=2",), ("/a", "/b"), 2)
    assert slices.train_arguments(Path("/run"), plan, 2) == [
        "train", "base.yaml", "adapter.rank=2", "data.shards=[/b]", "run.output_dir=/run/02",
        "run.name=slice-02",
    ]


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "more", "says"),
    [
        ("a\ntouch pwned\n#", [], "line break"), ("run", ["--time", "1\ntouch pwned"], "--time"),
        ("a\\b", [], "backslash"), ("run", ["--max-restarts", "-1"], "expected 0 or more"),
        ("run", ["--site", "gone.yaml"], "gone.yaml"),
    ],
)
def test_what_cannot_be_a_job_is_refused_before_anything_is_written(
    fake, tmp_path, capsys, monkeypatch, output, more, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 2}))
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
    given = [
        "model.dit=tiny:dit.safetensors", "run.steps=1", "--plan", "plan.json", "--data", "parts",
        "--backend", "slurm"
    ]
    code, said = hvtrain(capsys, "run", *given, "--output", output, *more)
    assert code == 2 and says in said, said
    assert not fake.scripts() and not (tmp_path / output).exists() and not (tmp_path / "pwned").exists()
    assert hvtrain(capsys, "run", *given, "--output", "a b", "--site", site(tmp_path))[0] == 0
    found = slices.load_slices(tmp_path / "a b")
    assert (found.site, found.max_restarts, found.at_once) == (str(tmp_path / "site.yaml"), 3, 1)
    assert (
        slices.load_state(tmp_path / "a b", "02").jobs == ["101_2"]
        and options(fake.scripts()[0])["--partition"] == "p"
    )


def site(folder: Path) -> str:
    (folder / "site.yaml").write_text("partition: p\n")
    return "site.yaml"


def test_without_a_plan_the_parts_are_slices_and_are_reconciled(tmp_path, capsys, monkeypatch):
    """As many as there are parts; what they share is not added up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "run_here", lambda run, wanted, loraids: print(f"runs {loraids}") or 0)
    for part in ("01", "02", "03", "keep"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "manifest.json").write_text("{}")
    start = ["model.dit=tiny:dit.safetensors", "run.steps=1", "--data", "parts", "--output", "run"]
    code, said = hvtrain(capsys, "run", *start)
    assert code == 0 and "runs (1, 2, 3)" in said, said
    begun = slices.load_slices(tmp_path / "run")
    assert (begun.plan, begun.n) == ("", 3)
    loras = [word for i in (1, 2, 3) for word in ("--lora", f"{tmp_path}/run/0{i}")]
    assert begun.merge == (
        "--dit", "tiny:dit.safetensors", *loras, "--as", "lora", "--output",
        f"{tmp_path}/run/merge/merged-lora.safetensors", "--reconcile", "fit+distill", "--keep",
        f"{tmp_path}/parts/keep",
    )
    file = tmp_path / "run" / slices.FILE
    older = json.loads(file.read_text())
    file.write_text(json.dumps({**older, "merge": [*older["merge"], "--device", "cpu"]}))
    code, said = hvtrain(capsys, "run", *start)
    assert code == 0 and "runs (1, 2, 3)" in said, said
    apart = [*start[:-1], "apart", "--merge-as", "none"]
    assert hvtrain(capsys, "run", *apart)[0] == 0 and slices.load_slices(tmp_path / "apart").merge == ()
    code, said = hvtrain(capsys, "merge", tmp_path / "apart")
    assert code == 2 and f"use `hvtrain merge --lora {tmp_path}/apart/01 ...`" in said
    assert hvtrain(capsys, "run", *start[:-1], "fitted", "--reconcile", "fit")[0] == 0
    assert "fit" in slices.load_slices(tmp_path / "fitted").merge
    code, said = hvtrain(capsys, "run", *start, "--at-once", "2")
    assert code == 2 and f"go on with it as it was begun: hvtrain slices retry {tmp_path}/run" in said


def test_slices_of_a_plan_are_reconciled_too(tmp_path, capsys, monkeypatch):
    """But for DoRAs, which only a model can have, added up; a run of before, which added up, still does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "run_here", lambda run, wanted, loraids: 0)
    (tmp_path / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 2}))
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
    start = [
        "model.dit=tiny:dit.safetensors", "run.steps=1", "--plan", "plan.json", "--data", "parts", "--output"
    ]
    assert hvtrain(capsys, "run", *start, "run")[0] == 0
    merge = slices.load_slices(tmp_path / "run").merge
    assert merge[-2:] == ("--reconcile", "fit+distill") and "--plan" in merge
    file = tmp_path / "run" / slices.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "merge": merge[:-2]}))
    assert slices.load_slices(tmp_path / "run").merge == (*merge[:-2], "--on-overlap", "sum")
    assert hvtrain(capsys, "run", *start, "waves", "--waves", "2")[0] == 0
    assert slices.load_slices(tmp_path / "waves").merge[-2:] == ("--on-overlap", "sum")
    dora = [*start, "dora", "adapter.slice_type=dora"]
    for more in ([], ["--merge-as", "model"], ["--reconcile", "none"]):
        code, said = hvtrain(capsys, "run", *dora, *more)
        assert code == 2 and "give --reconcile none and --merge-as model" in said, said
    whole = [*dora, "--reconcile", "none", "--merge-as", "model"]
    assert hvtrain(capsys, "run", *whole, "--waves", "2")[0] == 2
    assert hvtrain(capsys, "run", *whole)[0] == 0


def test_settings_of_a_merge_that_is_made_are_not_rewritten(run, capsys):
    merge = ("--dit", "d", "--output", f"{run}/merge/m.safetensors", "--reconcile", "fit")
    slices.save_slices(run, replace(a_run(run, n=1), merge=merge))
    finish(run, "01", "1:1")
    (run / "merge").mkdir()
    shutil.copy(run / "01" / "slice-01.safetensors", run / "merge" / "m.safetensors")
    slices.note_start(run, "merge", "1:1")
    slices.note_end(run, "merge", 0)
    before = (run / slices.FILE).read_text()
    code, said = hvtrain(capsys, "retry", run, "reconcile.steps=9")
    assert code == 2 and "is done or running by other settings" in said, said
    assert (run / slices.FILE).read_text() == before


def test_settings_are_for_the_waves_that_are_left(run, capsys, monkeypatch):
    monkeypatch.setattr(backends, "run_here", lambda run, wanted, loraids: 0)
    merge = ("--dit", "d", "--output", f"{run}/merge/m.safetensors", "--reconcile", "fit")
    plan = replace(a_run(run, n=2), merge=merge, waves=2, backend="local")
    slices.save_slices(run, plan)
    for name in ("01", "02"):
        finish(run, name, "1:1")
    (run / "merge").mkdir()
    shutil.copy(run / "01" / "slice-01.safetensors", waves.merged(run, 1))
    for name, code in (("merge-1", 0), ("merge", 2)):
        slices.note_start(run, name, "1:1")
        slices.note_end(run, name, code)
    code, said = hvtrain(capsys, "retry", run, "reconcile.allow_lost=true")
    assert code == 0 and slices.load_slices(run).merge[-1] == "reconcile.allow_lost=true", said
    slices.note_start(run, "02", slices.job_of(os.getpid()))  # the starter is dead, a slice is alive
    (run / "02" / "slice-02.safetensors").unlink()
    code, said = hvtrain(capsys, "retry", run, "reconcile.steps=9")
    assert code == 2 and "running already" in said and "steps" not in (run / slices.FILE).read_text()


def test_a_merge_is_into_one_expert(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "run_here", lambda run, wanted, loraids: 0)
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "manifest.json").write_text("{}")
    start = [
        "model.name=wan", "model.flavor=tiny-a14b", "model.dit=tiny:wan/high_noise.safetensors",
        "model.dit_low=tiny:wan/low_noise.safetensors", "run.steps=1", "--data",
        "parts", "--output"
    ]
    code, said = hvtrain(capsys, "run", *start, "run", "model.experts=both")
    assert code == 2 and "a merge is into one expert: give --merge-as none" in said, said
    (tmp_path / "old.txt").write_text("a circle\n")
    for more in (["reconcile.own_states=true"], ["--keep", "old.txt"]):
        code, said = hvtrain(capsys, "run", *start, "run", "model.experts=high", *more)
        assert code == 2 and "this run has one; give shard sets" in said, said
    assert not (tmp_path / "run").exists()
    for expert, noise in (("high", "high"), ("low", "low")):  # into the file that it trains
        code, said = hvtrain(capsys, "run", *start, expert, f"model.experts={expert}")
        assert code == 0, said
        assert slices.load_slices(tmp_path / expert).merge[1] == f"tiny:wan/{noise}_noise.safetensors"


def test_the_merge_has_settings_of_its_own(tmp_path, capsys, monkeypatch):
    """Given with the run, kept from the trainings, and changed by a retry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "run_here", lambda run, wanted, loraids: 0)
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "manifest.json").write_text("{}")
    start = ["model.dit=tiny:dit.safetensors", "run.steps=1", "--data", "parts", "--output"]
    own = ["reconcile.steps=20", "reconcile.lr=1e-3"]
    code, said = hvtrain(capsys, "run", *start, "run", *own, "--waves", "2")
    assert code == 0, said
    begun = slices.load_slices(tmp_path / "run")
    assert begun.merge[-2:] == tuple(own) and begun.overrides == tuple(start[:2])
    for wave in (1, 2):
        merge = waves.merge_arguments(tmp_path / "run", begun, wave)
        how = merge[merge.index("--reconcile") + 1]
        assert merge.count("reconcile.steps=20") == 1 and how == "fit+distill"
    code, said = hvtrain(capsys, "retry", tmp_path / "run", "reconcile.steps=9", "reconcile.allow_lost=true")
    assert code == 0, said
    again = slices.load_slices(tmp_path / "run")
    assert again.merge[-3:] == ("reconcile.lr=1e-3", "reconcile.steps=9", "reconcile.allow_lost=true")
    assert replace(again, merge=()) == replace(begun, merge=())
    for more, says in (
        (["reconcile.stops=1"], "stops"), (["reconcile.steps=0"], "reconcile.steps is 0"),
        ([*own, "--reconcile", "none"], "reconcile.steps=20 is for a merge that reconciles"),
        ([*own, "--merge-as", "none"], "nothing is merged"), (["reconcile.how=fit"], "give --reconcile"),
        (["reconcile.keep=[parts]"], "give --keep"),
    ):
        code, said = hvtrain(capsys, "run", *start, "other", *more)
        assert code == 2 and says in said and not (tmp_path / "other").exists(), said
    merge = again.merge[again.merge.index("--reconcile") :]
    assert hvtrain(capsys, "retry", tmp_path / "run", "reconcile.how=fit")[0] == 0
    again = slices.load_slices(tmp_path / "run")
    assert again.merge[-5:] == ("--reconcile", "fit", *merge[2:])
    for setting, says in (
        ("run.steps=2", "expected reconcile.KEY=value"), ("reconcile.steps=x", "steps"),
        ("reconcile.how=sum", "reconcile.how=sum: expected fit"), ("reconcile.keep=[a]", "give --keep")
    ):
        code, said = hvtrain(capsys, "retry", tmp_path / "run", setting)
        assert code == 2 and says in said and slices.load_slices(tmp_path / "run") == again, said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["adapter.type=none"], "adapter.type is none: without --plan"),
        (["adapter.type=dora"], "give adapter.type=lora"),
        (["--data", "parts/01"], "one shard set; without --plan every part"),
        (["--reconcile", "sum"], "--reconcile sum: expected"),
        (["--silence", "1"], "expected a share, 0 or more"),
        (["--merge-as", "none", "--keep", "parts/01"], "leave --reconcile and --keep away"),
        (["data.calibration=0"], "data.calibration is 0: the merge reconciles"),
        (["--data", "."], "found none"),
    ],
)
def test_without_a_plan_what_cannot_be_meant_is_refused(tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    for part in ("01", "02"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "manifest.json").write_text("{}")
    given = ["model.dit=tiny:dit.safetensors", "run.steps=1", "--data", "parts", "--output", "run"]
    code, said = hvtrain(capsys, "run", *given, *more)
    assert code == 2 and says in said and not (tmp_path / "run").exists(), said


def test_silence_is_taught_by_the_other_slices_data():
    plan = slices.Slices("", None, (), ("/a", "/b", "/c"), 3, silence=0.5)
    arguments = ["model.dit=x", *slices.train_arguments(Path("/run"), plan, 2)[1:]]
    data = config.load(config.TrainConfig, None, arguments).data
    assert [(e.path, e.weight, e.silent) for e in data.sets] == [
        ("/b", 0.5, False), ("/a", 0.25, True), ("/c", 0.25, True)
    ]
    assert data.shards == ()


def test_silence_is_remembered_by_the_run(tmp_path):
    for number, silence in enumerate((0.0, 0.5)):
        plan = slices.Slices("", None, (), ("/a", "/b"), 2, silence=silence)
        slices.save_slices(tmp_path / str(number), plan)
        assert slices.load_slices(tmp_path / str(number)) == plan
    assert "silence" not in (tmp_path / "0" / slices.FILE).read_text()


def test_silence_takes_parts_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"format": slices.PLAN_FORMAT, "n": 2}))
    (tmp_path / "manifest.json").write_text("{}")
    given = [
        "model.dit=tiny:dit.safetensors", "run.steps=1", "--plan", "plan.json", "--data", ".", "--output",
        "run"
    ]
    code, said = hvtrain(capsys, "run", *given, "--silence", "0.3")
    assert code == 2 and "--silence 0.3: all slices have the same data, ." in said
