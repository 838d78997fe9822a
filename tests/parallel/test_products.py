"""Which products of a float8 model are in float8: by measurement, by word, and never where they cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.config import DataConfig, ModelConfig, asset
from hvtrain.errors import ConfigError
from hvtrain.generate import plan
from hvtrain.models.load import float8_shapes, identify, load_dit
from hvtrain.parallel import products
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.products import GAIN, Layer, check_products, missing, note, pick_products
from hvtrain.train import prepare
from hvtrain.weights import float8_tokens
from hvtrain.weights.float8 import Products, use_products
from tests.parallel.ranks import run_ranks
from tests.weights.scaled import ScaledProduct, needs_compiler

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
ALONE = ParallelContext()
SHAPES = {(48, 64), (64, 48), (40, 64)}
TINY = asset("tiny:dit.safetensors")


@pytest.fixture
def able(monkeypatch) -> ScaledProduct:
    """A CPU that multiplies float8 as a GPU does."""
    made = ScaledProduct()
    monkeypatch.setattr(torch, "_scaled_mm", made)
    monkeypatch.setattr(products, "missing", lambda device, dtype: None)
    return made


def clock(monkeypatch, **seconds: float) -> list[str]:
    """Products that take so long, by no real clock: in turn float8 and dequantised, forward and backward."""
    asked: list[str] = []
    names = ["float8", "dequantised"]

    def timed(work, device):
        work()
        asked.append(names[len(asked) % 2])
        return seconds[asked[-1]]

    monkeypatch.setattr(products, "timed", timed)
    return asked


def pick(setting, tmp_path, *, ctx=ALONE, learns=True, tokens=100, shapes=SHAPES, factors=True):
    return pick_products(
        setting, shapes, ctx, dtype=BF16, tokens=tokens, learns=learns, factors=factors,
        kept=tmp_path / "cache/p.json"
    )


# --- where there are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "says"),
    [
        ((8, 0), BF16, r"NVIDIA X \(compute capability 8.0\) has no float8 products"),
        ((8, 9), torch.float32, "float8 products give bfloat16, and precision is fp32"), ((8, 9), BF16, None),
        ((9, 0), BF16, None),
    ],
)
def test_which_devices_have_them(capability, dtype, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    if says is None:
        assert missing(GPU, dtype) is None
        check_products(True, "fp8", device=GPU, dtype=dtype)
    else:
        with pytest.raises(ConfigError, match=f"model.fp8_matmul is true, but {says}.*use auto"):
            check_products(True, "fp8", device=GPU, dtype=dtype)


def test_true_is_refused_on_a_cpu_and_what_needs_no_float8_is_not(tmp_path):
    with pytest.raises(ConfigError, match="true, but this device, a CPU, has no float8 products; use auto"):
        check_products(True, "fp8", device=CPU, dtype=BF16)
    for setting, quantize in ((True, "none"), ("auto", "fp8"), (False, "fp8")):
        check_products(setting, quantize, device=CPU, dtype=BF16)
        assert pick(setting, tmp_path) == {}


# --- the choice ---------------------------------------------------------------------------------------------


def test_by_word(able, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "_faster", lambda *asked: 1 / 0)  # nothing is measured
    assert pick(True, tmp_path) == {(48, 64): Products(True, True), (64, 48): Products(True, True)}
    assert pick(True, tmp_path, learns=False) == dict.fromkeys([(48, 64), (64, 48)], Products(True, False))
    assert pick(False, tmp_path) == pick("auto", tmp_path, shapes={(40, 64)}) == {}


@needs_compiler
@pytest.mark.parametrize("learns", [False, True])
def test_what_is_faster_is_taken_and_kept(learns, able, tmp_path, monkeypatch, caplog):
    asked = clock(monkeypatch, float8=1.0, dequantised=GAIN + 0.01)
    with caplog.at_level(logging.INFO):
        found = pick("auto", tmp_path, learns=learns)
    assert found == dict.fromkeys([(48, 64), (64, 48)], Products(True, learns))
    assert len(asked) == (8 if learns else 4)
    assert able.fast.count(True) == (0 if learns else len(able.fast))  # sums as they will be made
    begin = "float8 product, forward 64 -> 48 at 1,024 tokens: 1000.00 ms"
    told = [m for m in caplog.messages if m.startswith(begin)]
    assert len(told) == 1 and "dequantised 1060.00, error 0.0" in told[0]
    kept = json.loads((tmp_path / "cache/p.json").read_text())
    assert len(kept) == 2 and set(kept.values()) == {"both" if learns else "forward"}
    assert all(part in key for key in kept for part in ("CPU", torch.__version__, "float8", "1024"))
    clock(monkeypatch, float8=9.0, dequantised=1.0)
    for tokens in (100, 2000):
        assert pick("auto", tmp_path, tokens=tokens, learns=learns) == found
    # another class of token counts, the other use and weights without factors are other questions
    none = dict.fromkeys(found, Products())
    assert pick("auto", tmp_path, tokens=2100, learns=learns) == none
    assert pick("auto", tmp_path, learns=not learns) == pick("auto", tmp_path, factors=False) == none


def test_it_must_earn_its_rounding(able, tmp_path, monkeypatch):
    clock(monkeypatch, float8=1.0, dequantised=GAIN - 0.01)
    assert set(pick("auto", tmp_path).values()) == {Products()}


def test_forward_and_backward_are_chosen_apart(able, tmp_path, monkeypatch):
    times = iter([2.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(products, "timed", lambda work, device: next(times))
    assert pick("auto", tmp_path, shapes={(48, 64)}) == {(48, 64): Products(False, True)}


def wrong_from(tokens: int, how):
    """A kernel that is wrong for exactly so many tokens."""
    right = ScaledProduct()

    def product(a, b, **options):
        out = right(a, b, **options)
        return how(out) if len(a) == tokens else out

    return product


@pytest.mark.parametrize("tokens", [1, 17, 1023, 1024])
@pytest.mark.parametrize("how", ["nan", "last", "scale"])
def test_what_is_wrong_is_not_taken_however_fast(tokens, how, able, tmp_path, monkeypatch, caplog):
    def spoilt(out):
        out = out.clone()
        if how == "nan":
            out[-1, 3] = float("nan")
        elif how == "last":
            out[-1] = 0
        else:
            out *= 1.1
        return out

    monkeypatch.setattr(torch, "_scaled_mm", wrong_from(tokens, spoilt))
    clock(monkeypatch, float8=1.0, dequantised=2.0)
    assert pick("auto", tmp_path, shapes={(48, 64)}) == {(48, 64): Products()}
    assert [m.partition(":")[0] for m in caplog.messages] == [
        f"float8 product, {way} at 1,024 tokens" for way in ("forward 64 -> 48", "backward 64 -> 48")
    ]
    assert all("wrong on this device: error" in m for m in caplog.messages)


@needs_compiler
def test_what_fails_is_not_taken_and_a_full_memory_is_not_kept(able, tmp_path, monkeypatch, caplog):
    clock(monkeypatch, float8=1.0, dequantised=2.0)
    errors = [torch.OutOfMemoryError("full"), RuntimeError("no kernel image\nand more")]

    def product(*args, **options):
        raise errors[0]

    monkeypatch.setattr(torch, "_scaled_mm", product)
    assert pick("auto", tmp_path, shapes={(48, 64)}) == {(48, 64): Products()}
    assert "no memory to measure them" in caplog.text and not (tmp_path / "cache/p.json").exists()
    errors.pop(0)
    assert pick("auto", tmp_path, shapes={(48, 64)}) == {(48, 64): Products()}
    assert "fails: RuntimeError: no kernel image" in caplog.text and "and more" not in caplog.text
    assert list(json.loads((tmp_path / "cache/p.json").read_text()).values()) == ["none"]


def test_a_device_that_does_nothing_after_a_failure_is_told_with_the_way_out(able, tmp_path, monkeypatch):
    """Of a later product only CUDA's words would be seen, and in each start again."""
    def dead(*args, **options):
        raise RuntimeError("an illegal memory access was encountered")

    def product(*args, **options):
        monkeypatch.setattr(torch, "zeros", dead)
        dead()

    monkeypatch.setattr(torch, "_scaled_mm", product)
    with pytest.raises(ConfigError, match="forward 64 -> 48 at 1,024 tokens: it fails.*fp8_matmul to false"):
        pick("auto", tmp_path, shapes={(48, 64)})
    assert not (tmp_path / "cache/p.json").exists()


