"""A set of anyone's is safe to use: what it names is checked where it is read, whatever the command, and
nothing is read or written outside."""

import copy
import json
import os

import fsspec
import pytest
import torch
from safetensors.torch import save

from shards import ShardError, edit, info, open_set, ways
from shards.loader import BatchLoader
from shards.schema import Chunk, Manifest, TarFile, load_manifest
from shards.tar import Member, open_local, parse_index
from shards.tensors import parse
from shards.verify import verify
from shards.writer import TarWriter
from tests.shards.sets import make_set


def damage(root, change):
    """Change the manifest's JSON by hand."""
    path = root / "manifest.json"
    raw = json.loads(path.read_text())
    raw = change(raw) or raw
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))


def chunk(name, value, number=0):
    return lambda raw: raw["chunks"][number].__setitem__(name, value)


def key(value, number=0, at=0):
    return lambda raw: raw["chunks"][number]["keys"].__setitem__(at, value)


def tar(name, value):
    return lambda raw: raw["chunks"][0]["tars"]["latents"].__setitem__(name, value)


def put(name, value):
    return lambda raw: raw.__setitem__(name, value)


def made(**row):
    whole = {"fingerprint": "", "model": "", "parts": [], "fields": {}, **row}
    return lambda raw: raw.__setitem__("made", {"text": whole})


def old(**changes):
    return lambda raw: raw.update(version=2, **changes)


