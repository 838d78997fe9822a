"""What a user may write into a config: odd files, odd values, anything at all. A valid config or
one line, never a traceback."""

import copy
import dataclasses
import math
import random
import typing
from collections.abc import Mapping

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvtrain.config import ROOTS, TrainConfig, build, dump, load, to_dict
from hvtrain.config.load import parse_yaml
from hvtrain.config.rules import check_encode, check_generate, check_train
from hvtrain.errors import ConfigError, HvtrainError
from launcher.site import load_site

CHECKS = {"train": check_train, "encode": check_encode, "generate": check_generate}


def write(tmp_path, content: str | bytes):
    path = tmp_path / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 5e-3\n", "key 'lr' is given twice, in line 2 and in line 4; "
        "keep one"),
        ("optim: {lr: 1e-3}\nrun: {steps: 1}\noptim: {eps: 1}\n", "key 'optim' is given twice, in line 1 and "
        "in line 3"),
        ("preview:\n  prompts:\n  - {prompt: a, seed: 1, seed: 2}\n", "key 'seed' is given twice, in line 3 "
        "and in line 3"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(tmp_path, text, says):
    with pytest.raises(ConfigError, match="a.yaml: not YAML: ") as caught:
        load(TrainConfig, write(tmp_path, text))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_given_twice_in_an_override_or_a_site_file(tmp_path):
    with pytest.raises(ConfigError, match="'optim={lr: 1, lr: 2}': key 'lr' is given twice"):
        load(TrainConfig, None, ["optim={lr: 1, lr: 2}"])
    with pytest.raises(ConfigError, match="key 'partition' is given twice, in line 1 and in line 2"):
        load_site(str(write(tmp_path, "partition: a\npartition: b\n")))


def test_a_merge_key_is_no_second_time(tmp_path):
    """`<<` exists to be overridden."""
    cfg = load(TrainConfig, write(tmp_path, "data: &d {batch_size: 3, workers: 2}\neval: {}\n"))
    assert cfg.data.batch_size == 3
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 5}\n")["b"] == {"x": 5, "y": 2}


def floats(cls, prefix=""):
    """Every key of a config that is a float, or holds some."""
    for name, kind in typing.get_type_hints(cls).items():
        kinds = {kind, *typing.get_args(kind)}
        if dataclasses.is_dataclass(kind):
            yield from floats(kind, f"{prefix}{name}.")
        elif float in kinds:
            yield prefix + name, typing.get_origin(kind), kind


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "-.inf", "inf", "1e999"])
def test_no_float_of_any_config_takes_nan_or_infinity(root, value):
    keys = list(floats(root))
    assert len(keys) >= (0 if root.__name__ == "EncodeConfig" else 1)
    for key, origin, kind in keys:
        n = 1 if Ellipsis in typing.get_args(kind) else max(1, len(typing.get_args(kind)))
        text = f"[{', '.join([value] * n)}]" if origin is tuple else value
        text = f"{{a: {value}}}" if origin is Mapping else text
        with pytest.raises(ConfigError, match="expected a finite number"):
            load(root, None, [f"{key}={text}"])


def test_numbers_as_people_write_them(tmp_path):
    cfg = load(TrainConfig, write(tmp_path, "optim: {lr: 1e-3, eps: '1e-6'}\nrun: {epochs: 2}\n"))
    assert (
        (cfg.optim.lr, cfg.optim.eps, cfg.run.epochs) == (1e-3, 1e-6, 2.0)
        and isinstance(cfg.run.epochs, float)
    )


def test_true_and_false_beside_words():
    """As YAML has them, and nothing that is only equal to them."""
    given = [[], *([f"model.fp8_matmul={word}"] for word in ("true", "false", "auto"))]
    said = [load(TrainConfig, None, items).model.fp8_matmul for items in given]
    assert said == ["auto", True, False, "auto"]
    for text in ("1", "0", "1.0", "'tru'", "null"):
        with pytest.raises(ConfigError, match="model.fp8_matmul is .*auto.*true"):
            load(TrainConfig, None, [f"model.fp8_matmul={text}"])
    with pytest.raises(ConfigError, match="model.fp8_matmul is 'false', expected false without quotes"):
        load(TrainConfig, None, ["model.fp8_matmul='false'"])
    cfg = load(TrainConfig, None, ["model.fp8_matmul=true"])
    assert "fp8_matmul: true\n" in dump(cfg) and build(TrainConfig, to_dict(cfg), where="") == cfg


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings_that_editors_write(tmp_path, encoding):
    text = "preview: {prompts: [{prompt: 'Käse \u732b'}]}\n"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    cfg = load(TrainConfig, write(tmp_path, (mark + text).encode(encoding)))
    assert cfg.preview.prompts[0].prompt == "Käse \u732b"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("caf\xe9: 1".encode("latin-1"), "not YAML"),
        (b"a: \x00", "not YAML"),
        (b"[" * 2000, "nested too deeply"),
        (b"a: 2026-13-45", "not YAML: month must be in"),
        (b"a: !!float ''", "not YAML"),
        (b"a: !!timestamp x", "not YAML"),
        (b"a: !!bool x", "not YAML"),
        (b"!!python/object/apply:os.system [echo]", "not YAML"),
        (b"? [a, b]\n: 1", "not YAML"),
        (b"a: " + b"9" * 5000, "not YAML"),
        (b"- a", "expected keys and values, found list"),
        (b"base: [a]", "base is ['a'], expected the path"),
        (b"base: ''", "base is '', expected the path"),
        (b"base: .", "no such config file"),
        (b"1: 2", "unknown key '1'"),
        (b"null: 2", "unknown key 'None'"),
    ],
)
def test_files_that_are_no_configs(tmp_path, content, says):
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, write(tmp_path, content))
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_links_folders_and_the_unreadable(tmp_path):
    good = write(tmp_path, "run: {steps: 3}\n")
    (tmp_path / "link.yaml").symlink_to(good)
    (tmp_path / "child.yaml").write_text("base: link.yaml\n")
    assert load(TrainConfig, tmp_path / "child.yaml").run.steps == 3
    (tmp_path / "round.yaml").symlink_to(tmp_path / "round.yaml")
    for path in (tmp_path, tmp_path / "round.yaml", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(ConfigError):
            load(TrainConfig, path)


def test_a_few_lines_that_stand_for_gigabytes_are_shown_short(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    text = "optim: &o [*b]\n".replace("*b", "x") + "run: {steps: [" + "x, " * 10000 + "]}\n"
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, write(tmp_path, text))
    assert len(str(caught.value)) < 400
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, write(tmp_path, f"{bomb}run: {{steps: *a11}}\n".replace("a0: ", "model: ", 1)))
    assert len(str(caught.value)) < 400