@pytest.mark.parametrize("refused", ["forward", "backward"])
def test_what_is_measured_without_a_compiler_is_asked_again(refused, able, tmp_path, monkeypatch):
    """The kernel that rounds was not there for one of the widths; the next run may be on a node that has
    what makes it."""
    def without(width):
        if width == {"forward": 64, "backward": 48}[refused]:
            raise RuntimeError("no compiler")
        return float8_tokens.plain

    monkeypatch.setattr(float8_tokens, "FUSED_ON", "cpu")
    for made in (without, lambda width: float8_tokens.plain):
        monkeypatch.setattr(float8_tokens, "_refused", {})
        monkeypatch.setattr(float8_tokens, "_compiled", made)
        clock(monkeypatch, float8=1.0, dequantised=2.0)
        assert pick("auto", tmp_path, shapes={(48, 64)}) == {(48, 64): Products(True, True)}
        assert (tmp_path / "cache/p.json").exists() == (made is not without)


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_both_ways_of_a_trial_are_near_float32(way, factors, able, monkeypatch):
    """And dequantised as such a weight is: a cast takes a fraction of the time that factors take."""
    scales, real = [], products.dequantize
    monkeypatch.setattr(products, "dequantize", lambda v, s, dtype: scales.append(s) or real(v, s, dtype))
    trial = products._trial(way, Layer(96, 160, 33, learns=True, factors=factors), CPU)
    assert trial.x.shape == (33, 160 if way == "forward" else 96)
    want = trial.exact(trial.x.float())
    float8, plain = (f(trial.x).float() for f in (trial.float8, trial.dequantised))
    assert 0.015 < products._error(trial, 33) < products.TOLERANCE
    assert (float8 - want).norm() < 0.035 * want.norm() and (plain - want).norm() < 0.006 * want.norm()
    assert len(scales) == 2 and [s is not None for s in scales] == [factors] * 2


