"""How much a merge that reconciles looks at and trains, where nobody says it: more LoRAs disturb each other
more. Measured on the tiny model with six words and with twelve (docs/loraid.md)."""

from __future__ import annotations

from dataclasses import dataclass

from hvtrain.config import ReconcileConfig

FEW = 8  # sets


@dataclass(frozen=True)
class Effort:
    """ReconcileConfig's, settled."""

    states: int
    steps: int
    new_noise: bool


_OF_FEW, _OF_MANY = Effort(48, 200, False), Effort(48, 400, True)


def effort(c: ReconcileConfig, n_sets: int) -> Effort:
    """`n_sets`: of LoRAs, and of those that are merges themselves, each of their own LoRAs'."""
    usual = _OF_FEW if n_sets <= FEW else _OF_MANY
    return Effort(
        usual.states if c.states is None else c.states, usual.steps if c.steps is None else c.steps,
        usual.new_noise if c.new_noise is None else c.new_noise
    )