MANIFESTS = {
    "key out": (key("../../../PWN"), "sample key '../../../PWN'"),
    "key absolute": (key("/tmp/PWN"), "sample key '/tmp/PWN'"),
    "key empty": (key(""), "sample key ''"),
    "key NUL": (key("a\0"), r"sample key 'a\x00'"),
    "key of two lines": (key("a\nb"), r"sample key 'a\nb'"),
    "key with a last newline": (key("a\n"), r"sample key 'a\n'"),
    "key long": (key("a" * 201), "(203 letters)"),
    "key not ASCII": (key("\u0661"), r"sample key '\u0661'"),
    "key a dot": (key("."), "sample key '.'"),
    "key a number": (key(7), "sample key 7"),
    "key half a letter": (key("\ud800"), r"sample key '\ud800'"),
    "key twice in a tar": (key("clip0_1"), "key clip0_1 occurs twice"),
    "key twice in two tars": (key("clip0_1", 1), "key clip0_1 occurs twice"),
    "keys a text": (chunk("keys", "abc"), "expected a list, found 'abc'"),
    "no keys": (chunk("keys", []), "a tar without samples"),
    "bucket out": (chunk("bucket", "../../PWN"), "bucket '../../PWN'"),
    "bucket a number": (chunk("bucket", 5), "bucket 5"),
    "bucket a folder": (chunk("bucket", "a/b"), "bucket 'a/b'"),
    "tar out": (tar("path", "latents/../../x.tar"), "outside the set"),
    "tar absolute": (tar("path", "/etc/x.tar"), "outside the set"),
    "tar of Windows": (tar("path", "..\\x.tar"), "outside the set"),
    "tar NUL": (tar("path", "latents/\0.tar"), r"a tar 'latents/\x00.tar'"),
    "tar without a name": (tar("path", "latents//x.tar"), "a tar 'latents//x.tar'"),
    "tar of a URL": (tar("path", "%2e%2e/%2e%2e/x.tar"), "a tar '%2e%2e/%2e%2e/x.tar'"),
    "tar long": (tar("path", "latents/" + "x" * 300 + ".tar"), "at most 200 a part"),
    "tar an index": (tar("path", "latents/000000.idx"), "ends in .tar"),
    "tar twice": (tar("path", "latents/000001.tar"), "tar latents/000001.tar occurs twice"),
    "tar of two columns": (tar("path", "text/000000.tar"), "tar text/000000.tar occurs twice"),
    "size negative": (tar("n_bytes", -1), "is -1: expected a whole number"),
    "size huge": (tar("n_bytes", 1 << 70), "is 1180591620717411303424: expected a whole number"),
    "size a fraction": (tar("n_bytes", 10240.0), "is 10240.0: expected a whole number"),
    "size true": (tar("n_bytes", True), "is True: expected a whole number"),
    "checksum a path": (tar("checksum", "../../PWN"), "is no checksum"),
    "checksum a number": (tar("checksum", 5), "is no checksum"),
    "skeleton short": (tar("skeleton", "ab"), "is no checksum"),
    "more about a tar": (tar("more", 1), "damaged manifest"),
    "column out": (put("columns", ["latents", "../text"]), "column '../text'"),
    "column of tars out": (
        lambda raw: raw["chunks"][0]["tars"].update({"/x": raw["chunks"][0]["tars"]["text"]}), "column '/x'"
    ),
    "columns a text": (put("columns", "ab"), "expected a list, found 'ab'"),
    "column twice": (put("columns", ["text", "text"]), "each once"),
    "no columns": (put("columns", []), "expected one or more"),
    "repeats none": (chunk("repeats", 0), "repeats is 0: expected a whole number from 1"),
    "repeats endless": (chunk("repeats", 10**12), "repeats is 1000000000000"),
    "repeats true": (chunk("repeats", True), "repeats is True"),
    "dropout above one": (chunk("caption_dropout", 2), "caption_dropout is 2"),
    "dropout NaN": (chunk("caption_dropout", float("nan")), "caption_dropout is nan"),
    "dropout true": (chunk("caption_dropout", True), "caption_dropout is True"),
    "encoder that steers a terminal": (made(fingerprint="\x1b[2J"), r"'\x1b[2J'"),
    "model that steers a terminal": (made(model="\x1b[2J"), r"'\x1b[2J'"),
    "part a number": (made(parts=[5]), "a fingerprint or name is 5"),
    "parts a text": (made(parts="vae"), "expected a list, found 'vae'"),
    "field out": (made(fields={"../x": {"dims": [], "dtype": "float32"}}), "field '../x'"),
    "fields a list": (made(fields=[1]), "damaged manifest"),
    "size of a field a text": (
        made(fields={"x": {"dims": ["\x1b"], "dtype": "float32"}}), r"a field's size is '\x1b'"
    ),
    "made of a column out": (
        lambda raw: made()(raw) or raw["made"].update({"../x": raw["made"]["text"]}), "column '../x'"
    ),
    "encoder of version 2 that steers a terminal": (old(encoders={"text": "\x1b[2J"}), r"'\x1b[2J'"),
    "encoder of version 2 of a column out": (old(encoders={"../x": "a"}), "column '../x'"),
    "encoders of version 2 a list": (old(encoders=["a"]), "damaged manifest"),
    "data set a list": (put("dataset", []), "a fingerprint is []"),
    "chunks an object": (put("chunks", {"a": 1}), "expected a list"),
    "chunk a number": (put("chunks", [5]), "damaged manifest"),
    "a list": (lambda raw: "[]", "damaged manifest"),
    "deep": (lambda raw: "[" * 100_000, "nested too deeply"),
    "a long number": (lambda raw: "9" * 5000, "damaged manifest"),
    "said twice": (
        lambda raw: json.dumps(raw)[:-1] + ', "columns": ["latents"]}', "'columns' is given twice"
    ),
    "not UTF-8": (lambda raw: os.fsdecode(b'{"format": "\xff"}'), "damaged manifest"),
    "version text": (put("version", "\x1b[2J"), r"version '\x1b[2J'"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    make_set(root)
    return json.loads((root / "manifest.json").read_text())


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_names_nothing_that_no_set_may_hold(tmp_path, sound, name):
    change, says = MANIFESTS[name]
    raw = copy.deepcopy(sound)
    raw = change(raw) or raw
    (tmp_path / "manifest.json").write_bytes(os.fsencode(raw if isinstance(raw, str) else json.dumps(raw)))
    with pytest.raises(ShardError) as error:
        load_manifest(tmp_path)
    line = str(error.value)
    assert str(tmp_path / "manifest.json") in line and says in line and line.isprintable() and len(line) < 600


def test_what_a_manifest_may_hold(tmp_path, sound):
    def change(raw):
        raw["chunks"][0] |= {"bucket": "33x544x960+272x480", "repeats": 1_000_000, "caption_dropout": 1}
        raw["chunks"][0]["keys"][0] = "A" * 200
        raw["chunks"][0]["tars"]["text"]["path"] = "a b/é-(1).v2.tar"
        raw["chunks"][0]["tars"]["text"]["skeleton"] = ""
        made(
            fingerprint="imported: musubi-tuner é",
            fields={"a.b": {"dims": [None, 0], "dtype": "float8_e4m3fn"}}
        )(raw)

    raw = copy.deepcopy(sound)
    change(raw)
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    found = load_manifest(tmp_path)
    assert found.made["text"].imported and found.made["text"].fields["a.b"].ragged
    first = found.chunks[0]
    assert (first.bucket, first.repeats, first.caption_dropout) == ("33x544x960+272x480", 1_000_000, 1)
    assert first.keys[0] == "A" * 200 and first.tars["text"].path == "a b/é-(1).v2.tar"


def test_records_refuse_whoever_makes_them():
    entry = TarFile("latents/a.tar", 10240, "0" * 32)
    for make in (
        lambda: TarFile("../a.tar", 10240, "0" * 32), lambda: Chunk("b", ("../a",), {"latents": entry}),
        lambda: Chunk("b", ("a",), {"../latents": entry}), lambda: Manifest(("a", "a"), ()),
        lambda: Manifest(("latents",), (Chunk("b", ("a",), {}), Chunk("b", ("a",), {}))),
    ):
        with pytest.raises(ShardError):
            make()


COMMANDS = {
    "info": lambda source, out: list(info.lines(open_set(source))),
    "export": lambda source, out: edit.export(source, out),
    "split": lambda source, out: edit.split(source, out, ways.by_number(1)),
    "split by caption": lambda source, out: edit.split(source, out, ways.by_caption(["clip0_1"])),
    "merge": lambda source, out: edit.merge([source, source], out),
    "train": lambda source,
    out: next(iter(BatchLoader(open_set(source), batch_size=1, on_bad_sample="skip"))),
}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("evil", ["key", "bucket", "checksum"])
def test_no_command_follows_a_name_out_of_its_output(tmp_path, name, evil):
    """A set whose parts all agree: the manifest's key is in the index, and its skeleton is right."""
    make_set(tmp_path / "in/deep/set", sizes=((2, 3),))
    root = tmp_path / "in/deep/set"
    place = {
        "key": key("../../../PWN"), "bucket": chunk("bucket", "../../../PWN"),
        "checksum": tar("checksum", "../../PWN")
    }
    damage(root, place[evil])
    for path in root.rglob("*.idx"):
        path.write_text(path.read_text().replace("clip0_0.", "../../../PWN."))
    before = files(tmp_path)
    with pytest.raises(ShardError, match="PWN"):
        COMMANDS[name](str(root), tmp_path / "out/a/b/c/d")
    assert any("PWN" in fault for fault in verify(root))
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith("out/a/b/c/d/")} == before


INDICES = {
    "out": ([["../a.json", 512, 5, ""]], "points outside the set"),
    "absolute": ([["/a.json", 512, 5, ""]], "points outside the set"),
    "empty": ([["", 512, 5, ""]], "expected 1 to 255 printable letters"),
    "NUL": ([["a\0.json", 512, 5, ""]], r"'a\\x00.json': expected 1 to 255 printable letters"),
    "long": ([["a" * 256, 512, 5, ""]], "expected 1 to 255 printable letters"),
    "number": ([[5, 512, 5, ""]], "member 5 points outside"),
    "twice": ([["a.json", 512, 5, ""]] * 2, "occurs twice"),
    "offset negative": ([["a.json", -512, 5, ""]], "offset of 'a.json' is -512: expected a whole number from "
    "0 to 10240"),
    "offset a fraction": ([["a.json", 512.0, 5, ""]], "is 512.0"),
    "offset text": ([["a.json", "512", 5, ""]], "is '512'"),
    "size negative": ([["a.json", 512, -5, ""]], "is -5"),
    "size true": ([["a.json", 512, True, ""]], "is True"),
    "beyond": ([["a.json", 512, 9729, ""]], "at byte 512 of a tar of 10240, is 9729: expected a whole number "
    "from 0 to 9728"),
    "huge": ([["a.json", 512, 1 << 80, ""]], "is 1208925819614629174706176"),
    "checksum": ([["a.json", 512, 5, None]], "damaged index"),
    "short": ([["a.json", 512, 5]], "damaged index"),
    "no list": (5, "damaged index"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_names_nothing_that_no_tar_could_hold(name):
    rows, says = INDICES[name]
    with pytest.raises(ShardError, match=says):
        parse_index(json.dumps({"members": rows}).encode(), 10240)


def test_an_index_in_range_is_read():
    members = parse_index(b'{"members": [["a.json", 512, 9728, "c"], ["b.json", 10240, 0, ""]]}', 10240)
    assert members == {"a.json": Member(512, 9728, "c"), "b.json": Member(10240, 0, "")}
    for data in (b"[]", b"{", b"\xff", b"[" * 100_000, b'{"members": [], "members": []}'):
        with pytest.raises(ShardError, match="damaged index"):
            parse_index(data, 10240)


def test_a_hostile_index_is_passed_over_on_a_disk_and_refused_at_a_url(tmp_path):
    local = make_set(tmp_path, sizes=((2, 3),))
    wanted = local.get(0).tensors["latents"].clone()
    path = tmp_path / "latents/000000.idx"
    path.write_text(path.read_text().replace("clip0_1.", "../x."))
    assert torch.equal(open_set(tmp_path).get(0).tensors["latents"], wanted)
    assert any("000000.idx" in f and "points outside" in f for f in verify(tmp_path))
    fsspec.filesystem("memory").put(str(tmp_path), "/hostile/set", recursive=True)
    with pytest.raises(ShardError, match=r"memory://hostile/set/latents/000000\.idx: .*points outside"):
        open_set("memory://hostile/set").get(0)


@pytest.mark.parametrize("what", ["latents/000000.tar", "latents", "manifest.json", "empty_text.safetensors"])
def test_links_lead_to_nothing_outside_of_the_set(tmp_path, what):
    make_set(tmp_path / "set")
    make_set(tmp_path / "other")
    path, outside = tmp_path / "set" / what, tmp_path / "other" / what
    path.rename(tmp_path / "moved")
    path.symlink_to(outside)
    with pytest.raises(ShardError, match="leads out of the set"):
        found = open_set(tmp_path / "set")
        found.empty_text  # noqa: B018 only what is read is looked at
    assert any("leads out of the set" in fault for fault in verify(tmp_path / "set"))
    path.unlink()
    (tmp_path / "moved").rename(tmp_path / "set/.moved")
    path.symlink_to(tmp_path / "set/.moved")  # inside it is a name like another
    assert len(contents := open_set(tmp_path / "set")) == 5 and contents.get(0) and contents.empty_text
    (tmp_path / "link").symlink_to(tmp_path / "set")  # and so is one to the whole set
    assert open_set(tmp_path / "link").get(0).key == "clip0_0" and list(verify(tmp_path / "link")) == []


@pytest.mark.parametrize(
    "what", ["latents/000000.tar", "latents/000000.idx", "manifest.json", "empty_text.safetensors"]
)
def test_a_pipe_is_refused_and_never_waited_for(tmp_path, what):
    make_set(tmp_path)
    (tmp_path / what).unlink()
    os.mkfifo(tmp_path / what)
    assert any(what in f or "no shard set here" in f for f in verify(tmp_path))
    if what.endswith(".idx"):
        assert open_set(tmp_path).get(0).key == "clip0_0"  # the tar says the same
        return
    with pytest.raises(ShardError, match="not a plain file|no shard set here|0 bytes, the manifest says"):
        open_set(tmp_path).empty_text  # noqa: B018
    if what.endswith(".tar"):
        with pytest.raises(ShardError, match="not a plain file"):
            open_local(tmp_path / what, None)


def header(rows, body=64):
    text = json.dumps(rows).encode() if not isinstance(rows, bytes) else rows
    return torch.frombuffer(
        bytearray(len(text).to_bytes(8, "little") + text + bytes(body)), dtype=torch.uint8
    )


@pytest.mark.parametrize(
    "rows",
    [
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [False, 8]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]}},
        {"x": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"../x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"x\x1b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"x" * 101: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"x": 5}, [], 5, b"{", b"\xff\xff", b"[" * 100_000,
        b'{"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "x": {}}',
    ],
)
def test_a_header_of_tensors_is_checked(rows):
    with pytest.raises(ShardError, match="a.tar: k"):
        parse(header(rows), "a.tar: k")


