"""LORAID on the model that it was invented for: who owns what at full size, and
slices that other programs load."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hvtrain.adapters.attach import linear_shapes, merge_all
from hvtrain.config import TrainConfig, load
from hvtrain.lorafiles import tools
from hvtrain.lorafiles.files import read_lora
from hvtrain.lorafiles.metadata import lora_metadata
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.models import find
from hvtrain.models.load import save_dit
from hvtrain.slices.plan import Cut, block_of, make_plan
from hvtrain.slices.run import plan_for, target_shapes
from tests.models.test_wan import ARCH as SMALL
from tests.models.test_wan import an_input, build, in_diffusers

SPEC = find("wan")
ROOT = Path(__file__).parents[2]
ARCH = replace(SMALL, n_layers=4)
CUTS = {
    "blocks": (Cut(blocks_per_loraid=2), 2),  # does not begin with block 0
    "layers": (Cut(n=3, granularity="module", order="interleaved"), 2),  # holes everywhere
    "rows": (Cut(n=2, granularity="rows", order="interleaved"), 1),
}


@pytest.mark.parametrize(("width", "n", "last"), [(12, 4, 4), (3, 14, 1), (2, 20, 2), (1, 40, 1)])
def test_blocks_of_the_14b(width: int, n: int, last: int) -> None:
    """40 blocks of 10 layers for each expert; the inventor's LORAID 1 is blocks 0 to 11."""
    plan = plan_for(Cut(blocks_per_loraid=width), dit=None, model="wan", flavor="t2v-a14b")
    owned = [
        [int(name.split(".")[1]) for name, _ in groupby(block_of(slot.module) for slot in s.slots)]
        for s in plan.slices
    ]
    assert plan.n == n and owned[0] == list(range(width)) and len(owned[-1]) == last
    assert [block for blocks in owned for block in blocks] == list(range(40))
    assert (
        sum(len(s.slots) for s in plan.slices) == 400
        and all(len(s.slots) == 10 * len(b) for s, b in zip(plan.slices, owned))
    )


def test_the_recipe() -> None:
    cfg = load(TrainConfig, ROOT / "configs/wan/loraid.yaml", ["adapter.loraid=3"])
    assert (cfg.adapter.type, cfg.adapter.blocks_per_loraid, cfg.adapter.loraid) == ("loraid", 12, 3)
    assert SPEC.flavor(cfg.model.flavor).arch.n_layers == 40 and cfg.model.experts == "both"


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan") / "dit.safetensors"
    save_dit(build(ARCH), path, spec=SPEC, flavor=SPEC.fitted(SPEC.flavor("tiny"), ARCH))
    return path


def a_slice(path: Path, kind: str) -> Path:
    """A trained slice as a run writes it: rank 4, alpha 1, zeros in the rows that are not its own."""
    cut, number = CUTS[kind]
    plan, draw = (
        make_plan(target_shapes(build(ARCH), SPEC), cut, model="wan", flavor="tiny"),
        torch.Generator().manual_seed(5)
    )
    shapes, pairs = linear_shapes(build(ARCH)), {}
    for slot in plan.slice(number).slots:
        n_out, n_in = shapes[slot.module]
        up = torch.zeros(n_out, 4)
        up[slot.begin : slot.end] = torch.randn(slot.end - slot.begin, 4, generator=draw)
        pairs[slot.module] = LoraPair(torch.randn(4, n_in, generator=draw) / n_in**0.5, up, 1.0)
    write_lora(
        path, pairs,
        metadata=lora_metadata(path, {"ss_loraid": number}, architecture="wan", rank=4, alpha=1.0)
    )
    return path


