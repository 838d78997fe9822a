"""What a video is made of: a digest that is equal if, and only if, a run would make the same video again.

How ranks share the work, the attention kernel and where weights lie meanwhile are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hvtrain.config import GenerateConfig
from hvtrain.generate.requests import Request
from hvtrain.lorafiles.files import LoraFile
from hvtrain.weights.containers import fingerprint, open_weights


@dataclass(frozen=True)
class Sources:
    """Fingerprints of the files, with the settings that change what they compute."""

    sampling: str
    decoding: str

    def latents(self, request: Request) -> str:
        """Of a request's latents. The frame rate is written into the file only."""
        return _digest([self.sampling, {**asdict(request), "fps": None}])

    def video(self, request: Request) -> str:
        return _digest([self.latents(request), self.decoding, request.fps])


def sources_of(cfg: GenerateConfig, loras: list[tuple[LoraFile, float]], prints: Mapping[str, str]) -> Sources:
    """`prints`: the flavor's name, and fingerprints of the parts "dit", "text" and "vae"."""
    m = cfg.model
    how = [cfg.precision, m.dtype, m.quantize, m.quantize != "none" and m.fp8_matmul, m.fp8_text]
    changed = [(fingerprint(open_weights(lora.path)), factor) for lora, factor in loras if factor]
    return Sources(
        sampling=_digest([prints["flavor"], prints["dit"], prints["text"], how, changed]),
        decoding=_digest([prints["vae"], m.vae_dtype, asdict(m.vae_tiling)]),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
