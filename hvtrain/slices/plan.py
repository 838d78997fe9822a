"""LORAID slices: a model's LoRA targets cut into disjoint slots, so that LoRAs trained
apart cannot overwrite each other.

A plan cuts the ordered list of LoRA-target layers into N slices. Granularity says what is never divided:
whole blocks, whole layers ("module"), or single output rows of layers ("rows"). Order says who gets what:
"interleaved", so that every slice touches every depth, or "contiguous" ranges of the depth (the classic block
ranges, `blocks_per_loraid`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hvtrain.errors import CheckpointError, ConfigError
from hvtrain.registry import Registry
from shards.atomic import write_text

FORMAT = "hvtrain-slices/1"
FILE = "plan.json"
GRANULARITIES = Registry("granularity", dict.fromkeys(("block", "module", "rows")))
ORDERS = Registry("order", dict.fromkeys(("contiguous", "interleaved")))

Shapes = Mapping[str, tuple[int, int]]  # LoRA target -> [out, in], in the model's order


class Slot(NamedTuple):
    """Output rows begin to end of a layer."""

    module: str
    begin: int
    end: int


@dataclass(frozen=True)
class Slice:
    """What one LORAID may touch. Numbered from 1."""

    loraid: int
    parameters: int  # weights of the model in its slots
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class SlicePlan:
    model: str
    flavor: str
    base: str | None  # fingerprint of the model that the slices are trained on
    granularity: str
    order: str
    n: int
    blocks_per_loraid: int | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    slices: tuple[Slice, ...]

    @property
    def hash(self) -> str:
        """Of everything but the base: two plans with equal slots are the same plan."""
        body = {**self.body(), "base": None}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    @property
    def balance(self) -> float:
        """Largest slice over smallest."""
        sizes = [s.parameters for s in self.slices]
        return max(sizes) / min(sizes)

    def slice(self, loraid: int) -> Slice:
        if not 1 <= loraid <= self.n:
            raise ConfigError(
                f"LORAID {loraid}: this plan has {self.n} slices, 1 to {self.n}{self._extent()}"
            )
        return self.slices[loraid - 1]

    def _extent(self) -> str:
        if self.blocks_per_loraid is None:
            return ""
        blocks = sorted({block_of(slot.module) for s in self.slices for slot in s.slots}, key=_natural)
        return f" ({len(blocks)} blocks, {self.blocks_per_loraid} a LORAID)"

    def body(self) -> dict[str, Any]:
        rows = [
            {"loraid": s.loraid, "parameters": s.parameters,
             "slots": [{"module": slot.module, "rows": [slot.begin, slot.end]} for slot in s.slots]}
            for s in self.slices
        ]
        return {"format": FORMAT, **{k: v for k, v in asdict(self).items() if k != "slices"}, "slices": rows}


@dataclass(frozen=True)
class Cut:
    """How to cut; exactly one of n and blocks_per_loraid. None: module and interleaved, in which slices learn
    and merge best (docs/loraid.md); with blocks_per_loraid block and contiguous, which it means."""

    n: int | None = None
    blocks_per_loraid: int | None = None
    granularity: str | None = None
    order: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def settled(self) -> tuple[str, str]:
        """Granularity and order."""
        usual = ("module", "interleaved") if self.blocks_per_loraid is None else ("block", "contiguous")
        return self.granularity or usual[0], self.order or usual[1]


def make_plan(shapes: Shapes, cut: Cut, *, model: str, flavor: str, base: str | None = None) -> SlicePlan:
    """Cut `shapes` (the model's LoRA targets). Raises ConfigError for an impossible
    cut, saying what is possible."""
    granularity, order = cut.settled()
    _check(cut, granularity, order)
    layers = chosen(shapes, include=cut.include, exclude=cut.exclude)
    blocks = _blocks(layers)
    if cut.blocks_per_loraid is not None:
        width = cut.blocks_per_loraid
        names = list(blocks)
        groups = [[m for b in names[i : i + width] for m in blocks[b]] for i in range(0, len(names), width)]
        dealt = [[Slot(m, 0, layers[m][0]) for m in group] for group in groups]
    else:
        assert cut.n is not None
        dealt = _DEAL[granularity](layers, blocks, cut.n, order)
    slices = tuple(
        Slice(i, sum((s.end - s.begin) * layers[s.module][1] for s in slots), tuple(slots))
        for i, slots in enumerate(dealt, start=1)
    )
    return SlicePlan(
        model, flavor, base, granularity, order, len(slices), cut.blocks_per_loraid, cut.include, cut.exclude,
        slices
    )


def _check(cut: Cut, granularity: str, order: str) -> None:
    if (cut.n is None) == (cut.blocks_per_loraid is None):
        raise ConfigError("give either --n (how many slices) or --blocks-per-loraid (blocks in each)")
    GRANULARITIES.find(granularity, key="--granularity")
    ORDERS.find(order, key="--order")
    for option, number in (("--n", cut.n), ("--blocks-per-loraid", cut.blocks_per_loraid)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} {number}: expected 1 or more")
    if cut.blocks_per_loraid is not None and (granularity, order) != ("block", "contiguous"):
        raise ConfigError(
            "--blocks-per-loraid cuts contiguous blocks; with another granularity or order give --n"
        )


def chosen(shapes: Shapes, *, include: Sequence[str], exclude: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Whitelist first, blacklist overrides. Patterns are regular expressions for the whole name."""
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            try:
                hit = any(re.fullmatch(pattern, name) for name in shapes)
            except re.error as error:
                raise ConfigError(f"{option}: '{pattern}' is no regular expression: {error}") from None
            if not hit:
                raise ConfigError(
                    f"{option}: '{pattern}' matches no layer; an example of a name: {next(iter(shapes))}"
                )
    kept = {n: s for n, s in shapes.items() if not include or any(re.fullmatch(p, n) for p in include)}
    kept = {n: s for n, s in kept.items() if not any(re.fullmatch(p, n) for p in exclude)}
    if not kept:
        raise ConfigError("--include and --exclude leave no layer")
    return kept


def block_of(module: str) -> str:
    match = re.match(r"(.*?blocks\.\d+)\.", module)
    return match[1] if match else module


def _natural(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _blocks(layers: Shapes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for module in layers:
        found.setdefault(block_of(module), []).append(module)
    return found


# --- dealing ------------------------------------------------------------------------------------------------


def _deal_blocks(layers: Shapes, blocks: Mapping[str, list[str]], n: int, order: str) -> list[list[Slot]]:
    if n > len(blocks):
        raise ConfigError(
            f"{n} slices of whole blocks: the model has {len(blocks)} blocks, so at most that many; "
            f"--granularity module makes up to {len(layers)}, --granularity rows more"
        )
    costs = [sum(layers[m][0] * layers[m][1] for m in modules) for modules in blocks.values()]
    where = _shares(costs, n, order)
    return [
        [Slot(m, 0, layers[m][0]) for b, w in zip(blocks, where) if w == i for m in blocks[b]]
        for i in range(n)
    ]


def _deal_modules(layers: Shapes, blocks: Mapping[str, list[str]], n: int, order: str) -> list[list[Slot]]:
    if n > len(layers):
        raise ConfigError(
            f"{n} slices of whole layers: the model has {len(layers)} LoRA targets, so at most that many; "
            "--granularity rows makes more"
        )
    where = _shares([out * width for out, width in layers.values()], n, order)
    return [[Slot(m, 0, layers[m][0]) for m, w in zip(layers, where) if w == i] for i in range(n)]


def _deal_rows(layers: Shapes, blocks: Mapping[str, list[str]], n: int, order: str) -> list[list[Slot]]:
    least = min(out for out, _ in layers.values())
    if order == "interleaved":
        if n > least:
            raise ConfigError(
                f"{n} interleaved slices of rows: the smallest layer has {least} output rows, so at most "
                "that many; use --order contiguous, or exclude that layer"
            )
        return _every_layer(layers, n)
    total = sum(out for out, _ in layers.values())
    if n > total:
        raise ConfigError(
            f"{n} slices of rows: all layers together have {total} output rows, so at most that many"
        )
    return _ranges(layers, n)


_DEAL = {"block": _deal_blocks, "module": _deal_modules, "rows": _deal_rows}


def _shares(costs: Sequence[int], n: int, order: str) -> list[int]:
    """Which slice each item goes to. Interleaved: the dearest first, each to the slice that has
    least; equal ones, taken in the model's order, go round and so reach every depth. Contiguous: the
    more even of two ways to cut."""
    if order == "interleaved":
        loads, where = [0] * n, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
            where[number] = loads.index(min(loads))
            loads[where[number]] += costs[number]
        return where
    ends = min((_by_limit(costs, n), _by_quantile(costs, n)), key=lambda ends: _ratio(costs, ends))
    return [next(i for i, end in enumerate(ends) if number < end) for number in range(len(costs))]


def _ratio(costs: Sequence[int], ends: Sequence[int]) -> float:
    sums = [sum(costs[a:b]) for a, b in pairwise([0, *ends])]
    return max(sums) / min(sums)


def _by_quantile(costs: Sequence[int], n: int) -> list[int]:
    """Ends of n ranges, each cut where the sum so far is nearest to i / n of all."""
    sums = list(accumulate(costs))
    ends: list[int] = []
    for i in range(1, n):
        first = ends[-1] + 1 if ends else 1
        last = len(costs) - (n - i)
        ends.append(min(range(first, last + 1), key=lambda end: abs(sums[end - 1] - sums[-1] * i / n)))
    return [*ends, len(costs)]


def _by_limit(costs: Sequence[int], n: int) -> list[int]:
    """Ends of n ranges with the smallest possible largest one."""
    low, high = max(costs), sum(costs)
    while low < high:  # the smallest limit for which n ranges suffice
        limit = (low + high) // 2
        low, high = (low, limit) if len(_pack(costs, limit)) <= n else (limit + 1, high)
    ends = _pack(costs, low)
    while len(ends) < n:  # fewer ranges than wanted: halve the widest that can be
        begins = [0, *ends]
        i = max(
            (i for i in range(len(ends)) if ends[i] - begins[i] > 1),
            key=lambda i: sum(costs[begins[i] : ends[i]])
        )
        ends.insert(i, begins[i] + (ends[i] - begins[i]) // 2)
    return ends


def _pack(costs: Sequence[int], limit: int) -> list[int]:
    """Ends of the ranges that result from filling each up to `limit`."""
    ends, load = [], 0
    for i, cost in enumerate(costs):
        if load + cost > limit:
            ends.append(i)
            load = 0
        load += cost
    return [*ends, len(costs)]


def _every_layer(layers: Shapes, n: int) -> list[list[Slot]]:
    """Each layer's rows in n parts. Which slice gets which part goes round from layer to layer: else one
    slice would own all queries, another all values."""
    dealt: list[list[Slot]] = [[] for _ in range(n)]
    for number, (module, (out, _)) in enumerate(layers.items()):
        edges = [out * i // n for i in range(n + 1)]
        for i in range(n):
            part = (i + number) % n
            dealt[i].append(Slot(module, edges[part], edges[part + 1]))
    return dealt


def _ranges(layers: Shapes, n: int) -> list[list[Slot]]:
    """All rows in the model's order, cut where the weights before are i / n of all."""
    widths = [width for _, width in layers.values()]
    begins = [0, *accumulate(out * width for out, width in layers.values())]
    dealt: list[list[Slot]] = [[] for _ in range(n)]
    for number, (module, (out, _)) in enumerate(layers.items()):
        edges = {0, out}
        for i in range(1, n):
            row = round((begins[-1] * i / n - begins[number]) / widths[number])
            if 0 < row < out:
                edges.add(row)
        rows = sorted(edges)
        for a, b in pairwise(rows):
            middle = begins[number] + (a + b) / 2 * widths[number]
            dealt[min(n - 1, int(middle * n / begins[-1]))].append(Slot(module, a, b))
    if not all(dealt):
        raise ConfigError(f"{n} slices of rows: some would be empty; choose fewer")
    return dealt


# --- files --------------------------------------------------------------------------------------------------


def save_plan(plan: SlicePlan, path: str | Path) -> None:
    body = plan.body()
    rows = body.pop("slices")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({**body, "hash": plan.hash}, indent=1)[:-2]
    write_text(path, f'{head},\n "slices": [\n{lines}\n ]\n}}\n')


def load_plan(path: str | Path) -> SlicePlan:
    """Raises ConfigError if the file is no plan, was edited by hand, or gives one row to two slices."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ConfigError(f"{path}: format {raw['format']!r}, expected {FORMAT!r}")
        slices = tuple(
            Slice(s["loraid"], s["parameters"], tuple(Slot(t["module"], *t["rows"]) for t in s["slots"]))
            for s in raw["slices"]
        )
        plan = SlicePlan(
            raw["model"], raw["flavor"], raw["base"], raw["granularity"], raw["order"], raw["n"],
            raw["blocks_per_loraid"], tuple(raw["include"]), tuple(raw["exclude"]), slices,
        )
        said = raw["hash"]
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); `hvtrain slices plan` writes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a slice plan ({type(error).__name__}: {error})") from None
    if said != plan.hash:
        raise ConfigError(
            f"{path}: was changed after it was made (its hash does not fit); `hvtrain slices plan` makes it "
            "anew"
        )
    check_disjoint(plan, path)
    return plan


def check_disjoint(plan: SlicePlan, where: object = "plan") -> None:
    seen: dict[str, list[tuple[int, int, int]]] = {}
    for s in plan.slices:
        for slot in s.slots:
            for begin, end, other in seen.get(slot.module, []):
                if slot.begin < end and begin < slot.end:
                    raise ConfigError(
                        f"{where}: slices {other} and {s.loraid} both own rows of {slot.module}"
                    )
            seen.setdefault(slot.module, []).append((slot.begin, slot.end, s.loraid))


def check_fits(
    plan: SlicePlan, *, model: str, shapes: Shapes, base: str | None = None, where: object = "plan"
) -> None:
    """Refuse a plan that was made for another model. `shapes`: [out, in] of all Linear layers."""
    if plan.model != model:
        raise CheckpointError(f"{where}: made for {plan.model}, this is {model}")
    for slot in (slot for s in plan.slices for slot in s.slots):
        if slot.module not in shapes or shapes[slot.module][0] < slot.end:
            found = "no such layer" if slot.module not in shapes else f"{shapes[slot.module][0]} output rows"
            raise CheckpointError(
                f"{where}: owns rows {slot.begin} to {slot.end} of {slot.module}, this model has {found} "
                "there"
            )
    if base is not None and plan.base is not None and base != plan.base:
        raise CheckpointError(
            f"{where}: made for the weights {plan.base[:16]}, these are {base[:16]}: slices of different "
            "models do not merge; give the same model.dit, or make a new plan"
        )

