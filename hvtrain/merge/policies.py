"""LoRAs that change the same rows of the same layer: who overwrites whom, and the named ways to reconcile
them.

`sum`, `average`, `orthogonal` and `priority` keep low-rank pairs; `ties` and `dare` choose single elements of
the deltas and make dense matrices. A policy is one decorated function over the contributions to one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.lorafiles.overlap import Contribution, overlaps
from hvtrain.registry import Registry
from hvtrain.rng import generator


@dataclass(frozen=True)
class Dense:
    """A layer's whole change, [out, in] float32."""

    delta: Callable[[], Tensor]


Result = list[Contribution] | Dense


@dataclass(frozen=True)
class Options:
    """density: the share of elements that ties keeps by size, or that dare keeps by chance."""

    density: float | None = None
    seed: int = 0
    why_not: str = ""  # reconciled by what they do


Policy = Callable[[Sequence[Contribution], str, Options], Result]
POLICIES: Registry[Policy] = Registry("policy")


@POLICIES.add("error")
def _error(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """Refuse."""
    for shared in overlaps({module: found}):
        others = ", ".join(name for name in POLICIES if name != "error")
        why_not = f" (by what each does they cannot be: {options.why_not})" if options.why_not else ""
        raise CheckpointError(
            f"{shared.first} and {shared.second} both change {shared.n_rows} rows of '{module}': added up, "
            "neither is what it was trained to be. Train them as slices of one plan, or say how to reconcile "
            f"them: --on-overlap {others}{why_not}"
        )
    return list(found)


# --- low-rank -----------------------------------------------------------------------------------------------


@POLICIES.add("sum")
def _sum(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """All of each: overlapping changes add up, and may become too strong."""
    return list(found)


@POLICIES.add("average")
def _average(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """A row counts for each LoRA by one over the number of those that change it."""
    n = torch.stack([c.rows for c in found]).sum(dim=0).clamp_min(1)
    return [_with_up(c, c.pair.up.float() / n[:, None]) for c in found]


@POLICIES.add("priority")
def _priority(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """The LoRA that is given first keeps its rows; later ones have only the rows that are left."""
    taken = torch.zeros(len(found[0].pair.up), dtype=torch.bool)
    kept = []
    for c in found:
        kept.append(_with_up(c, c.pair.up.float() * ~taken[:, None]))
        taken |= c.rows
    return kept


@POLICIES.add("orthogonal")
def _orthogonal(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """A later LoRA no longer answers to input directions that an earlier one reads: its down-projection is
    projected onto what theirs leave (Gram-Schmidt over the row spaces; cf. O-LoRA, arXiv 2310.14152)."""
    seen: list[Tensor] = []
    kept = []
    for c in found:
        down = c.pair.down.double()
        if seen:
            basis = torch.linalg.qr(torch.cat(seen).T).Q  # [in, r]
            down = down - (down @ basis) @ basis.T
        seen.append(c.pair.down.double())
        kept.append(replace(c, pair=replace(c.pair, down=down.float())))
    return kept


def _with_up(c: Contribution, up: Tensor) -> Contribution:
    return replace(c, pair=replace(c.pair, up=up))


# --- dense --------------------------------------------------------------------------------------------------


@POLICIES.add("ties")
def _ties(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """TIES (arXiv 2306.01708): keep each delta's largest elements, elect the sign with the greater sum,
    average those that agree with it. Density 0.2 unless given."""
    density = 0.2 if options.density is None else options.density

    def delta() -> Tensor:
        total = torch.zeros(found[0].pair.up.shape[0], found[0].pair.down.shape[1])
        for c in found:
            total += _largest(c.delta(), density)
        sign = total.sign()
        summed, n = torch.zeros_like(total), torch.zeros_like(total)
        for c in found:
            kept = _largest(c.delta(), density)
            agree = (kept.sign() == sign) & (kept != 0)
            summed += torch.where(agree, kept, 0.0)
            n += agree
        return summed / n.clamp_min(1)

    return Dense(delta)


@POLICIES.add("dare")
def _dare(found: Sequence[Contribution], module: str, options: Options) -> Result:
    """DARE (arXiv 2311.03099): keep each element by chance, rescale what stays by one over that chance,
    add. Density 0.5 unless given."""
    density = 0.5 if options.density is None else options.density

    def delta() -> Tensor:
        total = torch.zeros(found[0].pair.up.shape[0], found[0].pair.down.shape[1])
        for number, c in enumerate(found):
            draw = generator(options.seed, stream=f"dare/{number}/{module}")
            kept = torch.rand(total.shape, generator=draw) < density
            total += torch.where(kept, c.delta() / density, 0.0)
        return total

    return Dense(delta)


def _largest(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but its largest share of elements set to 0."""
    n = delta.numel() - max(1, round(density * delta.numel()))
    if n <= 0:
        return delta
    limit = delta.abs().flatten().kthvalue(n).values
    return torch.where(delta.abs() > limit, delta, 0.0)


# --- use ----------------------------------------------------------------------------------------------------


def combine(layers: dict[str, list[Contribution]], policy: str, options: Options) -> dict[str, Result]:
    """Each layer by the policy. Layers that one LoRA changes alone are left as they are."""
    if options.density is not None and policy not in ("ties", "dare"):
        raise ConfigError(f"--density is for --on-overlap ties and dare, not for {policy}")
    combined: dict[str, Result] = {}
    for module, found in layers.items():
        shared = any(True for _ in overlaps({module: found}))
        if shared and policy not in ("error", "sum") and any(c.pair.magnitude is not None for c in found):
            raise ConfigError(
                f"--on-overlap {policy}: '{module}' is changed by a DoRA, whose change no policy can cut; "
                "use sum"
            )
        combined[module] = POLICIES[policy](found, module, options) if shared else list(found)
    return combined
