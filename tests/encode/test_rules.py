"""Frames, buckets and dataset files: the exact rules."""

import numpy as np
import pytest

from hvtrain.encode.buckets import BucketRule, sizes
from hvtrain.encode.dataset import find_clips, read_dataset_file
from hvtrain.encode.frames import FrameRule, kept_frames, normalised
from hvtrain.encode.media import fit, probe
from hvtrain.errors import DataError


@pytest.mark.parametrize(
    ("n", "rule", "expected"),
    [
        (50, FrameRule((1, 25, 26), "head"), [(0, 1), (0, 25)]),
        (24, FrameRule((25,), "head"), []),
        (53, FrameRule((25,), "chunk"), [(0, 25), (25, 25)]),
        (40, FrameRule((25,), "slide", stride=10), [(0, 25), (10, 25)]),
        (40, FrameRule((25,), "uniform", sample=4), [(0, 25), (5, 25), (10, 25), (15, 25)]),
        (40, FrameRule((25,), "uniform", sample=1), [(0, 25)]),
        (200, FrameRule(extraction="full", max_frames=129), [(0, 129)]),
        (30, FrameRule(extraction="full"), [(0, 29)]),
        (3, FrameRule(extraction="full"), [(0, 1)]),
    ],
)
def test_windows(n, rule, expected):
    assert rule.windows(n) == expected


def test_targets_and_rates():
    assert normalised((30, 29, 1, 3)) == [1, 29]
    assert kept_frames(6, source_fps=None, target_fps=24) == list(range(6))
    assert kept_frames(6, source_fps=12, target_fps=24) == list(range(6))
    kept = kept_frames(60, source_fps=60, target_fps=24)
    assert len(kept) in (24, 25) and kept[0] == 0 and set(np.diff(kept)) <= {1, 2, 3}


def test_buckets():
    found = sizes(960 * 544)
    assert len(found) == 47 and min(found) == (352, 1472) and max(found) == (1472, 352)
    rule = BucketRule((960, 544), enabled=True)
    assert rule.choose(1920, 1080) == (960, 544) and rule.choose(1080, 1920) == (544, 960)
    assert BucketRule((960, 544)).choose(100, 900) == (960, 544)
    assert BucketRule((960, 544), enabled=True, no_upscale=True).choose(333, 250) == (320, 240)


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
    ],
)
def test_dataset_file_mistakes(tmp_path, body, says):
    with pytest.raises(DataError, match=says):
        read_dataset_file(dataset(tmp_path, body))


def test_clips_need_captions(tmp_path):
    (tmp_path / "clips").mkdir()
    (found,) = read_dataset_file(dataset(tmp_path, f"[[datasets]]\nimage_directory = '{tmp_path}/clips'"))
    with pytest.raises(DataError, match="no images here"):
        find_clips(found)
    (tmp_path / "clips/a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a\.png: has no caption"):
        find_clips(found)
    (tmp_path / "clips/a.txt").write_text(" a caption \n")
    (clip,) = find_clips(found)
    assert clip.caption == "a caption"
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        probe(clip.path)


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "not JSON"), ('{"video_path": "x"}', "has no caption"), ('{"caption": "x"}', "video_path"),
     ('{"video_path": "gone.mp4", "caption": "x"}', "gone.mp4 does not exist")],
)
def test_jsonl_mistakes(tmp_path, line, says):
    (tmp_path / "c.jsonl").write_text(line)
    (found,) = read_dataset_file(dataset(tmp_path, f"[[datasets]]\nvideo_jsonl_file = '{tmp_path}/c.jsonl'"))
    with pytest.raises(DataError, match=says) as caught:
        find_clips(found)
    assert "c.jsonl:1" in str(caught.value)
