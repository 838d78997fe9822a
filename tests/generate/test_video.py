"""Video files: what is written is what is read, with the parameters inside, and never half a file."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from hvtrain.errors import DataError
from hvtrain.generate.video import read_metadata, write_mp4, write_png


def bars(frames: int = 9, height: int = 64, width: int = 96) -> np.ndarray:
    """Wide bars of saturated colors that move."""
    colors = np.array([[200, 20, 20], [20, 180, 60], [30, 60, 220], [230, 220, 40]], np.uint8)
    columns = (np.arange(width)[None] // 24 + np.arange(frames)[:, None]) % len(colors)
    return np.repeat(colors[columns][:, None], height, axis=1)


def read(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), stream


def test_round_trip(tmp_path: Path) -> None:
    frames, path = bars(), tmp_path / "new" / "a.mp4"
    write_mp4(path, frames, fps=24, metadata={"prompt": 'a "cät"; =\n猫', "seed": 3, "lora": []})
    found, stream = read(path)
    assert stream.codec.name == "h264" and stream.average_rate == 24
    assert stream.codec_context.pix_fmt == "yuv420p"  # what every player can show
    assert found.shape == frames.shape
    # In the middle of the bars: half the color resolution blurs their edges. A
    # wrong color matrix is off by 20.
    assert np.abs(found[:, :, 12::24].astype(int) - frames[:, :, 12::24]).max() <= 6
    assert read_metadata(path) == {"prompt": 'a "cät"; =\n猫', "seed": 3, "lora": []}


def test_fractional_rates_and_single_frames(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", bars(1), fps=23.976, metadata={})
    found, stream = read(tmp_path / "a.mp4")
    assert len(found) == 1 and float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)


def test_equal_frames_make_equal_videos(tmp_path: Path) -> None:
    """Whatever lay in the memory that the encoder is given."""
    draw = np.random.default_rng(0)
    moving = np.stack([np.roll(draw.integers(0, 255, (32, 48, 3), np.uint8), shift, 1) for shift in range(9)])
    found, old = set(), []
    for _ in range(30):
        old = [draw.integers(0, 255, int(n)).astype(np.uint8) for n in draw.integers(1000, 400000, 9)]
        write_mp4(tmp_path / "a.mp4", moving, fps=8, metadata={"seed": 1})
        found.add((tmp_path / "a.mp4").read_bytes())
    assert len(found) == 1 and len(old) == 9


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, bars(), fps=8, metadata={})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_mp4(path, bars(), fps=8, metadata={"not json": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("frames", [bars().astype(np.float32), bars()[0], bars()[:0], bars()[..., :2]])
def test_only_rgb_frames_of_bytes(frames: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        write_mp4(tmp_path / "a.mp4", frames, fps=8, metadata={})


def test_a_file_without_parameters(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="no generation parameters"):
        read_metadata(tmp_path / "a.mp4")


def test_a_picture_is_exact_and_holds_its_parameters(tmp_path: Path) -> None:
    image, path = bars(1)[0], tmp_path / "new" / "a.png"
    write_png(path, image, metadata={"prompt": 'a "cät"\n猫', "seed": 3})
    with Image.open(path) as found:
        assert found.format == "PNG" and np.array_equal(np.asarray(found), image)
    assert read_metadata(path) == {"prompt": 'a "cät"\n猫', "seed": 3}
    Image.fromarray(image).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="no generation parameters"):
        read_metadata(tmp_path / "b.png")


@contextmanager
def no_file_above(n_bytes: int) -> Iterator[None]:
    """A disk that is full, as far as this process sees."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8)
    (tmp_path / "a.mp4").write_bytes(b"old")
    with no_file_above(2000):
        with pytest.raises(DataError, match=r"a\.mp4 cannot be written \(File too large\)"):
            write_mp4(tmp_path / "a.mp4", noise, fps=8, metadata={})
        with pytest.raises(DataError, match=r"a\.png cannot be written \(File too large\)"):
            write_png(tmp_path / "a.png", noise[0], metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_mp4(tmp_path / "file" / "a.mp4", noise, fps=8, metadata={})
