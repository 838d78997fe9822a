"""Frames, buckets and dataset files: the exact rules."""

import re

import numpy as np
import pytest

from hvtrain.encode.buckets import BucketRule, sizes
from hvtrain.encode.clips import Rejected, find_clips
from hvtrain.encode.dataset import read_dataset_file
from hvtrain.encode.frames import FrameRule, kept_frames
from hvtrain.encode.media import probe
from hvtrain.encode.view import fit
from hvtrain.errors import DataError
from hvtrain.models import find

FLAVOR = find("hunyuan-video").flavor("t2v")
UNIT = (16, 16)


@pytest.mark.parametrize(
    ("n", "rule", "expected"),
    [
        (50, FrameRule(4, (1, 25, 26), "head"), [(0, 1), (0, 25)]),
        (24, FrameRule(4, (25,), "head"), []),
        (53, FrameRule(4, (25,), "chunk"), [(0, 25), (25, 25)]),
        (50, FrameRule(4, (25,), "chunk"), [(0, 25), (25, 25)]),  # the last one fits exactly
        (49, FrameRule(4, (25,), "chunk"), [(0, 25)]),
        (35, FrameRule(4, (25,), "slide", stride=10), [(0, 25), (10, 25)]),
        (27, FrameRule(4, (25,), "uniform", sample=9), [(0, 25), (1, 25), (2, 25)]),
        (25, FrameRule(4, (25,), "uniform", sample=4), [(0, 25)]),
        (40, FrameRule(4, (25,), "slide", stride=10), [(0, 25), (10, 25)]),
        (40, FrameRule(4, (25,), "uniform", sample=4), [(0, 25), (5, 25), (10, 25), (15, 25)]),
        (40, FrameRule(4, (25,), "uniform", sample=1), [(0, 25)]),
        (200, FrameRule(4, extraction="full", max_frames=129), [(0, 129)]),
        (30, FrameRule(4, extraction="full", max_frames=129), [(0, 29)]),
        (3, FrameRule(4, extraction="full", max_frames=129), [(0, 1)]),
        (30, FrameRule(8, (1, 25, 26), "chunk"), [*((i, 1) for i in range(30)), (0, 25)]),
    ],
)
def test_windows(n, rule, expected):
    assert rule.windows(n) == expected


def test_targets_and_rates():
    assert FrameRule(4, (30, 29, 1, 3)).targets == [1, 29] and FrameRule(8, (30, 29, 1, 3)).targets == [1, 25]
    assert kept_frames(6, source_fps=None, target_fps=24) == list(range(6))
    assert kept_frames(6, source_fps=12, target_fps=24) == list(range(6))


def test_buckets():
    found = sizes(960 * 544, UNIT)
    assert len(found) == 47 and min(found) == (352, 1472) and max(found) == (1472, 352)
    rule = BucketRule((960, 544), UNIT, enabled=True)
    assert rule.choose(1920, 1080) == (960, 544) and rule.choose(1080, 1920) == (544, 960)
    assert BucketRule((960, 544), UNIT).choose(100, 900) == (960, 544)
    assert BucketRule((960, 544), UNIT, enabled=True, no_upscale=True).choose(333, 250) == (320, 240)
    # A picture of exactly the area keeps its size too; one of a row more is brought to a bucket.
    small = BucketRule((160, 80), UNIT, enabled=True, no_upscale=True)
    assert small.choose(320, 40) == (320, 32) and small.choose(320, 41) == (256, 48)


def test_buckets_of_other_units():
    coarse = sizes(960 * 544, (32, 32))
    assert min(coarse) == (352, 1472) and all(w % 32 == 0 == h % 32 for w, h in coarse) and len(coarse) == 24
    assert BucketRule((960, 544), (32, 32), enabled=True).choose(1920, 1080) == (960, 544)
    # Width and height with units of their own: a size is not mirrored, it has its own multiples.
    assert sizes(96 * 96, (32, 16)) == [(32, 288), (64, 144), (96, 80), (96, 96), (128, 64), (192, 48)]
    assert BucketRule((96, 96), (32, 16), enabled=True, no_upscale=True).choose(90, 90) == (64, 80)


def test_fit_covers_and_crops_the_middle():
    from PIL import Image

    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 255
    out = fit(Image.fromarray(picture), (40, 40))
    assert out.shape == (40, 40, 3) and out.min() == 255


def dataset(tmp_path, body):
    path = tmp_path / "d.toml"
    path.write_text(body)
    return path


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[[datasets]]\nvideo_directry = 'x'", "did you mean 'video_directory'"),
        ("[general]\nfps = 3\n", r"\[general\]: unknown key 'fps'"),
        ("", r"no \[\[datasets\]\]"),
        ("[[datasets]]\nresolution = [64, 64]", "exactly one"),
        ("[[datasets]]\nvideo_directory = 'nowhere'", "'nowhere' does not exist"),
        ("[[datasets]]\nvideo_directory = '.'\nresolution = [65, 64]", "multiples of 16"),
        ("[[datasets]]\nvideo_directory = '.'\nframe_extraction = 'tail'", "frame_extraction 'tail'"),
        ("[[datasets]]\nimage_directory = '.'\ntarget_frames = [1]", "is for videos"),
        ("[[datasets]]\nvideo_directory = '.'\nnum_repeats = true", "num_repeats is True, expected int"),
        ("not toml", "not TOML"),
        ("[[datasets]]\nvideo_directory = '.'\nfp_1f_no_post = true", "another architecture"),
        ("[[datasets]]\nvideo_directory = '.'\ncaption_dropout = 2", "caption_dropout is 2, expected a "
        "number from 0 to 1"),
        ("[[datasets]]\nvideo_directory = '.'\ncontrol_directory = 'none'", "control_directory = 'none' does "
        "not exist"),
        ("[[datasets]]\nvideo_directory = '.'\nno_resize_control = true", "is for images"),
        (
            "[[datasets]]\nimage_directory = '.'\nno_resize_control = true\ncontrol_resolution = 64",
            "exclude each other"
        ),
        ("[[datasets]]\nvideo_directory = '.'\nsource_fps = 0", "source_fps is 0"),
    ],
)
def test_dataset_file_mistakes(tmp_path, body, says):
    with pytest.raises(DataError, match=says):
        read_dataset_file(dataset(tmp_path, body), FLAVOR)


