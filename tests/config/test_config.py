"""Configs: strict, explained, and the same after a round trip."""

import dataclasses
import typing

import pytest
import yaml

from hvtrain.config import ROOTS, GenerateConfig, TrainConfig, build, dump, load, reference, to_dict
from hvtrain.config.load import field_notes
from hvtrain.errors import ConfigError


def test_yaml_overrides_and_base(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3, eps: 1e-6}\nrun: {steps: 5}\n")
    (tmp_path / "a.yaml").write_text("base: base.yaml\noptim: {lr: 2e-3}\ndata: {shards: [x, y]}\n")
    cfg = load(TrainConfig, tmp_path / "a.yaml", ["run.steps=7", "parallel.ulysses=2", "data.shards=z"])
    assert (
        cfg.optim.lr, cfg.optim.eps, cfg.run.steps, cfg.parallel.ulysses, cfg.data.shards
    ) == (2e-3, 1e-6, 7, 2, ("z",))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("rank=4", "did you mean 'adapter.rank'"),
        ("run.steps=many", "run.steps is 'many', expected a whole number"),
        ("run.precision=fp8", "choose one of: bf16, fp32"),
        ("optim=3", "expected a section"),
        ("optim.betas=[0.9]", "expected 2 values"),
        ("nothing", "written key=value"),
    ],
)
def test_mistakes_are_named(override, says):
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, None, [override])
    assert says in str(caught.value)


def test_a_choice_is_listed_once():
    with pytest.raises(ConfigError) as far:
        load(TrainConfig, None, ["run.precision=int4"])
    with pytest.raises(ConfigError) as near:
        load(TrainConfig, None, ["run.precision=bf61"])
    assert str(far.value) == "command line: run.precision is 'int4'; choose one of: bf16, fp32"
    assert str(near.value) == "command line: run.precision is 'bf61'; did you mean 'bf16'? (bf16 | fp32)"


@pytest.mark.parametrize(
    "text",
    [
        "a cat: a dog", "a cat # 3", "# cat", "&a cat", "[a, cat]", "{a}", "- a", "true", "on", "2024-01-01",
        "5:30", "007", "1_000", "1.50", "0x10", "a\nb", "'quoted' cat", "100%", "",
    ],
)  # fmt: skip
def test_text_on_the_command_line_is_what_was_typed(text):
    cfg = load(GenerateConfig, None, [f"prompt={text}", f"output={text}", f"model.dit={text}"])
    assert (cfg.prompt, cfg.output, cfg.model.dit) == (text, text, text)


def test_lists_quotes_and_null_on_the_command_line_are_yaml():
    cfg = load(
        TrainConfig, None, ["data.shards=[a, 'b: c']", "model.dit=null", "run.name='007'", "model.vae=~"]
    )
    assert (cfg.data.shards, cfg.model.dit, cfg.run.name, cfg.model.vae) == (("a", "b: c"), None, "007", None)
    assert load(TrainConfig, None, ["data.shards=/my set #2"]).data.shards == ("/my set #2",)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load(TrainConfig, tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load(TrainConfig, tmp_path / "bad.yaml")
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load(TrainConfig, tmp_path / "loop.yaml")


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_reference_and_dump_load_back(root):
    assert build(root, yaml.safe_load(reference(root)), where="reference") == root()
    assert build(root, yaml.safe_load(dump(root())), where="dump") == root() and to_dict(root())


def every_section(cls):
    yield cls
    for kind in typing.get_type_hints(cls).values():
        for part in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(part):
                yield from every_section(part)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_every_key_is_explained(root):
    for section in every_section(root):
        assert {f.name for f in dataclasses.fields(section)} == set(field_notes(section)), section
