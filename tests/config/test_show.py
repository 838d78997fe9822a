"""`hvtrain config show` and `config schema`, and `hvtrain init`: what a config comes to, for
editors, and one to begin with."""

from __future__ import annotations

import builtins
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvtrain.config import ROOTS, TrainConfig, build, load, to_dict
from hvtrain.config.origins import effective
from hvtrain.config.schema import schema
from hvtrain.config.write import commented
from launcher import cli
from tests.train.shardset import make_shards

ROOT = Path(__file__).resolve().parents[2]


def said(out: str) -> dict[str, tuple[Any, str]]:
    """key (last part of it) -> value, and what stands behind it."""
    found = re.findall(r"^ *([\w]+): (.*?) +# (.*)$", out, re.MULTILINE)
    return {key: (yaml.safe_load(value), note) for key, value, note in found}


def test_origins_are_lines_of_the_file_that_won(tmp_path: Path) -> None:
    text = "model:\n  name: wan\n  t5: a\n  vae: v\noptim: {lr: 1e-3,\n  eps: 1e-6}\nrun: {steps: 5}\n"
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "a.yaml").write_text(
        "base: base.yaml\n# a comment\noptim:\n  lr: 2e-3\ndata: {shards: [x, y]}\n"
    )
    found = effective(TrainConfig, tmp_path / "a.yaml", ["run.steps=7", "model.t5_tokenizer=b"])
    base, own = f"{tmp_path / 'base.yaml'}", f"{tmp_path / 'a.yaml'}"
    wanted = {
        "optim.lr": f"{own}:4", "optim.eps": f"{base}:6", "data.shards": f"{own}:5",
        "run.steps": "command line", "model.t5": f"{base}:3", "model.t5_tokenizer": "command line",
        "model.name": f"{base}:2", "run.epochs": "default"
    }
    assert {key: found.origins[key] for key in wanted} == wanted
    assert (
        found.values["optim.lr"], found.values["model.t5"], found.values["data.shards"]
    ) == (2e-3, "a", ["x", "y"])


def test_a_section_given_whole_hides_what_was_below(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "optim: {lr: 1, eps: 2}\ndata: &d {workers: 3}\neval: {<<: {every_steps: 4}}\n"
    )
    found = effective(TrainConfig, tmp_path / "a.yaml", ["optim={lr: 5}"])
    assert (
        found.origins["optim.lr"], found.origins["optim.eps"], found.values["optim.eps"]
    ) == (*["command line"] * 2, 1e-8)
    assert found.origins["eval.every_steps"].endswith("a.yaml:3") and found.config.eval.every_steps == 4


def test_show_prints_all_values_and_loads_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = ROOT / "configs" / "tiny" / "lora.yaml"
    assert cli.main(["config", "show", "train", str(path), "optim.lr=1e-5"]) == 0
    out = capsys.readouterr().out
    shown = said(out)
    assert (
        shown["lr"] == (1e-5, "command line") and shown["rank"][1] == f"{path}:6"
        and shown["betas"][1] == "default"
    )
    assert shown["flavor"] == ("tiny", "model (tiny)")
    assert shown["llm"][1].endswith("model.yaml:5")
    (tmp_path / "back.yaml").write_text(out)
    wanted, back = (to_dict(load(TrainConfig, p, ["optim.lr=1e-5"])) for p in (path, tmp_path / "back.yaml"))
    assert all(back[section] == wanted[section] for section in ("optim", "run", "data", "adapter", "zero"))
    assert (
        back["model"]["parts"] == wanted["model"]["parts"]
        and back["preview"]["prompts"] == wanted["preview"]["prompts"]
    )
    assert back["flow"]["shift"] == 3.0 and back["flow"]["guidance"] == 6.0
    assert "values are not the defaults" in out and out.count("# default\n") > 60


@pytest.mark.parametrize("name", ["generate", "merge", "encode"])
def test_show_knows_every_command(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(
        ["config", "show", name, *(["model.flavor=tiny", "model.dit=null"] if name == "generate" else [])]
    ) == 0
    out = capsys.readouterr().out
    assert build(ROOTS[name], yaml.safe_load(out), where="shown")
    if name == "generate":
        assert said(out)["frames"] == (9, "model (tiny)") and said(out)["prompt"][1] == "default"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show"], "of which command"), (["show", "tarin"], "did you mean 'train'"),
        (["tarin"], "did you mean 'train'"), (["show", "train", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "x.yaml"], "config show train x.yaml"), (["schema", "x"], "no config 'x'"),
        (["schema", "train", "x"], "too much"),
    ],
)
def test_mistakes_of_config(words: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", *words]) == 2
    assert says in capsys.readouterr().err


def test_comments_and_odd_values_load_as_they_were() -> None:
    values = {
        "run.name": "a: b # c", "data.shards": ["x", "y #"],
        "preview.prompts": [{"prompt": "a - b: c", "seed": 1}], "optim.betas": [0.9, 0.99],
        "model.parts": {"llm": "x"}, "run.steps": 3
    }
    text = commented(values, {key: f"why {key}\nindeed" for key in values}, TrainConfig, head=["two\nlines"])
    cfg = build(TrainConfig, yaml.safe_load(text), where="here")
    assert (cfg.run.name, cfg.data.shards, cfg.preview.prompts[0].prompt) == (
        "a: b # c", ("x", "y #"), "a - b: c"
    )
    assert text.startswith("# two\n# lines\nmodel:") and "# why run.name indeed" in text


# --- the schema, with as much of a validator as it uses -----------------------------------------------------

_TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None),
    "number": (int, float),
}