@pytest.mark.parametrize(
    "row",
    [
        b"[]", b"5", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a": "\\ud800"}',
        b'{"a": 1, "a": 2}', b'{"a": "' + b"x" * (1 << 20) + b'"}'
    ],
)
def test_a_samples_json_is_an_object_that_can_be_written_again(tmp_path, row):
    with TarWriter(tmp_path, "latents") as out:
        out._member("a.safetensors", save({"x": torch.ones(1)}), tensors=True)
        out._member("a.json", row, tensors=False)
        out.finish("latents/a.tar")
    with pytest.raises(ShardError, match=r"a\.tar: a\.json is damaged"):
        open_local(tmp_path / "latents/a.tar", None).meta("a")


def test_a_samples_json_may_be_as_rich_as_it_is(tmp_path):
    wanted = {
        "caption": "[{" * 40, "deep": {"a": [[[{"b": [1, 2.5, None, True]}]]]}, "pair": "\U0001f600",
        "score": float("inf")
    }
    with TarWriter(tmp_path, "latents") as out:
        out._member("a.safetensors", save({"x": torch.ones(1)}), tensors=True)
        # as webdataset writes it, \ud83d\ude00
        out._member("a.json", json.dumps(wanted).encode(), tensors=False)
        out.finish("latents/a.tar")
    assert open_local(tmp_path / "latents/a.tar", None).meta("a") == wanted
