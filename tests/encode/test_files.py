"""The files a user writes, dataset files, JSONL and captions, however odd: a clear error, a
listed clip, or a valid dataset."""

import itertools
import json
import os
import re
import string

import pytest
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from hvtrain.encode.clips import Rejected, find_clips
from hvtrain.encode.dataset import KEYS, Dataset, read_dataset_file
from hvtrain.encode.places import place, shown
from hvtrain.encode.samples import Probes, plan_clips
from hvtrain.errors import DataError
from tests.encode.test_rules import FLAVOR


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a dataset file; the working directory is another one."""
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "set"


def clips_in(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(name)
    return folder


def read(folder, body, name="d.toml"):
    path = folder / name
    path.write_text(body) if isinstance(body, str) else path.write_bytes(body)
    (dataset,) = read_dataset_file(path, FLAVOR)
    return dataset


def videos(folder, key="video_directory", value=".", more=""):
    return find_clips(read(folder, f"[[datasets]]\n{key} = '{value}'\n{more}\n"))


def lines(folder, *rows):
    """What a JSONL of these lines gives."""
    (folder / "c.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return videos(folder, "video_jsonl_file", "c.jsonl")


# --- where paths start --------------------------------------------------------------------------------------


def test_paths_count_from_the_file_that_names_them_then_from_the_working_directory(folder):
    here, there = clips_in(folder / "a", "x.mp4"), clips_in(folder.parent / "elsewhere/b", "y.mp4")
    assert [c.path for c in videos(folder, value="a")] == [here / "x.mp4"]
    assert [c.path for c in videos(folder, value="b")] == [there / "y.mp4"]  # as in musubi-tuner
    assert [c.path for c in videos(folder, value="../set/a")] == [here / "x.mp4"]
    clips_in(folder.parent / "elsewhere/a", "z.mp4")
    with pytest.raises(
        DataError, match=rf"'a' could be {folder}/a or {folder.parent}/elsewhere/a; give the whole path"
    ):
        videos(folder, value="a")
    assert [c.path for c in videos(folder, value="./a")] == [here / "x.mp4"]  # a dot: this folder, no other
    with pytest.raises(
        DataError,
        match=rf"'nil' does not exist \(looked for {folder}/nil and {folder.parent}/elsewhere/nil\)"
    ):
        videos(folder, value="nil")
    with pytest.raises(DataError, match=rf"'./b' does not exist \(looked for {folder}/b\)"):
        videos(folder, value="./b")


def test_lines_follow_the_same_rule_and_one_file_has_one_path(folder):
    clips_in(folder / "a", "x.mp4")
    clips_in(folder.parent / "elsewhere", "y.mp4")
    names = ["a/x.mp4", str(folder / "a/x.mp4"), "a/../a/x.mp4", "../set/a/x.mp4"]
    found = lines(
        folder, *({"video_path": n, "caption": "c"} for n in names), {"video_path": "y.mp4", "caption": "c"}
    )
    assert [c.path for c in found] == [folder / "a/x.mp4"] * 4 + [folder.parent / "elsewhere/y.mp4"]
    os.symlink(folder / "a", folder / "link")
    assert place("link/x.mp4", folder) == folder / "link/x.mp4"  # a link keeps its name ...
    assert place("link/../a", folder) == folder / "a"  # ... and is followed where `..` comes after it


@pytest.mark.parametrize("name", ["", "x" * 300, "a/" * 3000, "\0", "nul\0.mp4", "\ud800.mp4", "loop/x"])
def test_names_that_no_disk_takes_are_one_line(folder, name):
    os.symlink("loop", folder / "loop")
    with pytest.raises(DataError) as caught:
        place(name, folder)
    assert shown(str(caught.value)) == str(caught.value) and len(str(caught.value)) < 20_000
    (refused,) = lines(folder, {"video_path": name, "caption": "c"})
    assert "c.jsonl:1: " in refused.reason and refused.reason.isprintable()
    (refused,) = lines(folder, {"video_path": "c.jsonl", "control_path": name, "caption": "c"})
    assert "its control" in refused.reason


# --- folders ------------------------------------------------------------------------------------------------


def test_linked_folders_are_looked_into_once_and_circles_end(folder):
    clips_in(folder / "a", "x.mp4")
    outside = clips_in(folder.parent / "outside", "y.mp4")
    os.symlink(outside, folder / "link")
    os.symlink(folder, folder / "a/up")
    os.symlink(outside, folder / "a/again")
    found = videos(folder, more="recursive = true")
    assert sorted(c.path.name for c in found) == ["x.mp4", "y.mp4"]
    with pytest.raises(DataError, match="no videos here .*recursive = true looks into sub-folders"):
        videos(folder)


def test_an_empty_folder_or_listing_says_what_counts(folder):
    (folder / "a.png").touch()
    with pytest.raises(DataError) as caught:
        videos(folder)
    assert (
        ".mp4 .webm" in str(caught.value) and "found .png" in str(caught.value)
        and "recursive" not in str(caught.value)
    )
    with pytest.raises(DataError, match=r"c\.jsonl: is empty; expected lines"):
        lines(folder, "", " ")


def test_what_is_no_file_is_listed_without_being_opened(folder):
    clips_in(folder, "x.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "pipe.txt").write_text("c")
    os.symlink("nothing", folder / "broken.mp4")
    os.mkfifo(folder / "said.txt")
    (folder / "said.mp4").touch()
    (folder / "broken.txt").write_text("c")
    found = plan_clips(videos(folder), Probes(None), target_fps=24, workers=1)
    assert {rows[0].reason.removeprefix(f"{folder}/") for rows in found} == {
        "x.mp4: cannot be decoded (Invalid data found when processing input); replace it or remove it from "
        "the dataset",
        "pipe.mp4: is a pipe, expected a file; remove it from the dataset",
        "said.mp4: has no caption; write it to said.txt beside it",
        "broken.mp4: No such file or directory; give a file that can be read",
    }
    os.mkfifo(folder / "c.jsonl")
    with pytest.raises(DataError, match="names no file"):
        videos(folder, "video_jsonl_file", "c.jsonl")
    os.mkfifo(folder / "p.toml")
    with pytest.raises(DataError, match="p.toml: is not a file"):
        read_dataset_file(folder / "p.toml", FLAVOR)


def test_a_name_that_is_not_unicode_is_listed(folder):
    (folder / os.fsdecode(b"\xff.mp4")).touch()
    (folder / os.fsdecode(b"\xff.txt")).write_text("c")
    (folder / "two\nlines.mp4").touch()
    not_unicode, no_caption = sorted(videos(folder), key=lambda r: "caption" in r.reason)
    assert (
        r"\udcff.mp4' is not valid Unicode; rename it" in not_unicode.reason
        and r"two\nlines.mp4: has no" in no_caption.reason
    )
    json.loads(not_unicode.row().encode())


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [('{"video_path": "c.jsonl", "caption": 5}', "its caption is 5, expected a text or a list of texts"),
     ('{"video_path": "c.jsonl", "caption": null}', "its caption is None, expected"),
     ('{"video_path": "c.jsonl", "captions": []}', r"its caption is \[\], expected"),
     ('{"video_path": "c.jsonl", "captions": ["a", 5]}', r"its caption is \['a', 5\], expected"),
     ('{"video_path": "c.jsonl"}', 'it has no "caption"$'),
     (r'{"video_path": "c.jsonl", "caption": "\ud800"}', r"its caption '\\ud800' is not valid Unicode"),
     ('{"video_path": "c.jsonl", "caption": "c", "control_path": 5}', "its control_path is 5, expected a "
     "path")],
)
def test_a_line_of_wrong_types_is_listed(folder, row, says):
    (refused,) = lines(folder, row)
    assert isinstance(refused, Rejected) and re.search(f"c.jsonl:1: c.jsonl: {says}", refused.reason), (
        refused.reason
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [('{"video_path": "a", "video_path": "b", "caption": "c"}', "key 'video_path' is given twice"),
     ('{"video_path": "a", "caption": "c", "x": {"y": 1, "y": 2}}', "key 'y' is given twice"),
     ("[" * 100_000, "nested"), ('{"video_path": ' + "9" * 5000 + "}", "not JSON: .*4300"),
     ('{"video_path": 5}', "expected {"), ("[]", "expected {"), ("null", "expected {")],
)
def test_a_line_that_is_no_object_ends_the_reading_with_its_number(folder, row, says):
    with pytest.raises(DataError, match=f"c.jsonl:3: .*{says}"):
        lines(folder, {"video_path": "c.jsonl", "caption": "c"}, "", row)


def test_marks_and_odd_line_ends_in_listings_and_captions(folder):
    clips_in(folder, "x.mp4")
    caption = "one\u2028two\x0bthree\x85four"  # all of them line ends to Python, none of them to JSON
    row = json.dumps({"video_path": "x.mp4", "caption": caption}, ensure_ascii=False)
    (folder / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n" + row.encode())
    assert [c.captions for c in videos(folder, "video_jsonl_file", "c.jsonl")] == [(caption,)] * 2
    (folder / "x.json").write_bytes(b'\xef\xbb\xbf{"captions": ["a", "b"]}\n')
    (clip,) = videos(folder, more="caption_extension = '.json'")
    assert clip.captions == ("a", "b")
    for name in ("d.toml", "d.yaml"):
        body = (
            b"[[datasets]]\nvideo_directory = '.'"
            if name == "d.toml" else b"datasets: [{video_directory: .}]"
        )
        assert read(folder, b"\xef\xbb\xbf" + body, name).path == folder


# --- dataset files ------------------------------------------------------------------------------------------

NUMBERS = [
    k for k, kinds in KEYS.items() if {int, float} & set(kinds if isinstance(kinds, tuple) else (kinds,))
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", ["nan", "-nan", "inf", "-inf", "-1", "1e300", "-1e300", "0x" + "f" * 5000, "9" * 400, "true"]
)
def test_no_number_is_absurd(folder, key, value):
    """NaN, infinity, negative and enormous numbers of every key that takes one."""
    source = "image_directory" if key == "control_resolution" else "video_directory"
    with pytest.raises(DataError, match=f"{key}"):
        read(folder, f"[[datasets]]\n{source} = '.'\n{key} = {value}")


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [("d.toml", "a = " + "[" * 100_000, "nested"), ("d.toml", "a = " + "9" * 5000, "not TOML: .*4300"),
     ("d.yaml", "[" * 2000, "nested"), ("d.yaml", "a: 2001-99-99", "not YAML: month"),
     ("d.yaml", "general: {recursive: true, recursive: false}", "key 'recursive' is given twice"),
     ("d.yaml", "{1: 2}", "unknown key 1"),
     ("d.yaml", "datasets: [{video_directory: ., 1: 2}]", "unknown key 1"),
     ("d.yaml", 'datasets: [{video_directory: ., caption_prefix: "\\ud800"}]', "caption_prefix: .*not valid "
     "Unicode"),
     ("d.yaml", "datasets: [{video_directory: ., resolution: &a [*a, *a]}]", "resolution is "),
     ("d.toml", b"\xff\xfe", "not TOML: .*utf-8"), ("d.yaml", "? [a, b]\n: 1", "not YAML|unknown key"),
     ("d.toml", "[[datasets]]\nvideo_directory = '.'\ntarget_frames = [true]", r"target_frames is \[True\]"),
     ("d.toml", "[[datasets]]\nvideo_directory = '.'\nresolution = 160000", "resolution is 160000, expected "
     "a number up to 8192"),
     ("d.toml", "[[datasets]]\nvideo_directory = ''", "'' is no path"),
     ("d.toml", "[[datasets]]\nvideo_directory = '.'\ncaption_extension = 'txt'", "caption_extension is "
     "'txt', expected one"),
     (
         "d.toml", "[[datasets]]\nvideo_directory = '.'\ncaption_extension = './../x'",
         "caption_extension is "
     )],
)
def test_odd_dataset_files_are_refused_in_one_line(folder, name, body, says):
    with pytest.raises(DataError, match=says) as caught:
        read(folder, body, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_bomb_of_aliases_is_not_printed(folder):
    letters = string.ascii_lowercase
    bomb = [
        "&a [x, x, x, x, x, x, x, x, x]",
        *(f"&{b} [{', '.join(['*' + a] * 9)}]" for a, b in itertools.pairwise(letters))
    ]
    for key in ("resolution", "target_frames", "caption_prefix", "unheard_of"):
        with pytest.raises(DataError, match=key) as caught:
            read(folder, f"datasets: [{{video_directory: ., {key}: [{', '.join(bomb)}]}}]", "d.yaml")
        assert len(str(caught.value)) < 10_000


TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\ud800\0\n\u2028\ufeff/."), max_size=8)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), TEXT,
        st.sampled_from(
            [".", "a", "c.jsonl", "head", "full", 16, 64, [1, 5], [64, 48], 10**30, ".txt", ".json"]
        ),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4,
)
ENTRIES = st.dictionaries(st.sampled_from([*KEYS, "video_path", "fps"]), VALUES, max_size=5)
LINES = st.one_of(
    TEXT, st.just("[" * 9999),
    st.fixed_dictionaries(
        {"video_path": st.just("a/x.mp4") | VALUES},
        optional={
            "caption": TEXT | VALUES, "captions": st.lists(TEXT), "control_path": TEXT | VALUES,
            "control_path_0": TEXT
        },
    ).map(json.dumps),
)
FUZZ = settings(max_examples=200, deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def readable(path):
    """A DataError in one line, or a dataset whose every clip is usable or listed."""
    try:
        for dataset in read_dataset_file(path, FLAVOR):
            assert (
                isinstance(dataset, Dataset) and dataset.path.is_absolute()
                and min(dataset.bucket.resolution) >= 16
            )
            assert (
                dataset.bucket.choose(640, 360)
                and len(dataset.frames.windows(50)) <= 50 * len(dataset.frames.target_frames)
            )
            for clip in find_clips(dataset):
                if isinstance(clip, Rejected):
                    assert clip.reason.isprintable() and json.loads(clip.row().encode())
                else:
                    assert (
                        clip.path.exists() and clip.captions
                        and all(c.encode() or not c for c in clip.captions)
                    )
    except DataError as error:
        assert str(error)


@seed(9)
@FUZZ
@given(general=ENTRIES, entries=st.lists(ENTRIES | st.just({"video_directory": "a"}), max_size=2), raw=TEXT)
@example(
    general={"frame_sample": 10**6}, entries=[{"video_directory": "a", "frame_extraction": "uniform"}], raw=""
)
def test_any_dataset_file_is_read_or_refused(folder, general, entries, raw):
    clips_in(folder / "a", "x.mp4")
    (folder / "d.yaml").write_text(json.dumps({"general": general, "datasets": entries}))  # JSON is YAML
    readable(folder / "d.yaml")
    (folder / "d.toml").write_text(raw, errors="surrogatepass")
    readable(folder / "d.toml")
    (folder / "e.yaml").write_text(raw, errors="surrogatepass")
    readable(folder / "e.yaml")
    scalar = {k: v for k, v in general.items() if isinstance(v, (int, float, str))}
    body = "[[datasets]]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in scalar.items())
    (folder / "d.toml").write_text(body, errors="surrogatepass")
    readable(folder / "d.toml")


def _toml(value):
    return str(value).lower() if isinstance(value, (bool, int, float)) else json.dumps(value)


@seed(9)
@FUZZ
@given(rows=st.lists(LINES, max_size=4), raw=st.binary(max_size=40))
def test_any_listing_and_caption_is_read_or_refused(folder, rows, raw):
    clips_in(folder / "a", "x.mp4")
    (folder / "c.jsonl").write_text("\n".join(rows), errors="surrogatepass")
    (folder / "d.toml").write_text(
        "[[datasets]]\nvideo_jsonl_file = 'c.jsonl'\n[[datasets]]\nvideo_directory = 'a'\n"
    )
    readable(folder / "d.toml")
    for extension in (".txt", ".json"):
        (folder / "a/x").with_suffix(extension).write_bytes(raw)
        (folder / "d.toml").write_text(
            f"[[datasets]]\nvideo_directory = 'a'\ncaption_extension = '{extension}'\n"
        )
        readable(folder / "d.toml")
