"""What a finished LoRA leaves for a later merge: a few samples of what it was trained on, as an
ordinary shard set beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shards import ShardSet
from shards.edit import pick
from shards.errors import ShardError

CALIBRATION = "calibration"


def leave_calibration(output: Path, sets: Sequence[ShardSet], n: int) -> None:
    """output/calibration with at most n samples, spread over the sets. `hvtrain merge --reconcile`
    then needs neither the data nor the run. A set that cannot be made is said, and no reason to call
    a finished training failed."""
    if not n:
        return
    try:
        pick([s.address for s in sets], output / CALIBRATION, n)
    except ShardError as error:
        print(
            f"warning: {output / CALIBRATION} was not made, and --reconcile will ask for samples: {error}",
            file=sys.stderr
        )
