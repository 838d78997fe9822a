"""Where a run's numbers go, from one rank: TensorBoard, the same in metrics.jsonl, and Weights
& Biases if it is asked for."""

from __future__ import annotations

import io
import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shards import ShardSet

N_BINS = 10
HISTOGRAM_BINS = 30
WANDB_ID = "wandb.id"
# after which a row is in its file; a write for each of them costs a quick step more than what is in it
SEEN_S = 0.2


@dataclass(frozen=True)
class Gif:
    """An animation as TensorBoard and W&B play it without another package."""

    data: bytes
    height: int
    width: int


class Sink(Protocol):
    """A place for numbers, texts and pictures. `step` is the optimizer step."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, name: str, text: str) -> None: ...

    def histogram(self, name: str, step: int, values: np.ndarray) -> None: ...

    def video(self, name: str, step: int, gif: Gif) -> None: ...

    def flush(self) -> None:
        """Nothing of what was given so far is lost if the process is killed now."""

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As one event: forty calls of add_scalar take longer than a small model's step allows."""
        self._add(step, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def text(self, name: str, text: str) -> None:
        self.writer.add_text(name, f"```\n{text}\n```")

    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        self.writer.add_histogram(name, values, step, bins=HISTOGRAM_BINS)

    def video(self, name: str, step: int, gif: Gif) -> None:
        image = {"height": gif.height, "width": gif.width, "colorspace": 3, "encoded_image_string": gif.data}
        self._add(step, [{"tag": name, "image": image}])

    def _add(self, step: int, values: Sequence[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer._get_file_writer().add_summary(Summary(value=[Summary.Value(**v) for v in values]), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class JsonLines:
    """A row a step, for scripts and `hvtrain runs`."""

    def __init__(self, folder: Path) -> None:
        self.lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.flushed = -math.inf

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        if time.monotonic() - self.flushed >= SEEN_S:
            self.flush()

    def text(self, name: str, text: str) -> None: ...

    def histogram(self, name: str, step: int, values: np.ndarray) -> None: ...

    def video(self, name: str, step: int, gif: Gif) -> None: ...

    def flush(self) -> None:
        self.lines.flush()
        self.flushed = time.monotonic()

    def close(self) -> None:
        self.lines.close()


class WeightsAndBiases:
    """One run of theirs for one of ours, however often it is started again: its
    id lies beside the metrics."""

    def __init__(self, folder: Path, project: str, name: str) -> None:
        import wandb

        self.wandb, known = wandb, folder / WANDB_ID
        if not known.exists():
            known.write_text(secrets.token_hex(8))
        self.run = wandb.init(
            project=project, name=name, id=known.read_text(), resume="allow", dir=str(folder)
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, name: str, text: str) -> None:
        self.run.config.update({name: text}, allow_val_change=True)

    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        self.run.log({name: self.wandb.Histogram(values)}, step=step)

    def video(self, name: str, step: int, gif: Gif) -> None:
        self.run.log({name: self.wandb.Video(io.BytesIO(gif.data), format="gif")}, step=step)

    def flush(self) -> None: ...  # their own process has it already

    def close(self) -> None:
        self.run.finish()


class Metrics:
    """All sinks as one; does nothing on the other ranks (`folder` None)."""

    def __init__(
        self, folder: Path | None, *, purge_step: int | None = None, wandb: str | None = None, name: str = ""
    ) -> None:
        self.sinks: list[Sink] = []
        if folder is not None:
            self.sinks = [TensorBoard(folder, purge_step=purge_step), JsonLines(folder)]
            self.sinks += [WeightsAndBiases(folder, wandb, name)] if wandb else []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.scalars(step, values)

    def text(self, name: str, text: str) -> None:
        for sink in self.sinks:
            sink.text(name, text)

    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        for sink in self.sinks:
            sink.histogram(name, step, values)

    def video(self, name: str, step: int, frames: np.ndarray, *, fps: int) -> None:
        """uint8 [F H W 3]"""
        if not self.sinks:
            return
        from PIL import Image

        data, pictures = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
        ms = round(1000 / fps)
        pictures[0].save(data, format="GIF", save_all=True, append_images=pictures[1:], duration=ms, loop=0)
        for sink in self.sinks:
            sink.video(name, step, Gif(data.getvalue(), *frames.shape[1:3]))

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def loss_by_sigma(sigma: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """Mean loss of each tenth of the noise range that has samples."""
    bins = np.minimum((sigma * N_BINS).astype(int), N_BINS - 1)
    return {f"loss_by_sigma/{b / N_BINS:.1f}": mean for b, mean in _means(bins, loss)}


def names_of(sets: Sequence[ShardSet]) -> list[str]:
    """The last part of each one's path; numbered where two are called the same."""
    names = [found.name.rstrip("/").rpartition("/")[2] for found in sets]
    return [name if names.count(name) == 1 else f"{i}-{name}" for i, name in enumerate(names)]


def loss_by_set(names: Sequence[str], numbers: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """Mean loss of each shard set that has samples; nothing where there is only one."""
    return {f"loss_by_set/{names[i]}": mean for i, mean in _means(numbers, loss)} if len(names) > 1 else {}


def _means(numbers: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, float]]:
    """Of the values of each number that occurs."""
    counts, sums = np.bincount(numbers), np.bincount(numbers, values)
    for i in np.flatnonzero(counts).tolist():
        yield i, float(sums[i] / counts[i])