def test_an_override_changes_one_place_of_an_alias(tmp_path):
    text = "preview: {prompts: [&p {prompt: a}, *p]}\nmodel: &m {}\n"
    cfg = load(TrainConfig, write(tmp_path, text), ["model.flavor=b"])
    assert cfg.model.flavor == "b" and [p.prompt for p in cfg.preview.prompts] == ["a", "a"]
    with pytest.raises(ConfigError, match="unknown key 'optim.name2'"):
        load(TrainConfig, write(tmp_path, "optim: &x {}\ndata: *x\n"), ["optim.name2=b"])
    assert load(
        TrainConfig, write(tmp_path, "optim: &x {}\ndata: *x\n"), ["data.workers=3"]
    ).data.workers == 3


# --- anything at all ----------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(),
    st.binary(max_size=4),
    st.sampled_from(
        ["", "0", "-1", "nan", "1e400", "~", "[", "{a: 1, a: 1}", "\0", "x" * 300, "../..", "tiny:", "tiny:x"]
    ),
    st.sampled_from([0, -1, 1, 2, 10**30, 0.5, [], {}, ["x" * 300], ["a\0"]]),
)
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


MODEL = {
    "dit": "tiny:dit.safetensors", "vae": "tiny:vae.safetensors", "llm": "tiny:llm", "clip": "tiny:clip",
    "dtype": "float32"
}
GOOD = {  # so that one odd value is met by the rule for it, not by the first of all
    "train": {"model": MODEL, "data": {"shards": ["."]}, "run": {"steps": 3, "output_dir": "x"}},
    "encode": {"model": MODEL, "dataset": __file__, "output": "x"},
    "generate": {"model": MODEL, "prompt": "a", "output": "x.mp4"},
    "merge": {},
}


def leaves(cls, prefix=""):
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def accepted(name: str, path, overrides: list[str]) -> None:
    """Loads, or is refused in one line that a terminal can show; then the same of the command's own rules."""
    try:
        cfg = load(ROOTS[name], path, overrides)
        assert isinstance(cfg, ROOTS[name])
        assert not [v for v in flat(to_dict(cfg)) if isinstance(v, float) and not math.isfinite(v)]
        if name in CHECKS:
            CHECKS[name](cfg)
    except HvtrainError as error:
        assert 0 < len(str(error)) < 3000


def flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [x for v in value for x in flat(v)]
    return [value]


FAST = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", ROOTS)
@FAST
@given(data=st.data())
def test_any_value_under_any_key(tmp_path_factory, name, data):
    """Sections of the right names with anything under their keys, as a file and as overrides."""
    keys = list(leaves(ROOTS[name]))
    raw: dict = copy.deepcopy(GOOD[name])
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)):
        *sections, last = key.split(".")
        below = raw
        for section in sections:
            below = below.setdefault(section, {})
        below[last] = data.draw(VALUES)
    overrides = [
        f"{key}={value}" for key,
        value in data.draw(st.lists(st.tuples(st.sampled_from(keys), VALUES.map(str)), max_size=1))
    ]
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.yaml"
    path.write_text(yaml.dump(raw, allow_unicode=True), encoding="utf-8", errors="replace")
    accepted(name, path, overrides)


@FAST
@given(data=st.binary(max_size=60), overrides=st.lists(st.text(max_size=20), max_size=3))
def test_any_bytes_and_any_words(tmp_path_factory, data, overrides):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    accepted("train", path, [])
    accepted("train", None, overrides)


def test_what_the_fuzz_starts_from_is_good():
    for name, check in CHECKS.items():
        check(build(ROOTS[name], GOOD[name], where="here"))


def test_a_good_config_with_some_letters_changed(tmp_path):
    """Near misses reach further than noise."""
    draw, good = random.Random(3), dump(TrainConfig()).encode()
    path = tmp_path / "a.yaml"
    for _ in range(150):
        text = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            odd = [b":", b"\n", b"- ", b"{", b"&a ", b"*a", b"!!", b"'", b"0", b"\t", b"\xff"]
            text[at : at + draw.randint(0, 2)] = draw.choice(odd)
        path.write_bytes(bytes(text))
        accepted("train", path, [])
