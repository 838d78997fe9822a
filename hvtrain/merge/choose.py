"""What becomes of several LoRAs where the user has not said it: they are reconciled, if all that it takes is
there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hvtrain.config import ReconcileConfig
from hvtrain.config.merge import Reconciling
from hvtrain.errors import ConfigError
from hvtrain.merge.inputs import Inputs

DEFAULT: Reconciling = "fit+distill"


@dataclass(frozen=True)
class Chosen:
    """The way that a merge goes."""

    how: Reconciling  # none, or a way to reconcile
    by_itself: bool = False  # nobody asked for it
    why_not: str = ""  # there are several, nothing was said of them, and they cannot be reconciled

    def lines(self, keep: bool) -> Iterator[str]:
        """What to say of it. `keep`: clips of what the base knows are given."""
        if self.by_itself:
            held = "" if keep else "; what the base knows is held by --keep, where it is given"
            yield (
                f"reconciled by {self.how}, from the samples beside each (--on-overlap adds weights up "
                f"instead){held}"
            )
        if self.why_not:
            yield f"added up, by which they may disturb each other; they cannot be reconciled: {self.why_not}"


def choose(c: ReconcileConfig, inputs: Inputs, *, policy: bool, model: bool) -> Chosen:
    """`policy`: the user has said how weights are added up; `model`: it is given. Rows that no two share make
    no difference: a LoRA disturbs others by what it does to their inputs. Raises ConfigError where --samples
    or --keep are given for nothing."""
    if c.how != "auto":
        return Chosen(c.how)
    several = not policy and sum(multiplier != 0 for _, multiplier in inputs.loras) > 1
    why_not = _missing(c, inputs, model) if several else ""
    if several and not why_not:
        return Chosen(DEFAULT, by_itself=True)
    if c.samples or c.keep:
        raise ConfigError(
            f"{'samples' if c.samples else 'keep'} is for a merge that reconciles, and this one does not by "
            "itself: "
            + (why_not or ("--on-overlap decides" if policy else "there is one LoRA"))
            + "; give --reconcile fit, distill or fit+distill"
        )
    return Chosen("none", why_not=why_not)


def _missing(c: ReconcileConfig, inputs: Inputs, model: bool) -> str:
    """What is not there that reconciling takes; "": nothing."""
    from hvtrain.merge.reconcile import sources  # heavy

    if not model:
        return "the model that they change is not given (--dit)"
    for lora, multiplier in inputs.loras:
        if lora.whole or any(pair.magnitude is not None for pair in lora.pairs.values()):
            return f"{lora.path} changes more than a LoRA's pairs can say"
        if multiplier == 0:
            return f"{lora.path} is off"
    try:
        sources(c, inputs)
        inputs.built_on()
    except ConfigError as error:
        return str(error)
    return ""
