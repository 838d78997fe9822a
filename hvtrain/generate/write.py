"""From latents to files: the VAE and the parameters that go into a file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hvtrain import __version__
from hvtrain.errors import DataError, HvtrainError
from hvtrain.generate.conditions import free
from hvtrain.generate.plan import Lot, Plan, dit_names
from hvtrain.generate.requests import Job, Request
from hvtrain.generate.spool import find, forget
from hvtrain.generate.stop import Stop, Stopped
from hvtrain.generate.tiles import Tiles, collect, cut, decode_own, join
from hvtrain.generate.video import write_video
from hvtrain.models.parts import open_vae
from hvtrain.models.video_vae import VideoVae
from hvtrain.parallel.context import ParallelContext

T = TypeVar("T")


def decode(vae: Any, latents: Tensor) -> list[np.ndarray]:
    """Each video's frames, uint8 [F H W 3]; one video at a time goes through the VAE."""
    # Contiguous, as those that were on the disk are: another layout rounds
    # otherwise, and H.264 makes much of it.
    return [to_bytes(vae.decode(one.contiguous())[0]) for one in latents.split(1)]


def to_bytes(video: Tensor) -> np.ndarray:
    """[3 F H W] in [-1, 1] -> uint8 [F H W 3]: -1 is 0, 1 is 255, and in between the nearest."""
    return (video * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


class Writer:
    """From latents on the disk to files. The VAE is opened for the first and waits in host memory between two
    lots, so that a video is decoded when it is sampled although the device belongs to the DiT."""

    def __init__(self, plan: Plan, *, ctx: ParallelContext, stop: Stop, save_latents: bool = False) -> None:
        self.plan, self.ctx, self.stop, self.save_latents = plan, ctx, stop, save_latents
        self.vae: Any = None
        self.written: set[Path] = set()  # of a lot that is tried again, some may be
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None  # the file that is being written

    def write(self, lot: Lot, *, beside: bool = False) -> bool:
        """False if a device has no room for the VAE beside the DiT. The first of the ranks that share the
        videos writes; where the VAE cuts a video, all of them decode. Collective among them; raises Stopped
        on all, with what is not written still on the disk."""
        room = True
        try:
            self._write(lot)
        except Stopped:
            pass  # said below
        except torch.OutOfMemoryError as error:
            if not beside:
                raise self._too_large(lot, error) from None
            room = False
            if self.ctx.sp_rank == 0:
                print(
                    f"{self.ctx.device}: no room for the VAE beside the DiT; decoding is left to the end",
                    flush=True
                )
        self._leave_device()
        self.stop.check()
        return room

    def close(self) -> None:
        """When the last file is there. Raises what went wrong with it."""
        self.thread.shutdown()
        self._finish()

    def _finish(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _write(self, lot: Lot) -> None:
        for job in lot.jobs:
            if job.output not in self.written:
                video = self._decode(self._together(partial(self._latents, job)))
                if video is not None:
                    self._save(job, video)
                self.written.add(job.output)

    def _latents(self, job: Job) -> Tensor | None:
        """[1 C T h w] on the first rank."""
        if self.ctx.sp_rank:
            return None
        kept = find(job.output, self.plan.sources.latents(job.request))
        if kept is None or kept.step < job.request.steps:
            raise DataError(
                f"{job.output}: its latents are gone from the disk; start again to sample it anew"
            )
        self._open()
        return kept.x[None]

    def _decode(self, latents: Tensor | None) -> Tensor | None:
        """[3 F H W] on the first rank."""
        tiles = self._together(lambda: self._cut(latents))
        if not self.stop.any_peer(tiles is not None and len(tiles.cuts) > 1):
            return self._together(lambda: None if latents is None else self.vae.decode(latents)[0])
        said = [latents]
        dist.broadcast_object_list(said, group=self.ctx.sp_group, group_src=0)
        latents = said[0]
        assert latents is not None

        def own() -> list[Tensor]:
            nonlocal tiles
            self._open()
            tiles = tiles or cut(self.vae, latents)
            return decode_own(tiles, self.ctx)

        mine = self._together(own)
        assert tiles is not None
        every = collect(mine, tiles, self.vae, self.ctx)
        return self._together(lambda: join(every, self.vae, latents)[0] if every else None)

    def _cut(self, latents: Tensor | None) -> Tiles | None:
        """On the first rank, where others can help it."""
        if latents is None or self.ctx.sp == 1 or not isinstance(self.vae, VideoVae):
            return None
        return cut(self.vae, latents)

    def _together(self, do: Callable[[], T]) -> T:
        """What `do` gives on this rank. If one is stopped or out of memory, all that share the video are."""
        error: Exception | None = None
        try:
            self._leave_in_time()
            result = do()
        except (Stopped, torch.OutOfMemoryError) as raised:
            error = raised
        if self.stop.any_peer(isinstance(error, Stopped)):
            raise Stopped
        if self.stop.any_peer(error is not None):
            raise error or torch.OutOfMemoryError("another GPU that shares the video has no room")
        return result

    def _open(self) -> None:
        if self.vae is None:
            self.vae = open_vae(self.plan.spec, self.plan.model, self.ctx.device)
            modules = getattr(self.vae, "model", None)
            for module in modules.modules() if isinstance(modules, torch.nn.Module) else ():
                module.register_forward_pre_hook(self._leave_in_time)
        self.vae.to(self.ctx.device)

    def _save(self, job: Job, video: Tensor) -> None:
        """A file, by a thread: the GPUs go on meanwhile."""
        if not torch.isfinite(video).all():
            raise DataError(
                f"{job.output}: the VAE makes values that are not finite in model.vae_dtype "
                f"{self.plan.model.vae_dtype}; start again with bfloat16 or float32: the latents are kept, "
                "only decoding is done again"
            )
        about = {**parameters(self.plan, job.request), "identity": self.plan.sources.video(job.request)}
        frames = to_bytes(video)

        def save() -> None:
            write_video(job.output, frames, fps=job.request.fps, metadata=about)
            forget(job.output, save=self.save_latents)
            print(f"{job.output}", flush=True)

        self._finish()
        self.pending = self.thread.submit(save)

    def _leave_in_time(self, *_: object) -> None:
        """Decoding a large video takes minutes, and nothing is lost by breaking it off."""
        if self.stop.noted:
            raise Stopped

    def _leave_device(self) -> None:
        if self.vae is not None:
            self.vae.to("cpu")
        free(self.ctx.device)

    def _too_large(self, lot: Lot, error: Exception) -> HvtrainError:
        r = lot.jobs[0].request
        return HvtrainError(
            f"out of memory on {self.ctx.device} in decoding {r.width} x {r.height} x {r.frames} frames: "
            "lower model.vae_tiling.spatial or .temporal, and start again: the latents are kept. "
            f"{str(error).splitlines()[0][:200]}"
        )


def parameters(plan: Plan, request: Request) -> dict[str, Any]:
    """What goes into a video file: enough to make the same video again."""
    return {
        **request.values,
        **{name: Path(path).name for name, path in request.files.items()},
        "model": plan.spec.name,
        "flavor": plan.flavor.name,
        "dit": dit_names(plan),
        "lora": [
            {
                "file": Path(one.lora.path).name, "multiplier": one.multiplier,
                **({"expert": one.expert} if one.expert else {})
            }
            for one in plan.loras
        ],
        "precision": plan.compute.precision,
        **({"sparse": plan.compute.sparse.sampled} if plan.compute.sparse.sampled else {}),
        "hvtrain": __version__,
    }
