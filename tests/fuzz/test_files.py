"""Any file that a user writes, or gets from a stranger, with a few places changed:
refused in one line, or read."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.world import World, fuzz, world  # noqa: F401 (a fixture)

ODD = (
    b"", b" ", b"\t", b"\n", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", "é😀".encode(), b"null", b"true",
    b"nan", b".nan", b".inf", b"-1", b"0", b"1e999", b"9"*30, b"[", b"]", b"{", b"}", b"[[]]", b'"', b"'",
    b"#",
    b":", b",", b"- ", b"&a ", b"*a", b"!!python/object:os.system", b"../../x", b"/dev/null", b"--w 1e9",
    b"--s nan", b"--d -1", b"--zz 1", b"\\u0000", b"\\ud800", b"=", b"%", b"$(touch PWN)", b"`touch PWN`",
)
VALUES = (
    None, True, -1, 0, 1, 2**70, 0.5, float("nan"), float("inf"), "", "x", "../../x", "/x", "a\nb", "\x00",
    "\ud800", [], {}, [[]], {"a": 1},
)


@dataclass(frozen=True)
class Kind:
    """A file, a copy of it in the working directory, and the commands that read the copy."""

    name: str  # in the world's `given`: the whole folder is copied where the file is one of several
    commands: tuple[str, ...]


KINDS = (
    Kind("train.yaml", (
        "launch --nproc 1 train train.yaml",
        "slices run train.yaml --plan @plan/plan.json@ --data @parts@ --output r --backend slurm --dry-run",
    )),
    Kind("generate.yaml", ("launch --nproc 1 generate generate.yaml", "generate generate.yaml")),
    Kind("encode.yaml", ("launch --nproc 1 encode encode.yaml",)),
    Kind("clips.toml", ("data check clips.toml --workers 1",)),
    Kind("jsonl.toml", ("data check jsonl.toml --workers 1",)),
    Kind("clips.jsonl", ("data check jsonl.toml --workers 1",)),
    Kind("prompts.txt", ("generate @generate.yaml@ prompt=null prompt_file=prompts.txt output=many",)),
    Kind("site.yaml", ("launch --nproc 2 --slurm --dry-run --site site.yaml train @train.yaml@",)),
    Kind("plan/plan.json", (
        "slices run @train.yaml@ --plan plan/plan.json --data @parts@ --output r --backend slurm --dry-run",
        "merge --plan plan/plan.json --dit tiny:dit.safetensors --output m.safetensors",
    )),
    Kind("old/slices.json", ("slices status old", "slices retry old", "slices cancel old")),
    Kind("set/manifest.json", (
        "shards info set", "shards verify set", "shards export set --output files",
        "shards split set --n 2 --output two", "train @train.yaml@ data.shards=[set]",
    )),
    Kind("lora.safetensors", (
        "lora info lora.safetensors",
        "merge --dit tiny:dit.safetensors --lora lora.safetensors --output m.safetensors",
    )),
)


@st.composite
def bytes_changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Up to four places overwritten, cut out, doubled or filled with something odd."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, min(len(data), 4000)))
        end = min(len(data), begin + draw(st.integers(0, 24)))
        middle = draw(st.one_of(st.sampled_from(ODD), st.just(data[begin:end] * 2), st.binary(max_size=4)))
        data = data[:begin] + middle + data[end:]
    return data


@st.composite
def values_changed(draw: st.DrawFn, tree: object) -> object:
    """A JSON tree with one value replaced, or one key dropped, doubled under another
    name or set to something odd."""
    if draw(st.integers(0, 3)) and isinstance(tree, dict | list) and tree:
        spot = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
        changed = dict(tree) if isinstance(tree, dict) else list(tree)
        slip = draw(st.integers(0, 9))
        if slip == 0:
            del changed[spot]
        elif slip == 1 and isinstance(changed, list):
            changed.append(changed[spot])
        elif slip == 1:
            changed[str(draw(st.sampled_from(VALUES)))] = changed[spot]
        else:
            changed[spot] = draw(values_changed(tree[spot]))
        return changed
    return draw(st.sampled_from(VALUES))


def read_by(world: World, kind: Kind, content: bytes, draw: st.DataObject) -> None:  # noqa: F811
    """Put the file in its place and have one of its readers read it."""
    world.fresh_output()
    copy = Path(world.out, kind.name)
    if "/" in kind.name and not copy.exists():
        shutil.copytree(world.given / copy.parent.name, copy.parent)
    if kind.name == "clips.jsonl":
        text = (world.given / "jsonl.toml").read_text().replace(str(world.given / kind.name), str(copy))
        (world.out / "jsonl.toml").write_text(text)
    copy.write_bytes(content)
    line = draw.draw(st.sampled_from(kind.commands), label="command")
    words = [re.sub(r"@(.+?)@", lambda m: str(world.given / m[1]), word) for word in line.split()]
    world.try_line(words)
    assert not (world.out / "PWN").exists()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@fuzz(examples=60)
@given(data=st.data())
def test_a_file_with_changed_bytes(world: World, kind: Kind, data: st.DataObject) -> None:  # noqa: F811
    read_by(world, kind, data.draw(bytes_changed((world.given / kind.name).read_bytes())), data)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name.endswith(".json")], ids=lambda kind: kind.name)
@fuzz(examples=80)
@given(data=st.data())
def test_json_with_changed_values(world: World, kind: Kind, data: st.DataObject) -> None:  # noqa: F811
    tree = json.loads((world.given / kind.name).read_text())
    changed = data.draw(values_changed(tree), label="changed")
    read_by(world, kind, json.dumps(changed).encode("utf-8", "surrogatepass"), data)
