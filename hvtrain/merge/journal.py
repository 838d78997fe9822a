"""What is solved already, block by block on the disk: a merge that is killed goes on where it was, and the
changes of a 13B model (36 GB as matrices) never lie in memory together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hvtrain.merge.changes import Change, Full, LowRank
from hvtrain.weights.outputs import writing
from shards.atomic import atomic_path

_KEY = "hvtrain.reconcile"
_STEPS = "muon.safetensors"  # named after the optimizer, whose state is in it: another's is not taken


def folder_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.reconcile")


def noted(output: Path) -> int:
    """Bytes of changes on the disk already."""
    return sum(path.stat().st_size for path in folder_of(output).glob("block-*.safetensors"))


class Journal:
    """Changes by block, valid for one signature: that of everything that they depend on."""

    def __init__(self, output: Path, signature: str) -> None:
        self.folder, self.signature = folder_of(output), signature

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"

    def save(self, block: int, solved: Mapping[str, Sequence[Change]]) -> None:
        tensors: dict[str, Tensor] = {}
        table = []
        for module, parts in solved.items():
            for number, part in enumerate(parts):
                own = (
                    {"matrix": part.matrix()}
                    if isinstance(part, Full) else {"down": part.down, "up": part.up}
                )
                tensors |= {f"{module}/{number}/{name}": t.contiguous() for name, t in own.items()}
                table.append([module, number, part.begin, getattr(part, "owner", "")])
        with writing(path := self._path(block)), atomic_path(path) as temporary:
            save_file(
                tensors, str(temporary),
                metadata={_KEY: json.dumps({"signature": self.signature, "parts": table})}
            )

    def load(self, block: int) -> dict[str, list[Change]] | None:
        """None: not solved yet, or for another merge. Matrices stay on the disk until they are used."""
        path = self._path(block)
        if not path.is_file():
            return None
        with safe_open(str(path), "pt") as file:
            note, names = json.loads(file.metadata()[_KEY]), set(file.keys())
        if note["signature"] != self.signature:
            return None
        found: dict[str, list[Change]] = {}
        for module, number, begin, owner in note["parts"]:
            read = partial(_read, path, f"{module}/{number}/")
            part: Change = Full(partial(read, "matrix"), begin)
            if f"{module}/{number}/down" in names:
                part = LowRank(read("down"), read("up"), begin, owner)
            found.setdefault(module, []).append(part)
        return found

    def save_steps(self, done: int, tensors: Sequence[Tensor]) -> None:
        note = {_KEY: json.dumps({"signature": self.signature, "steps": done})}
        own = {f"{i:06d}": t.contiguous() for i, t in enumerate(tensors)}
        with writing(path := self.folder / _STEPS), atomic_path(path) as temporary:
            save_file(own, str(temporary), metadata=note)

    def load_steps(self) -> tuple[int, list[Tensor]]:
        """Optimizer steps that are done, and what was saved after them."""
        path = self.folder / _STEPS
        if not path.is_file():
            return 0, []
        with safe_open(str(path), "pt") as file:
            note = json.loads(file.metadata()[_KEY])
            if note["signature"] != self.signature:
                return 0, []
            return note["steps"], [file.get_tensor(name) for name in sorted(file.keys())]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path, prefix: str, name: str) -> Tensor:
    with safe_open(str(path), "pt") as file:
        return file.get_tensor(prefix + name)
