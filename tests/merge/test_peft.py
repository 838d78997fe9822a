"""LoRAs that diffusers and PEFT trained, with an A of their own for q, k and v, merged
into models that fuse the three.

The measure is the sum of B @ A times alpha / rank from PEFT's own layers, in float64.
"""

import itertools

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvtrain.models.load import save_dit
from launcher import cli
from tests.adapters.models import SPEC, build
from tests.lorafiles.test_diffusers import in_diffusers

QKV = ["to_q", "to_k", "to_v", "to_out.0"]
KINDS = {
    "to_q": ["to_q"],
    "q and v": ["to_q", "to_v"],
    "the usual": QKV,
    "text stream": ["add_q_proj", "add_k_proj", "add_v_proj"],
    "proj_mlp": ["proj_mlp"],
    "single, in part": ["to_k", "proj_mlp", "add_v_proj"],
    "all": "all-linear",
}
CUTS = SPEC.key_maps["diffusers"].write(build().state_dict())


def trained(folder, kind, *, metadata=True, seed=0, dtype=torch.float32):
    """A file of diffusers' own writing, and what it adds to each official weight."""
    model, g = in_diffusers(), torch.Generator().manual_seed(seed)
    # Ranks and alphas that differ between q, k and v: their scales differ too.
    patterns = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_k": 5.0}} if metadata else {}
    alpha = 7.0 if metadata else 3
    model.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=KINDS[kind], **patterns), "default")
    deltas = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            for w in (a, b):
                w.copy_(torch.randn(w.shape, generator=g).to(dtype))
            deltas[f"{name}.weight"] = (b.double() @ a.double()) * layer.scaling["default"]
    if metadata:
        model.save_lora_adapter(folder, adapter_name="default", weight_name="lora.safetensors")
        path = folder / "lora.safetensors"
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            said = file.metadata()
    else:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        tensors = {
            f"transformer.{n}.lora_A.weight": m.lora_A["default"].weight.data for n, m in layers.items()
        }
        tensors |= {
            f"transformer.{n}.lora_B.weight": m.lora_B["default"].weight.data for n, m in layers.items()
        }
        said = {}
    path = folder / "lora.safetensors"
    save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, path, metadata=said)
    return path, deltas


def official(deltas, start=None):
    """The diffusers layers' changes at their rows of the official weights, added to
    `start` (the model's, if None)."""
    start = build().state_dict() if start is None else start
    whole = {name: cut.take(start[cut.source].double()) for name, cut in CUTS.items()}
    for name, delta in deltas.items():
        whole[name] = whole[name] + delta
    return {
        name: how.build(whole.__getitem__) for name, how in SPEC.key_maps["diffusers"].read(whole).items()
    }


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "dit.safetensors"
    save_dit(build(), path, spec=SPEC, flavor=SPEC.flavors["tiny"])
    return path


def merged(dit, output, *loras, options=()):
    given = itertools.chain.from_iterable(("--lora", str(path)) for path in loras)
    assert cli.main(["merge", "--dit", str(dit), *given, "--output", str(output), *options]) == 0
    return load_file(output)


def check(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        worst = (found[name].double() - tensor).abs().max() / tensor.abs().max()
        assert worst < tolerance, f"{name}: {worst}"


@pytest.mark.parametrize("metadata", [True, False], ids=["with its config", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_lora_merges_exactly_and_so_do_its_conversions(dit, tmp_path, kind, metadata):
    path, deltas = trained(tmp_path, kind, metadata=metadata)
    wanted = official(deltas)
    check(merged(dit, tmp_path / "m.safetensors", path), wanted)
    for dialect in ("musubi", "comfyui", "diffusion-pipe"):
        other = tmp_path / f"{dialect}.safetensors"
        assert cli.main(
            ["lora", "convert", str(path), "--dit", str(dit), "--to", dialect, "--output", str(other)]
        ) == 0
        check(merged(dit, tmp_path / "c.safetensors", other), wanted)
    one = tmp_path / "one.safetensors"
    assert cli.main(
        ["merge", "--dit", str(dit), "--lora", str(path), "--as", "lora", "--output", str(one)]
    ) == 0
    check(merged(dit, tmp_path / "o.safetensors", one), wanted)


def test_bfloat16_pairs_of_differing_scales_are_not_rounded_again(dit, tmp_path):
    path, deltas = trained(tmp_path, "all", dtype=torch.bfloat16)
    check(merged(dit, tmp_path / "m.safetensors", path), official(deltas))


@pytest.mark.parametrize("policy", ["sum", "average", "priority", "ties"])
def test_policies_on_peft_loras(dit, tmp_path, policy):
    """Two files that share q and v; times 1 and 0.5, by each policy's definition."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, a = trained(tmp_path / "a", "q and v", seed=1)
    second, b = trained(tmp_path / "b", "the usual", seed=2)
    zeros = {n: torch.zeros_like(t) for n, t in build().state_dict().items()}
    base = {n: t.double() for n, t in build().state_dict().items()}
    x, y = official(a, zeros), official({n: d * 0.5 for n, d in b.items()}, zeros)
    wanted = {}
    for name in base:
        both = [x[name], y[name]]
        rows = [t.flatten(1).ne(0).any(1) if t.ndim > 1 else t.ne(0) for t in both]
        shared = (rows[0] & rows[1]).reshape(-1, *[1] * (base[name].ndim - 1))
        if policy == "average":
            change = torch.where(shared, sum(both) / 2, sum(both))
        elif policy == "priority":
            change = torch.where(shared, x[name], sum(both))
        elif policy == "ties" and shared.any():
            k = round(0.4 * both[0].numel())
            kept = [
                torch.where(d.abs() >= d.abs().flatten().sort(descending=True).values[k - 1], d, 0.0)
                for d in both
            ]
            sign = sum(kept).sign()
            kept = [torch.where(d.sign() == sign, d, 0.0) for d in kept]
            change = sum(kept) / sum(d.ne(0) for d in kept).clamp_min(1)
        else:
            change = sum(both)
        wanted[name] = base[name] + change
    options = ["--on-overlap", policy, "--multiplier", "1", "--multiplier", "0.5"]
    options += ["--density", "0.4"] if policy == "ties" else []
    check(merged(dit, tmp_path / "m.safetensors", first, second, options=options), wanted, 2e-6)