def test_clips_need_captions(tmp_path):
    (tmp_path / "clips").mkdir()
    (found,) = read_dataset_file(
        dataset(tmp_path, f"[[datasets]]\nimage_directory = '{tmp_path}/clips'"), FLAVOR
    )
    with pytest.raises(DataError, match="no images here"):
        find_clips(found)
    (tmp_path / "clips/a.png").write_bytes(b"not a picture")
    (refused,) = find_clips(found)
    assert "a.png: has no caption" in refused.reason
    (tmp_path / "clips/a.txt").write_text(" a caption \n")
    (clip,) = find_clips(found)
    assert clip.captions == ("a caption",)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        probe(clip.path)


@pytest.mark.parametrize(("line", "says"), [("{", "not JSON"), ('{"caption": "x"}', "video_path")])
def test_a_broken_listing_is_an_error(tmp_path, line, says):
    (tmp_path / "c.jsonl").write_text(line)
    (found,) = read_dataset_file(
        dataset(tmp_path, f"[[datasets]]\nvideo_jsonl_file = '{tmp_path}/c.jsonl'"), FLAVOR
    )
    with pytest.raises(DataError, match=says) as caught:
        find_clips(found)
    assert "c.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"video_path": "x"}', 'no "caption"'),
        ('{"video_path": "gone.mp4", "caption": "x"}', "'gone.mp4' does not exist"),
        ('{"video_path": "x", "caption": "a", "captions": ["b"]}', "both"),
        ('{"video_path": "x", "caption": 3}', "caption is 3, expected a text or a list"),
        ('{"video_path": "c.jsonl", "caption": "a", "control_path": "nope"}', "control 'nope' does not exist")
    ],
)
def test_unusable_lines_are_rejected_with_file_and_line(tmp_path, line, says):
    (tmp_path / "c.jsonl").write_text(line)
    (found,) = read_dataset_file(
        dataset(tmp_path, f"[[datasets]]\nvideo_jsonl_file = '{tmp_path}/c.jsonl'"), FLAVOR
    )
    (refused,) = find_clips(found)
    assert isinstance(refused, Rejected) and re.search(says, refused.reason) and "c.jsonl:1" in refused.reason


def test_yaml_says_what_toml_says(tmp_path):
    toml = dataset(
        tmp_path,
        "[general]\nresolution = [64, 48]\n[[datasets]]\nvideo_directory = '.'\ntarget_frames = [5, 9]\n"
    )
    (tmp_path / "d.yaml").write_text(
        "general: {resolution: [64, 48]}\ndatasets: [{video_directory: ., target_frames: [5, 9]}]\n"
    )
    assert read_dataset_file(toml, FLAVOR) == read_dataset_file(tmp_path / "d.yaml", FLAVOR)
    (tmp_path / "d.yaml").write_text("datasets: [")
    with pytest.raises(DataError, match="not YAML"):
        read_dataset_file(tmp_path / "d.yaml", FLAVOR)
    (tmp_path / "d.yaml").write_text("- a")
    with pytest.raises(DataError, match="found list"):
        read_dataset_file(tmp_path / "d.yaml", FLAVOR)


def test_controls_are_found_by_name(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "control").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"clips/{name}.png").touch()
        (tmp_path / f"clips/{name}.txt").write_text(name)
    for name in ("a.jpg", "b_1.png", "b_0.png", "b_10.png", "bb.png"):
        (tmp_path / "control" / name).touch()
    body = f"[[datasets]]\nimage_directory = '{tmp_path}/clips'\ncontrol_directory = '{tmp_path}/control'\n"
    body += "control_resolution = 64\n"
    (found,) = read_dataset_file(dataset(tmp_path, body), FLAVOR)
    a, b, c = find_clips(found)
    assert [p.name for p in a.controls] == ["a.jpg"] and "c.png: has no control" in c.reason
    assert [p.name for p in b.controls] == ["b_0.png", "b_1.png", "b_10.png"]
    assert found.control.size(400, 100, bucket=(32, 32)) == BucketRule(
        (64, 64), UNIT, enabled=True
    ).choose(400, 100)


@pytest.mark.parametrize(
    ("source", "target", "n", "expected"),
    [
        (60, 24, 11, [0, 3, 5, 8, 10]),  # floor(0.4 i) steps at 3, 5, 8, 10
        (30, 24, 11, [0, 2, 3, 4, 5, 7, 8, 9, 10]),
        (48, 24, 6, [0, 2, 4]),
        (30, 16, 10, [0, 2, 4, 6, 8]),
        (24, 24, 3, [0, 1, 2]),
        (29.97, 24, 6, [0, 2, 3, 4, 5]),
    ],
)
def test_frames_that_stay_when_the_rate_falls(source, target, n, expected):
    assert kept_frames(n, source_fps=source, target_fps=target) == expected
