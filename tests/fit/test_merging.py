"""What `hvtrain fit --merge` says, against merges that are made: at tiny size, and at an eighth
of the width with all blocks."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import LoraFileConfig, MergeConfig, ReconcileConfig
from hvtrain.fit.trace import Shape
from hvtrain.lorafiles.pairs import LoraPair
from hvtrain.lorafiles.write import write_lora
from hvtrain.models import find
from hvtrain.models.load import save_dit
from shards.schema import EMPTY_TEXT, Chunk, Manifest, save_manifest
from shards.writer import write_tar
from tests.fit.measure_merge import live_bytes, predicted

SPEC = find("hunyuan-video")


def a_model(root, flavor):
    """Random weights, and of each LoRA clips of its own with captions as long as the flavor holds."""
    g = torch.Generator().manual_seed(0)
    model = SPEC.build(flavor.arch).requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    save_dit(model, root / "dit.safetensors", spec=SPEC, flavor=flavor)
    shapes = linear_shapes(model)
    for number in (1, 2):
        pairs = {}
        for name in SPEC.lora_targets(model):
            out, width = shapes[name]
            pairs[name] = LoraPair(
                torch.randn(4, width, generator=g) * width**-0.5, torch.randn(out, 4, generator=g) * 0.05, 4.0
            )
        (root / str(number)).mkdir()
        write_lora(root / str(number) / "lora.safetensors", pairs, metadata={"ss_learning_rate": "1e-3"})
        clips(root / str(number) / "calibration", flavor, g)
    clips(root / "old", flavor, g)


def clips(root, flavor, g, n=4):
    longest, a = next(f.longest for f in flavor.cond if f.ragged), flavor.arch
    keys = tuple(f"clip{i}" for i in range(n))
    latents = [(k, {"latents": torch.randn(16, *CELLS, generator=g).bfloat16()}, {}) for k in keys]
    words = [
        (k, {"text": torch.randn(longest, a.text_dim, generator=g), "pooled": torch.ones(a.pooled_dim)}, {})
        for k in keys
    ]
    tars = {
        "latents": write_tar(root, "latents/0.tar", latents), "text": write_tar(root, "text/0.tar", words)
    }
    save_manifest(root, Manifest(tuple(tars), (Chunk(BUCKET, keys, tars),), {}))
    save_file({"text": torch.zeros(1, a.text_dim), "pooled": torch.zeros(a.pooled_dim)}, root / EMPTY_TEXT)


CELLS, BUCKET, CLIP = (3, 8, 8), "9x64x64", Shape(1, 9, 64, 64)  # latents T H W


def a_merge(root, output, how, target, **more):
    c = {
        "states": 4, "held_out": 2, "steps": 2, "lr": 1e-4, "allow_lost": True, "keep": (str(root / "old"),),
        **more
    }
    loras = tuple(LoraFileConfig(str(root / str(n) / "lora.safetensors")) for n in (1, 2))
    return MergeConfig(
        dit=str(root / "dit.safetensors"), lora=loras, output=str(output), target=target,
        reconcile=ReconcileConfig(how=how, **c), device="cpu",
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    a_model(root, SPEC.flavor("tiny"))
    return root


def check(cfg, monkeypatch):
    """Not more than was said and a tenth, and not absurdly less."""
    said, real = predicted(cfg, CLIP), live_bytes(cfg, monkeypatch)
    whole = said.host + said.device
    print(f"{cfg.reconcile.how} {cfg.target}: said {whole / 2**20:.1f} MiB, took {real / 2**20:.1f}")
    assert 0.6 * whole < real <= 1.1 * whole, (said, real)


@pytest.mark.parametrize(
    ("how", "target"), [("fit", "model"), ("fit", "lora"), ("distill", "lora"), ("fit+distill", "lora")]
)
def test_a_merge_takes_what_was_said(small, tmp_path, monkeypatch, how, target):
    check(a_merge(small, tmp_path / "m.safetensors", how, target), monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_full_size_merge_takes_what_was_said(tmp_path, monkeypatch):
    """13B at an eighth of its width: 20 + 40 blocks, 240 layers."""
    large = SPEC.flavor("t2v")
    arch = replace(large.arch, hidden_size=384, heads_num=3, text_dim=512, pooled_dim=96)
    flavor = SPEC.fitted(large, arch)
    a_model(tmp_path, flavor)
    few = {"states": 2, "held_out": 1, "steps": 1, "keep": ()}
    check(a_merge(tmp_path, tmp_path / "m.safetensors", "fit+distill", "lora", **few), monkeypatch)
