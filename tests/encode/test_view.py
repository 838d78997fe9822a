"""Pixels as people see them: turned, mirrored, squeezed, at their own times; and files
that no decoder should meet."""

import os
import socket
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from hvtrain.encode import media
from hvtrain.encode.clips import Clip
from hvtrain.encode.dataset import read_dataset_file
from hvtrain.encode.frames import is_constant, shown_frames
from hvtrain.encode.media import probe, read_frames
from hvtrain.encode.samples import Probes, plan_clips
from hvtrain.errors import DataError
from tests.encode.test_rules import FLAVOR

COLORS = {"r": (220, 30, 30), "g": (30, 190, 30), "b": (30, 30, 220), "w": (240, 240, 240)}


def quarters(width=128, height=64):
    """Red and green above blue and white."""
    picture = np.zeros((height, width, 3), np.uint8)
    for i, name in enumerate("rgbw"):
        y, x = height // 2 * (i // 2), width // 2 * (i % 2)
        picture[y : y + height // 2, x : x + width // 2] = COLORS[name]
    return picture


def corners(picture):
    """Such a picture's quarters, by the colour of each one's middle."""
    h, w = picture.shape[:2]
    found = ""
    for y in (h // 4, 3 * h // 4):
        for x in (w // 4, 3 * w // 4):
            found += min(COLORS, key=lambda c: np.abs(picture[y, x].astype(int) - COLORS[c]).sum())
    return found


def write_clip(path, frames, *, times=None, aspect=None, matrix=None):
    """An MP4 of these [H W 3] frames, at these milliseconds; `matrix`: (a, b, c, d) of its display matrix."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = (times[i] if times else 40 * i), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if matrix:
        raw = bytearray(path.read_bytes())
        at = raw.index(b"tkhd") + 4 + 40  # version 0: the matrix comes after flags, times, number and layers
        assert struct.unpack_from(">9i", raw, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
        a, b, c, d = (round(65536 * v) for v in matrix)
        struct.pack_into(">9i", raw, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(raw)
    return path


MATRICES = {
    (1, 0, 0, 1): "rgbw", (0, -1, 1, 0): "gwrb", (-1, 0, 0, -1): "wbgr", (0, 1, -1, 0): "brwg",
    (-1, 0, 0, 1): "grwb", (1, 0, 0, -1): "bwrg", (0, 1, 1, 0): "rbgw", (0, -1, -1, 0): "wgbr",
}


@pytest.mark.parametrize(("matrix", "expected"), MATRICES.items())
def test_a_clip_is_turned_as_its_display_matrix_says(tmp_path, matrix, expected):
    path = write_clip(tmp_path / "a.mp4", [quarters()] * 3, matrix=matrix)
    seen = probe(path)
    size = (64, 128) if matrix[0] == 0 else (128, 64)
    assert (seen.width, seen.height, seen.frames, seen.times) == (*size, 3, ())
    found = read_frames(path, [0, 2], size=size)
    assert found.shape == (2, size[1], size[0], 3) and {corners(f) for f in found} == {expected}


EXIF = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}


@pytest.mark.parametrize(("orientation", "expected"), EXIF.items())
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quarters()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = probe(tmp_path / "a.jpg")
    assert (seen.width, seen.height) == ((64, 128) if orientation > 4 else (128, 64))
    (found,) = read_frames(tmp_path / "a.jpg", [0], size=(seen.width, seen.height))
    assert corners(found) == expected
    # The same in a folder that is given as a video.
    assert probe(tmp_path).width == seen.width
    assert corners(read_frames(tmp_path, [0], size=(seen.width, seen.height))[0]) == expected


def test_pixels_that_are_not_square_are_squeezed(tmp_path):
    """A disc that is stored half as wide as high is a disc again."""
    y, x = np.mgrid[:96, :48]
    disc = np.where(((2 * x + 1 - 48) ** 2 + (y + 0.5 - 48) ** 2 < 40**2)[..., None], 255, 0).astype(np.uint8)
    path = write_clip(tmp_path / "a.mp4", [np.repeat(disc, 3, 2)] * 2, aspect=Fraction(2))
    seen = probe(path)
    assert (seen.width, seen.height) == (96, 96)
    (found,) = read_frames(path, [0], size=(96, 96))
    rows, columns = np.nonzero(found.mean(axis=2) > 128)
    assert abs(np.ptp(rows) - 79) <= 2 and abs(np.ptp(columns) - 79) <= 2
    # Squeezed first, turned then: lying on its side the pixels are high.
    path = write_clip(tmp_path / "b.mp4", [quarters(48, 96)] * 2, aspect=Fraction(4), matrix=(0, 1, -1, 0))
    seen = probe(path)
    assert (seen.width, seen.height) == (96, 192)
    assert corners(read_frames(path, [0], size=(96, 192))[0]) == "brwg"


@pytest.mark.parametrize(
    ("make", "says"),
    [({"matrix": (0.7071, 0.7071, -0.7071, 0.7071)}, "display matrix .* is not of quarter turns"),
     ({"aspect": Fraction(40)}, "40 times as wide as high")],
)
def test_what_cannot_be_shown_is_listed(tmp_path, make, says):
    path = write_clip(tmp_path / "a.mp4", [quarters()] * 2, **make)
    with pytest.raises(DataError, match=f"a.mp4: .*{says}"):
        probe(path)


def planned(tmp_path, body=""):
    path = tmp_path / "d.toml"
    path.write_text(
        f"[general]\nresolution=64\nenable_bucket=true\n[[datasets]]\nvideo_directory='{tmp_path}'\n{body}\n"
    )
    (dataset,) = read_dataset_file(path, FLAVOR)
    return lambda clip, root=None: plan_clips(
        [Clip(clip, ("x",), dataset)], Probes(root), target_fps=24, workers=1
    )[0]


def test_buckets_follow_the_size_as_shown_and_a_turn_is_part_of_the_state(tmp_path):
    plan = planned(tmp_path, "target_frames=[1]")
    (lying,) = plan(write_clip(tmp_path / "a.mp4", [quarters()] * 3))
    (standing,) = plan(write_clip(tmp_path / "b.mp4", [quarters()] * 3, matrix=(0, 1, -1, 0)))
    assert lying.bucket == "1x48x80" and standing.bucket == "1x80x48"
    # Sets that were made before turns were known keep what is upright and make the others again.
    assert "rotate" not in lying.clip.state and standing.clip.state.endswith("/rotate 270")


def test_the_cache_of_probes_says_the_same_and_one_of_an_older_form_is_not_read(tmp_path):
    import json

    times = [0, 40, 80, 120, 400, 440, 480]
    path = write_clip(tmp_path / "a.mp4", [quarters()] * 7, matrix=(0, 1, -1, 0), times=times)
    first = Probes(None)
    seen = first.look(path)
    (tmp_path / ".probes.json").write_text(json.dumps(first.new))
    again = Probes(tmp_path)
    assert again.look(path) == seen and not again.new and len(seen[0].times) == 7
    ((name, row),) = first.new.items()
    (tmp_path / ".probes.json").write_text(json.dumps({name: row[:5]}))
    old = Probes(tmp_path)
    assert old.look(path) == seen and old.new


def test_which_clips_have_a_constant_rate():
    assert (
        is_constant([]) and is_constant([0.0]) and is_constant([0, 5])
        and is_constant([i / 24 for i in range(99)])
    )
    assert is_constant([round(i / 240, 3) for i in range(240)])  # thousandths of a second, as in MKV
    assert is_constant([i / 24 + (i % 2) / 120 for i in range(99)])  # film on NTSC: 2, 3, 2, 3 fields
    assert not is_constant([0, 1, 2, 4, 5, 6, 7, 8, 9])  # one is left out
    # darker: slower
    assert not is_constant([i / 30 for i in range(50)] + [50 / 30 + i / 24 for i in range(50)])


def test_a_variable_rate_is_resampled_by_the_times():
    # 10 frames a second, then one that stays for 0.5 s, then on.
    times = [0, 0.1, 0.2, 0.3, 0.8, 0.9, 1.0]
    assert shown_frames(times, source_fps=None, target_fps=24) == [0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 6]
    # At rate 4 the ticks are 0, 0.25, 0.5, 0.75, 1.0, and a frame belongs to the tick that is nearest.
    assert shown_frames(times, source_fps=10, target_fps=4) == [1, 3, 3, 4, 6]
    # A slower source is not made faster.
    assert shown_frames(times, source_fps=10, target_fps=24) == shown_frames(
        times, source_fps=None, target_fps=24
    )
    for bad in ([0, 0, 0, 0], [0, 0.001, 0.002, 1e9]):
        with pytest.raises(DataError, match="make no sense"):
            shown_frames(bad, source_fps=None, target_fps=24)


def test_a_clip_of_variable_rate_moves_evenly(tmp_path):
    """A bar that moves one column a time unit: at whatever moments frames were stored, it
    moves evenly in the sample."""
    # milliseconds; 120, 160, 320, 360 are missing
    times = [0, 40, 80, 200, 240, 280, 400, 440, 480, 520, 560]
    frames = []
    for t in times:
        frames.append(np.zeros((64, 128, 3), np.uint8))
        frames[-1][:, t // 5 : t // 5 + 12] = 255
    path = write_clip(tmp_path / "a.mp4", frames, times=times)
    (sample,) = planned(tmp_path, "target_frames=[13]")(path)
    assert sample.clip.frames == (0, 1, 2, 2, 2, 3, 4, 5, 5, 5, 6, 7, 8)
    (sample,) = planned(tmp_path, "source_fps=25\ntarget_frames=[13]")(path)
    bar = [
        f[32].mean(axis=1).argmax()
        for f in read_frames(path, sorted(set(sample.clip.frames)), size=(128, 64))
    ]
    expected = [times[i] // 5 for i in sorted(set(sample.clip.frames))]
    assert np.abs(np.subtract(bar, expected)).max() <= 11
    shown = [times[i] for i in sample.clip.frames]
    # nothing is shown before its time
    assert all(t - k * 1000 / 24 <= 500 / 24 + 1 for k, t in enumerate(shown))


def test_a_gif_is_a_video(tmp_path):
    pictures = [Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)) for i in range(9)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=40)
    seen = probe(tmp_path / "a.gif")
    assert (seen.width, seen.height, seen.frames, seen.times) == (64, 48, 9, ())
    assert [
        round(f.mean()) for f in read_frames(tmp_path / "a.gif", [0, 4, 8], size=(64, 48))
    ] == [0, 80, 160]


def test_an_image_above_the_limit_is_listed_with_its_reason(tmp_path, monkeypatch):
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # 128 x 64 are more than twice as many
    with pytest.raises(
        DataError, match=r"a\.png: has more than the 0 million pixels that are decoded; scale it down"
    ):
        probe(tmp_path / "a.png")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("odd"), SyntaxError("broken PNG"), struct.error("short"), MemoryError(),
        RecursionError("deep"), KeyError(3), EOFError(), OverflowError("big"), AssertionError()
    ]
)
def test_whatever_a_decoder_raises_lists_that_file_only(tmp_path, monkeypatch, error):
    Image.fromarray(quarters()).save(tmp_path / "a.png")
    clip = write_clip(tmp_path / "a.mp4", [quarters()] * 3)

    def fails(*arguments, **options):
        raise error

    for path, where, name in ((tmp_path / "a.png", media.Image, "open"), (clip, media.av, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fails)
            for act in (probe, lambda p: read_frames(p, [0], size=(64, 32))):
                with pytest.raises(DataError, match=rf"{path.name}: cannot be decoded \(.+\); replace it"):
                    act(path)


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        listening.bind("socket.png")
        for name, kind in (("pipe.mp4", "a pipe"), ("device.mp4", "a device"), ("socket.png", "a socket")):
            with pytest.raises(DataError, match=f"{name}: is {kind}, expected a file"):
                probe(tmp_path / name)