def faults(value: Any, rule: dict, root: dict, at: str = "") -> list[str]:
    if "$ref" in rule:
        return faults(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root, at)
    if "anyOf" in rule:
        found = [faults(value, one, root, at) for one in rule["anyOf"]]
        return [] if any(not one for one in found) else found[0]
    if "enum" in rule:
        return [] if value in rule["enum"] else [f"{at}: {value!r}"]
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if (
        kinds and not any(
            isinstance(value, _TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds
        )
    ):
        return [f"{at}: {value!r} is no {kinds}"]
    if "pattern" in rule and isinstance(value, str) and not re.search(rule["pattern"], value):
        return [f"{at}: {value!r}"]
    if isinstance(value, dict):
        known, more = rule.get("properties", {}), rule.get("additionalProperties", True)
        return [f for k, v in value.items() for f in (
            faults(v, known[k], root, f"{at}.{k}") if k in known else
            [f"{at}.{k}: unknown"] if more is False else []
            if more is True else faults(v, more, root, f"{at}.{k}")
        )]  # fmt: skip
    if isinstance(value, list):
        each = rule.get("prefixItems") or [rule.get("items", {})] * len(value)
        short = [] if len(value) >= rule.get("minItems", 0) else [f"{at}: {len(value)} values"]
        return short + [f for v, one in zip(value, each) for f in faults(v, one, root, at)]
    return []


@pytest.mark.parametrize("name", ROOTS)
def test_the_schema_takes_what_the_loader_takes(name: str) -> None:
    made = json.loads(json.dumps(schema(ROOTS[name], title=name)))
    assert faults(to_dict(ROOTS[name]()), made, made) == []
    for path in (ROOT / "configs").glob(f"*/{'lora' if name == 'train' else name}.yaml"):
        assert faults(yaml.safe_load(path.read_text()), made, made) == [], path
    sections = [made, *made["$defs"].values()]
    assert all(entry["description"] for section in sections for entry in section["properties"].values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lrr: 1}", ".optim.lrr: unknown"), ("run: {steps: many}", "many"),
        ("run: {precision: fp8}", "fp8"), ("optim: {betas: [0.9]}", "1 values"),
        ("data: {allow_foreign: 1}", "1"), ("optim: {lr: fast}", "fast"),
        ("preview: {prompts: [{promt: a}]}", "promt"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(text: str, says: str) -> None:
    made = schema(TrainConfig, title="train")
    found = faults(yaml.safe_load(text), made, made)
    assert found and says in " ".join(found)


# --- init ---------------------------------------------------------------------------------------------------


def fit_says(path: Path, capsys: pytest.CaptureFixture, *options: str) -> str:
    assert cli.main(["fit", str(path), *options]) == 0
    return capsys.readouterr().out


# none takes 0.12 GiB, selective 0.054, full 0.050, of a memory of which 94 % may be used
SMALL = ["--size", "256x256x33", "--memory"]


@pytest.mark.parametrize(
    ("words", "options", "wanted"),
    [
        (
            [], [*SMALL, "0.055"],
            {"run.recompute": "full", "parallel.ulysses": 1, "adapter.type": "lora", "zero.stage": 2}
        ),
        ([], [*SMALL, "0.045", "--gpus", "4"], {"parallel.ulysses": 2, "parallel.ring": 1}),
        (["--train", "full"], [*SMALL, "0.3"], {"adapter.type": "none", "optim.lr": 1e-5}),
        (
            ["run.recompute=offload", "adapter.rank=4"], [*SMALL, "0.15"],
            {"run.recompute": "offload", "adapter.rank": 4}
        ),
    ],
)
def test_init_writes_what_fit_says_fits(words, options, wanted, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["init", "--model", "hunyuan-video", "--dit", "tiny:dit.safetensors", *options, *words])
    both = capsys.readouterr()
    assert code == 0, both.err
    values = effective(TrainConfig, "train.yaml").values
    assert {key: values[key] for key in wanted} == wanted and "# " in Path("train.yaml").read_text()
    assert cli.main(["fit", "train.yaml", *options]) == 0
    assert re.search(r"^fits: ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--flavor", "tiny", "zero.stage=3", "run.recompute=offload", *SMALL, "0.01"],
         "nothing makes hunyuan-video tiny at 256 x 256 x 33 frames fit into 1 GPU(s) of 0.01 GiB"),
        (["--dit", "no.pt"], "no.pt does not exist"), (["--size", "9"], "expected width x height x frames"),
        (["--gpus", "0"], "expected 1 or more"), (["--model", "wann"], "did you mean 'wan'"),
        (["optim.lrr=1"], "did you mean 'optim.lr'"), (["--out", "there.yaml"], "there.yaml exists"),
        (["--out", "a.txt"], ".yaml"),
        (["--size", "63x64x5", "--flavor", "tiny"], "width is 63"), (["a.yaml"], "key=value"),
    ],
)
def test_mistakes_of_init(words, says, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").touch()
    assert cli.main(["init", *words]) == 2
    assert says in capsys.readouterr().err and not Path("train.yaml").exists()


def test_init_takes_the_largest_clips_of_the_data_and_asks_at_a_terminal(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "set")
    answers = iter(
        ["hunyuan-vido", "hunyuan-video", "tiny", "tiny:dit.safetensors", "many", "1", "8", "lora", ""]
    )
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", lambda question: next(answers))
    assert cli.main(["init", "--data", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert (
        "did you mean 'hunyuan-video'" in out and "invalid literal" not in out
        and next(answers, "all asked") == "all asked"
    )
    cfg = load(TrainConfig, "train.yaml")
    assert (
        cfg.data.shards == (str(tmp_path / "set"),)
        and "at 32 x 32 x 5 frames" in Path("train.yaml").read_text()
    )
