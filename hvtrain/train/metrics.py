"""What a run reports: TensorBoard and the same numbers in metrics.jsonl, from one rank."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

N_BINS = 10


class Metrics:
    """Scalars, texts, histograms and videos of one run; does nothing on the other ranks."""

    def __init__(self, folder: Path | None, *, purge_step: int | None = None) -> None:
        self.writer, self.lines = None, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
            self.lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is None or self.lines is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        entry = {"step": step, "time": round(time.time(), 3), **finite}
        self.lines.write(json.dumps(entry) + "\n")
        self.lines.flush()

    def text(self, name: str, text: str) -> None:
        if self.writer is not None:
            self.writer.add_text(name, f"```\n{text}\n```")

    def histogram(self, name: str, step: int, values: np.ndarray) -> None:
        if self.writer is not None:
            self.writer.add_histogram(name, values, step)

    def video(self, name: str, step: int, frames: np.ndarray, *, fps: int) -> None:
        """uint8 [F H W 3], as an animated GIF: what TensorBoard plays (its own add_video needs one more package)."""
        if self.writer is None:
            return
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        pictures = [Image.fromarray(frame) for frame in frames]
        data = io.BytesIO()
        pictures[0].save(
            data, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
        )
        _, height, width, _ = frames.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data.getvalue())
        self.writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.lines is not None:
            self.lines.close()


def loss_by_sigma(sigma: np.ndarray, loss: np.ndarray) -> dict[str, float]:
    """Mean loss of each tenth of the noise range that has samples."""
    bins = np.minimum((sigma * N_BINS).astype(int), N_BINS - 1)
    return {f"loss_by_sigma/{b / N_BINS:.1f}": float(loss[bins == b].mean()) for b in sorted(set(bins.tolist()))}
