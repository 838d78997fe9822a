"""What a LoRA file says about itself: the `ss_*`, `modelspec.*` and `sshs_*`
entries that other tools read."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from hvtrain.errors import CheckpointError
from hvtrain.models import all_specs
from hvtrain.models.spec import Flavor
from hvtrain.weights.stream import lay_out, tensor_bytes
from shards.tensors import Extent

PEFT_KEY = "lora_adapter_metadata"  # where diffusers keeps a PEFT configuration in a file
EXPERT_KEY = "hvtrain.expert"  # of a model of several: whose LoRA it is
LORA_FLAVOR_KEY = "hvtrain.flavor"  # as which it was trained: the model's file does not always tell
SPARSE_KEY = "hvtrain.sparse"  # attention was not exact in training: which pairs were left out
# what was in the model already: [{file, multiplier, and the sum if it has one}]
BASE_LORA_KEY = "hvtrain.base_lora"
SUM_KEY = "hvtrain.sha256"  # of the tensors' bytes in a file that hvtrain wrote
# the same by sd-scripts and musubi-tuner; other tools rewrite files and leave it as it was
SD_SUM_KEY = "sshs_model_hash"
_SPEC = "1.0.0"  # of https://github.com/Stability-AI/ModelSpec
_LEGACY = slice(0x100000, 0x110000)  # the 64 KiB at 1 MiB that the first web UIs hashed


def lora_metadata(
    path: Path, given: Mapping[str, object], *, architecture: str, rank: int, alpha: float,
) -> dict[str, str]:
    """The caller's entries, completed by those that every LoRA file needs. Values
    are text; containers are JSON."""
    made = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": {},
        "ss_output_name": path.stem,
        "modelspec.sai_model_spec": _SPEC,
        "modelspec.implementation": "hvtrain",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.now(timezone.utc).replace(microsecond=0, tzinfo=None).isoformat(),
    }
    own: Mapping[str, str] = {}
    if architecture:
        made["modelspec.architecture"] = f"{architecture}/lora"
        made["ss_base_model_version"] = architecture.replace("-", "_")
        own = next((spec.lora_about for spec in all_specs() if spec.name == architecture), {})
    full = {**made, **given}
    # another kind of adapter says so
    full |= {key: value for key, value in own.items() if full.get(key) == made[key]}
    return {key: _text(value) for key, value in full.items() if value is not None}


def of_flavor(flavor: Flavor) -> dict[str, str]:
    """What a LoRA's metadata say of the model that it is for."""
    return {
        "modelspec.resolution": f"{flavor.defaults.width}x{flavor.defaults.height}",
        LORA_FLAVOR_KEY: flavor.name
    }


def _text(value: object) -> str:
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    return value if isinstance(value, str) else str(value)