@pytest.mark.parametrize("kind", CUTS)
@torch.no_grad()
def test_diffusers_loads_every_slice(dit: Path, tmp_path: Path, kind: str) -> None:
    """By its pipelines' own loader, from its own names and from ComfyUI's: those without alpha, and with."""
    from diffusers.loaders import WanLoraLoaderMixin

    path, inp = a_slice(tmp_path / "slice.safetensors", kind), an_input(ARCH, (512,))
    ours, lora = build(ARCH), read_lora(path, linear_shapes(build(ARCH)), spec=SPEC)
    before = ours(inp)
    merge_all(ours, [(lora, 1.0)])
    want = ours(inp)
    assert (want - before).norm() / before.norm() > 0.01
    for dialect in ("diffusers", "comfyui", "diffusion-pipe"):
        there = tmp_path / f"{dialect}.safetensors"
        tools.convert(str(path), str(there), target=dialect, dit=str(dit))
        state, metadata = WanLoraLoaderMixin.lora_state_dict(str(there), return_lora_metadata=True)
        theirs = in_diffusers(ARCH, build(ARCH).state_dict())
        WanLoraLoaderMixin.load_lora_into_transformer(state, transformer=theirs, metadata=metadata)
        found = theirs(
            hidden_states=inp.x, timestep=inp.t, encoder_hidden_states=inp.cond["text"], return_dict=False
        )[0]
        assert (found - want).norm() / want.norm() < 1e-5, dialect


@pytest.mark.parametrize("kind", CUTS)
def test_comfyui_finds_every_layer(dit: Path, tmp_path: Path, kind: str) -> None:
    """It looks for diffusion_model.LAYER.lora_A.weight, .lora_B.weight and .alpha of each
    Linear of the official names."""
    path = a_slice(tmp_path / "slice.safetensors", kind)
    tools.convert(str(path), str(tmp_path / "comfyui.safetensors"), target="comfyui", dit=str(dit))
    tensors = load_file(tmp_path / "comfyui.safetensors")
    weights = build(ARCH).state_dict()
    change = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    taken = set()
    for name in weights:
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            down, up = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
            scale = tensors[f"{stem}.alpha"].item() / len(down) if f"{stem}.alpha" in tensors else 1.0
            change[name], taken = (
                scale * up @ down,
                taken | {f"{stem}.{e}" for e in ("lora_A.weight", "lora_B.weight", "alpha")}
            )
    assert set(tensors) <= taken
    lora = read_lora(path, linear_shapes(build(ARCH)), spec=SPEC)
    assert {n for n, delta in change.items() if delta.any()} == {f"{n}.weight" for n in lora.pairs}
    assert all(torch.allclose(change[f"{n}.weight"], one.delta(), atol=1e-6) for n, one in lora.pairs.items())


@torch.no_grad()
def test_a_lora_that_musubi_trained(tmp_path: Path) -> None:
    """Every layer of every block under its names, with its metadata and without: the
    forward of the weights' plain sum."""
    model, inp, draw = build(ARCH), an_input(ARCH, (7,)), torch.Generator().manual_seed(2)
    shapes, tensors, state = linear_shapes(model), {}, dict(build(ARCH).state_dict())
    for name in SPEC.lora_targets(model):
        n_out, n_in = shapes[name]
        down, up = torch.randn(8, n_in, generator=draw) / n_in**0.5, torch.randn(n_out, 8, generator=draw) / 8
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(4.0)
        }
        state[f"{name}.weight"] = state[f"{name}.weight"] + 0.5 * up @ down
    theirs = {
        "ss_network_module": "networks.lora_wan", "ss_base_model_version": "wan",
        "modelspec.architecture": "wan2.1/lora"
    }
    ours = build(ARCH)
    ours.load_state_dict(state)
    for metadata in (theirs, None):
        save_file(tensors, tmp_path / "musubi.safetensors", metadata=metadata)
        lora = read_lora(tmp_path / "musubi.safetensors", shapes, spec=SPEC)
        assert len(lora.pairs) == 40
        tuned = build(ARCH)
        merge_all(tuned, [(lora, 1.0)])
        assert torch.allclose(tuned(inp), ours(inp), atol=1e-4)
    # ours has musubi's names, shapes and values
    write_lora(tmp_path / "back.safetensors", lora.pairs, metadata={})
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in tensors)
