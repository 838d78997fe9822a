"""What a video is made of: a digest that is equal if, and only if, a run would make the same video again.

How ranks share the work, the kernel of exact attention and where weights lie meanwhile are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvtrain.config import ModelConfig
from hvtrain.generate.loras import Applied
from hvtrain.generate.requests import Request
from hvtrain.weights.containers import fingerprint, open_weights
from hvtrain.weights.float8 import NO_PRODUCTS, Chosen


@dataclass(frozen=True)
class Sources:
    """Fingerprints of the files, with the settings that change what they compute."""

    sampling: str
    decoding: str
    images: Mapping[str, str] = field(default_factory=dict)  # path -> digest of what is in it

    def latents(self, request: Request) -> str:
        """Of a request's latents. The frame rate is written into the file only."""
        shown = {name: self.images[path] for name, path in request.files.items()}
        return _digest([self.sampling, {**asdict(request), "fps": None, **shown}])

    def video(self, request: Request) -> str:
        return _digest([self.latents(request), self.decoding, request.fps])


def sources_of(
    model: ModelConfig, loras: Sequence[Applied], prints: Mapping[str, Any], *, precision: str,
    images: Sequence[str] = (), float8: Chosen = NO_PRODUCTS,
) -> Sources:
    """`prints`: of the flavor, of every part and of sparse attention; that of "vae" is the pixels',
    the others are the latents'. `float8`: the layers whose products are."""
    m = model
    rounded = sorted(shape for shape, products in float8.items() if products.forward)
    how = [precision, m.dtype, m.quantize, rounded or False, m.fp8_text]
    changed = [
        (fingerprint(open_weights(one.lora.path)), one.multiplier, one.expert)
        for one in loras if one.multiplier
    ]
    vae = [prints["vae"], m.vae_dtype, asdict(m.vae_tiling)]
    begins = [vae] if images else []  # what an image becomes is the VAE's too
    return Sources(
        sampling=_digest(
            [{name: value for name, value in prints.items() if name != "vae"}, how, changed, begins]
        ),
        decoding=_digest(vae),
        images={path: image_digest(path) for path in images},
    )


def image_digest(path: str) -> str:
    """Of a picture's file, or of a folder of them by names and sizes."""
    if Path(path).is_dir():
        return _digest(sorted((p.name, p.stat().st_size) for p in Path(path).iterdir()))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