def model_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` as sd-scripts defines them, and the
    first as our readers' checksum.

    Both are taken from a file that holds these tensors and the `ss_*` entries only, so that later
    edits of the title do not change them. The first is the SHA-256 of all that follows the header,
    that is of the tensors' bytes in file order; the second is the first 8 digits of the SHA-256 of
    one 64 KiB window of the file.
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    head, placed = lay_out(file_order(tensors), kept)
    digest, window = hashlib.sha256(), bytearray(head[_LEGACY])
    for slot in placed:
        data = tensor_bytes(tensors[slot.name])
        digest.update(data)
        first, last = (max(0, edge - slot.start) for edge in (_LEGACY.start, _LEGACY.stop))
        window += data[first:last]
    return {
        SD_SUM_KEY: digest.hexdigest(),
        SUM_KEY: digest.hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8],
    }


def file_order(tensors: Mapping[str, torch.Tensor]) -> list[Extent]:
    """The order of the safetensors library's own writer: wide dtypes first
    (`lay_out` sees to it), then by name."""
    return [Extent(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)]


def other_architecture(metadata: Mapping[str, str], architecture: str) -> str | None:
    """What the file says that it was trained for, where that is not the model's `architecture`.

    Needed because names and shapes do not always tell: two published architectures
    share both for all their blocks.
    """
    own = _plain(architecture)
    for key in ("modelspec.architecture", "ss_base_model_version"):
        said = metadata.get(key, "").split("/")[0]
        if said and own not in _plain(said) and _plain(said) not in own:
            return said
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def json_entry(path: Path, metadata: Mapping[str, str], key: str) -> dict:
    """A table that is kept as JSON in an entry; empty if there is none."""
    table = _parsed(metadata.get(key, "{}"))
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{path}: damaged: its metadata '{key}' is no JSON table: {metadata[key][:60]!r}"
        )
    return table


def json_tables(path: Path, metadata: Mapping[str, str], key: str) -> list[dict]:
    """A list of tables that is kept so."""
    found = _parsed(metadata.get(key, "[]"))
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise CheckpointError(
            f"{path}: damaged: its metadata '{key}' is no JSON list of tables: {metadata[key][:60]!r}"
        )
    return found


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Under:
    """A LoRA that was in the model already when another was trained."""

    file: str
    multiplier: float
    sum: str | None  # None: other tools write none, and an older version did not note it

    @property
    def entry(self) -> dict[str, object]:
        told = {} if self.sum is None else {SUM_KEY: self.sum}
        return {"file": self.file, "multiplier": self.multiplier, **told}


def base_loras(path: Path, metadata: Mapping[str, str]) -> list[Under]:
    """Those that a LoRA was trained on top of. Raises CheckpointError."""
    found = []
    for one in json_tables(path, metadata, BASE_LORA_KEY):
        file, multiplier, total = one.get("file"), one.get("multiplier"), one.get(SUM_KEY)
        if (
            not isinstance(file, str) or not isinstance(multiplier, (int, float))
            or not abs(multiplier) <= sys.float_info.max or not isinstance(total, (str, type(None)))
        ):
            raise CheckpointError(
                f"{path}: damaged: its metadata '{BASE_LORA_KEY}' names no LoRA and multiplier: "
                f"{str(one)[:60]}"
            )
        found.append(Under(file, float(multiplier), total))
    return found


@dataclass(frozen=True)
class PeftAlpha:
    """The alphas that a PEFT configuration gives to layers; such files have no alpha tensors."""

    default: float | None
    patterns: Mapping[str, float]
    rank_stable: bool = False  # rsLoRA: the scale is alpha / sqrt(rank)

    @classmethod
    def parse(cls, path: Path, metadata: Mapping[str, str], prefix: str = "") -> PeftAlpha | None:
        """From a file's metadata, if it has any. The keys carry the component's prefix
        ("transformer."); of several, this."""
        if PEFT_KEY not in metadata:
            return None
        table = json_entry(path, metadata, PEFT_KEY)
        own = {key: value for key, value in table.items() if key.startswith(prefix)} or table
        config = {key.rpartition(".")[2]: value for key, value in own.items()}
        alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        numbers = [
            *([] if alpha is None else [alpha]),
            *(patterns.values() if isinstance(patterns, dict) else ["no table"])
        ]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise CheckpointError(
                f"{path}: its metadata '{PEFT_KEY}' holds alphas that are not numbers: {numbers[:3]}"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{path}: its metadata '{PEFT_KEY}' holds no pattern: '{pattern}' ({error})"
                ) from None
        return cls(alpha, patterns, bool(config.get("use_rslora")))

    def of(self, layer: str, rank: int) -> float:
        """As PEFT matches: a pattern is a regular expression for the name or for its last parts."""
        found = (
            alpha for key, alpha in self.patterns.items() if re.search(rf"(^|\.)({key.lstrip('^')})$", layer)
        )
        alpha = next(found, self.default if self.default is not None else float(rank))
        return float(alpha * rank**0.5 if self.rank_stable else alpha)