def test_a_plain_cast_is_measured_as_one(monkeypatch):
    """By training and by generate."""
    asked = []
    for module, learns in ((prepare, True), (plan, False)):
        monkeypatch.setattr(module, "pick_products", lambda *given, **how: asked.append(how["factors"]) or {})
        monkeypatch.setattr(module, "float8_shapes", lambda found, quantize: set())
        for quantize in ("fp8", "fp8_scaled"):
            model = ModelConfig(name="hunyuan-video", quantize=quantize)
            if learns:
                monkeypatch.setattr(prepare, "grids", lambda base, sets: [(1, 2, 3)])
                bases = [SimpleNamespace(path=None)]
                prepare.pick_float8(bases, model, [], ALONE, data=DataConfig(), dtype=BF16)
            else:
                found = identify(TINY)
                dits = SimpleNamespace(files={"dit": found}, flavor=found.flavor)
                monkeypatch.setattr(plan, "latent_shapes", lambda jobs, flavor: [(16, 1, 4, 4)])
                plan.pick_float8(dits, model, [], 1, ALONE, dtype=BF16)
    assert asked == [False, True] * 2


# --- together -----------------------------------------------------------------------------------------------


def _on_ranks(folder: str, capable: list[bool]) -> dict:
    ctx = start(device="cpu")
    torch._scaled_mm = ScaledProduct()
    products.missing = lambda device, dtype: None if capable[ctx.rank] else "old"
    n = []
    products.timed = lambda work, device: n.append(1) or (1.0 if len(n) % 2 else 2.0 - 1.5 * ctx.rank)
    kept = Path(folder) / f"{ctx.rank}.json"  # each its own home
    how = {"dtype": BF16, "tokens": 10, "learns": True, "factors": True}
    found = pick_products("auto", {(48, 64)}, ctx, kept=kept, **how)
    return {"found": found, "n": len(n)}


def test_ranks_agree(tmp_path):
    """The first measures, with a home that the other does not see."""
    first, second = run_ranks(2, _on_ranks, str(tmp_path), [True, True])
    assert first["found"] == second["found"] == {(48, 64): Products(True, True)}
    assert (first["n"], second["n"]) == (4, 0)
    assert [r["found"] for r in run_ranks(2, _on_ranks, str(tmp_path), [True, False])] == [{}, {}]


def test_what_is_said(able):
    whole = load_dit(TINY, dtype=BF16).model
    assert note(whole) == ""
    model = load_dit(TINY, dtype=BF16, quantize_to="fp8").model
    shapes = float8_shapes(identify(TINY), "fp8")
    n = sum(m.weight.dtype == torch.float8_e4m3fn for m in model.modules() if hasattr(m, "products"))
    assert note(model) == f", {n} float8 layers dequantised" and n > 20
    use_products(model, dict.fromkeys(shapes, Products(True, False)))
    assert note(model) == f", float8 products in the forward of {n} and the backward of 0 of {n} layers"
    blocks = load_dit(TINY, dtype=BF16, quantize_to="fp8_scaled").model
    use_products(blocks, dict.fromkeys(shapes, Products(True, True)))
    could = sum(m.scale_weight.ndim < 3 for m in blocks.modules() if hasattr(m, "products"))
    assert could < n and (str(could) in note(blocks) or "dequantised" in note(blocks))


def test_shapes_that_could_be_multiplied(tmp_path):
    """Of a file that is float8 already by its own factors, else by how it will be quantised."""
    found, model = identify(TINY), load_dit(TINY).model
    layers = found.spec.lora_targets(model)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in layers}
    odd = {shape for shape in shapes.values() if shape[1] % 64}
    assert float8_shapes(found, "none") == set() and float8_shapes(found, "fp8") == set(shapes.values())
    assert float8_shapes(found, "fp8_scaled") == odd
    state, (one, two) = model.state_dict(), [n for n in layers if shapes[n][1] % 64 == 0][:2]
    for name, factors in ((one, (1,)), (two, (shapes[two][0], shapes[two][1] // 64, 1))):
        state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)
        state[f"{name}.scale_weight"] = torch.ones(factors)
    save_file(state, tmp_path / "eight.safetensors", dict(found.weights.metadata))
    eight = identify(tmp_path / "eight.safetensors")
    assert float8_shapes(eight, "fp8_scaled") == odd | {shapes[one]}
    assert [eight.takes_product(f"{n}.weight", "fp8") for n in (one, two)] == [True, False]
