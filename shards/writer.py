"""Writing: one tar at a time, under its final name only when it is whole and on the disk."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from shards.atomic import atomic_path
from shards.schema import TarFile, check_key


def write_tar(
    root: Path, name: str, samples: Sequence[tuple[str, Mapping[str, Tensor], Mapping[str, Any]]]
) -> TarFile:
    """Write `root/name` from (key, tensors, meta) triples: KEY.safetensors and KEY.json each, as webdataset reads."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, tensors, meta in samples:
                _add(tar, f"{check_key(key)}.safetensors", save({k: t.contiguous() for k, t in tensors.items()}))
                _add(tar, f"{key}.json", json.dumps(dict(meta), ensure_ascii=False).encode())
        digest = sha256(temporary)
    return TarFile(name, path.stat().st_size, digest)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):  # hashlib.file_digest came with Python 3.11
            digest.update(block)
        return digest.hexdigest()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no owner, no time: equal samples make equal tars
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
