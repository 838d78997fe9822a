"""Files of a set with anything in them: a ShardError that says where, or a sound set;
nothing written but the output."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from shards import ShardError, edit, info, ways
from shards.reader import open_set
from shards.tar import open_local, parse_index
from shards.tensors import parse
from shards.verify import verify
from shards.writer import TarWriter
from tests.shards.sets import make_set

fuzz = settings(
    max_examples=100, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
words = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["..", "../../PWN", "/PWN", "a.json", "latents", "text/000000.tar", "clip0_0", "\0", "\ud800"]
    ),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words | st.just([]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6,
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, name))


def changed(value, path, new, how):
    """`value` with what lies at `path` replaced, removed, or there twice."""
    if not path:
        return new
    value = value.copy()
    head, rest = path[0], path[1:]
    if rest:
        value[head] = changed(value[head], rest, new, how)
    elif how == "remove":
        del value[head]
    elif how == "double" and isinstance(value, list):
        value.insert(head, value[head])
    elif how == "rename" and isinstance(value, dict):
        value[str(new)] = value.pop(head)
    else:
        value[head] = new
    return value


def edits(value):
    return st.tuples(
        st.sampled_from(list(places(value))), values, st.sampled_from(["put", "remove", "double", "rename"])
    )


def tree(folder):
    return sorted(str(p) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "deep/set"
    make_set(root, sizes=((2, 3), (1, 2)))
    return root


def use(root, out):
    """All commands; returns how many samples were exported."""
    list(info.lines(open_set(root)))
    found = open_set(root)
    for index in range(min(len(found), 20)):
        found.get(index)
    edit.split(str(root), out / "split", ways.by_number(1))
    edit.merge([str(root), str(root)], out / "merged")
    return edit.export(str(root), out / "plain")


@seed(1)
@fuzz
@given(data=st.data())
def test_any_manifest(original, tmp_path_factory, data):
    work = tmp_path_factory.mktemp("any")
    shutil.copytree(original.parent, work / "deep")
    root, out = work / "deep/set", work / "out/a/b"
    raw = json.loads((root / "manifest.json").read_text())
    for path, new, how in data.draw(st.lists(edits(raw), min_size=1, max_size=2)):
        # the first took away where the second would be made
        with suppress(KeyError, IndexError, TypeError, AttributeError):
            raw = changed(raw, path, new, how)
    (root / "manifest.json").write_text(json.dumps(raw))
    before = tree(work)
    try:
        n = use(root, out)
        assert n == len(list((out / "plain").iterdir())) and not list(verify(out / "merged", values=False))
    except ShardError as error:
        assert str(error).isprintable()
    assert [name for name in tree(work) if not f"{name}/".startswith(f"{work}/out/")] == before
    shutil.rmtree(work)


@seed(2)
@fuzz
@given(data=st.data())
def test_any_index(data):
    raw = {"members": [["a.safetensors", 512, 100, "0" * 16], ["a.json", 1536, 20, "0" * 16]]}
    for path, new, how in data.draw(st.lists(edits(raw), min_size=1, max_size=1)):
        raw = changed(raw, path, new, how)
    try:
        members = parse_index(json.dumps(raw).encode(), 10240)
    except ShardError as error:
        assert str(error).isprintable()
        return
    for name, member in members.items():
        assert (
            name and name.isprintable() and ".." not in name.split("/") and not name.startswith("/")
            and "\\" not in name
        )
        assert (
            type(member.offset) is type(member.size) is int
            and 0 <= member.offset <= member.offset + member.size <= 10240
        )


@seed(3)
@fuzz
@given(data=st.data())
def test_any_header_of_tensors(data):
    raw = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {}}
    for path, new, how in data.draw(st.lists(edits(raw), min_size=1, max_size=1)):
        raw = changed(raw, path, new, how)
    head = json.dumps(raw).encode()
    content = torch.frombuffer(
        bytearray(len(head).to_bytes(8, "little") + head + bytes(24)), dtype=torch.uint8
    )
    try:
        assert all(t.numel() * t.itemsize <= 24 for t in parse(content, "a.tar: k").values())
    except ShardError as error:
        assert str(error).startswith("a.tar: k") and str(error).isprintable()


@seed(4)
@fuzz
@given(row=st.one_of(st.binary(max_size=40), values.map(lambda v: json.dumps(v).encode())))
def test_any_json_of_a_sample(tmp_path, row):
    with TarWriter(tmp_path, "latents") as out:
        out._member("a.safetensors", save({"x": torch.ones(1)}), tensors=True)
        out._member("a.json", row, tensors=False)
        out.finish("latents/a.tar")
    try:
        meta = open_local(tmp_path / "latents/a.tar", None).meta("a")
        assert isinstance(meta, dict) and json.dumps(meta, ensure_ascii=False).encode()
    except ShardError as error:
        assert "a.json is damaged" in str(error) and str(error).isprintable()
