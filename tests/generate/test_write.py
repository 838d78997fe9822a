"""What goes into a file, by value: pixels, parameters, and the digest that says
whether a video is there already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hvtrain.config import ModelConfig, SampledLora, VaeTilingConfig
from hvtrain.errors import ConfigError
from hvtrain.flow.solvers import State
from hvtrain.generate.identity import Sources, sources_of
from hvtrain.generate.loras import Applied, open_loras
from hvtrain.generate.plan import Compute, Dits, Lot, Plan, remaining
from hvtrain.generate.requests import Job, Request
from hvtrain.generate.spool import hidden, keep, visible
from hvtrain.generate.video import write_mp4, write_png
from hvtrain.generate.write import decode, parameters, to_bytes
from hvtrain.lorafiles.files import LoraFile
from hvtrain.weights.float8 import Products
from tests.generate.models import spec_and_flavor

SPEC, FLAVOR = spec_and_flavor()
REQUEST = Request.of(FLAVOR, prompt="a cat", seed=3, width=32, height=16, frames=5, steps=30)
SOURCES = Sources(sampling="s", decoding="d")


def test_pixels_are_the_nearest_of_256_levels() -> None:
    """-1 is 0 and 1 is 255, so one level is 2 / 255; a half goes to the even one."""
    values = [-1.0, 1.0, 0.0, -1.7, 1.7, 0.1, 0.103, -0.5, 1 - 1 / 255 + 1e-4, 1 - 1 / 255 - 1e-4]
    video = torch.tensor(values).view(1, 1, 1, -1).expand(3, 2, 1, -1).clone()  # [3 F H W]
    video[1], video[2, 1] = -1.0, 1.0
    found = to_bytes(video)
    assert found.shape == (2, 1, 10, 3) and found.dtype == np.uint8
    assert found[0, 0, :, 0].tolist() == [0, 255, 128, 0, 255, 140, 141, 64, 255, 254]
    assert (
        not found[..., 1].any() and (found[1, ..., 2] == 255).all()
        and (found[0, ..., 2] == found[0, ..., 0]).all()
    )


def test_each_video_goes_through_the_vae_alone() -> None:
    class Half:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            assert len(latents) == 1
            return latents[:, :3] / 2

    found = decode(Half(), torch.stack([torch.ones(4, 1, 2, 2), -torch.ones(4, 1, 2, 2)]))
    assert [video.shape for video in found] == [(1, 2, 2, 3)] * 2
    assert (
        [int(video.min()) for video in found] == [191, 64]
        and [int(video.max()) for video in found] == [191, 64]
    )


def test_parameters_are_all_that_made_it() -> None:
    model = ModelConfig(dit="/models/dit.safetensors")
    lora = Applied(LoraFile(Path("/loras/style.safetensors"), {}), 0.5)
    dits = Dits(SPEC, FLAVOR, {"dit": None}, {}, None)
    plan = Plan(model, dits, Compute("fp32", "auto"), [lora], SOURCES, [], [])
    found = parameters(plan, REQUEST)
    version = found.pop("hvtrain")
    assert version and found == {
        "prompt": "a cat", "width": 32, "height": 16, "frames": 5, "fps": 8, "steps": 30, "seed": 3,
        "shift": 3.0, "solver": "euler", "guidance": FLAVOR.defaults.guidance, "cfg_scale": 1.0,
        "negative_prompt": FLAVOR.defaults.negative_prompt, "model": "hunyuan-video", "flavor": "tiny",
        "dit": "dit.safetensors", "precision": "fp32",
        "lora": [{"file": "style.safetensors", "multiplier": 0.5}],
    }


CHANGES = [
    {"prompt": "a dog"}, {"width": 48}, {"height": 32}, {"frames": 9}, {"steps": 5}, {"seed": 4},
    {"shift": 2.0}, {"guidance": 2.0}, {"cfg_scale": 2.0}, {"negative_prompt": "blur"}, {"solver": "unipc"},
    {"expert_cfg_scale": {"high": 2.0}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_request_has_other_latents(change: dict) -> None:
    other = replace(REQUEST, **change)
    assert (
        SOURCES.latents(other) != SOURCES.latents(REQUEST) and SOURCES.video(other) != SOURCES.video(REQUEST)
    )


def test_the_rate_changes_the_video_and_not_its_latents() -> None:
    other = replace(REQUEST, fps=30)
    assert (
        SOURCES.latents(other) == SOURCES.latents(REQUEST) and SOURCES.video(other) != SOURCES.video(REQUEST)
    )
    assert SOURCES.video(REQUEST) == Sources(sampling="s", decoding="d").video(replace(REQUEST))


def test_what_changes_the_result_changes_the_sources(tmp_path: Path) -> None:
    lora = LoraFile(tmp_path / "a.safetensors", {})
    save_file({"x": torch.ones(4)}, str(lora.path))
    model = ModelConfig()
    prints = {"flavor": "f", "dit": "1", "text": "2", "vae": "3"}

    def of(loras=((lora, 1.0),), precision="bf16", changed=None, images=(), **parts: str) -> Sources:
        applied = [Applied(*one) for one in loras]
        return sources_of(changed or model, applied, {**prints, **parts}, precision=precision, images=images)

    def with_model(**changes: object) -> Sources:
        return of(changed=replace(model, **changes))

    def rounded(**products: Products) -> Sources:
        float8 = {(48, 64) if name == "one" else (64, 48): p for name, p in products.items()}
        loras = [Applied(lora, 1.0)]
        return sources_of(replace(model, quantize="fp8"), loras, prints, precision="bf16", float8=float8)

    own = of()
    assert own == of()
    sampling = [
        of(dit="9"), of(text="9"), of(flavor="9"), of(dit_low="9"), of(precision="fp32"),
        of(loras=[(lora, 0.5)]), of(loras=[]), of(loras=[(lora, 1.0), (lora, 1.0)]),
        of(loras=[(lora, 1.0, "high")]),
        *(with_model(**m) for m in (
            {"dtype": "float16"}, {"fp8_text": True}, {"quantize": "fp8"},
        )),
        rounded(one=Products(True)), rounded(two=Products(True)),
        rounded(one=Products(True), two=Products(True)),
    ]
    assert len({s.sampling for s in sampling} | {own.sampling}) == len(sampling) + 1
    assert {s.decoding for s in sampling} == {own.decoding}
    decoding = [
        of(vae="9"), with_model(vae_dtype="float32"), with_model(vae_tiling=VaeTilingConfig(spatial=128))
    ]
    assert (
        len({s.decoding for s in decoding} | {own.decoding}) == 4
        and {s.sampling for s in decoding} == {own.sampling}
    )
    assert with_model(fp8_matmul=False) == own
    # what is computed counts, not what was asked for, and of a sampling the forward alone
    dequantised = with_model(quantize="fp8")
    assert dequantised == rounded() == rounded(one=Products(False, True))
    assert dequantised == with_model(quantize="fp8", fp8_matmul=False)
    assert of(loras=[(lora, 0.0)]) == of(loras=[])  # switched off completely
    tensors = load_file(str(lora.path))
    save_file({"x": tensors["x"] * 2}, str(lora.path))
    assert of().sampling != own.sampling  # trained again under the same name


def test_what_is_left_keeps_its_batches(tmp_path: Path) -> None:
    """Of two batches of three: one video is there, one is under way, one is sampled,
    two are new; one is another's."""
    jobs = [Job(replace(REQUEST, seed=i), tmp_path / f"{i}.mp4") for i in range(6)]
    black = np.zeros((5, 16, 32, 3), np.uint8)
    write_mp4(jobs[1].output, black, fps=8, metadata={"identity": SOURCES.video(jobs[1].request)})
    write_mp4(jobs[4].output, black, fps=8, metadata={"identity": SOURCES.video(jobs[1].request)})
    for i, step in ((1, 30), (2, 30), (3, 7)):
        keep(
            jobs[i].output, State(torch.zeros(1), step), identity=SOURCES.latents(jobs[i].request),
            parameters={}
        )
    lots = remaining([jobs[:3], jobs[3:]], SOURCES)
    assert lots == [Lot([jobs[0]], 0), Lot([jobs[2]], 30), Lot([jobs[4], jobs[5]], 0), Lot([jobs[3]], 7)]
    assert [lot.n_left for lot in lots] == [30, 0, 30, 23]
    # what the killed run had not cleared
    assert not hidden(jobs[1].output).exists() and hidden(jobs[2].output).exists()
    keep(jobs[1].output, State(torch.zeros(1), 30), identity="x", parameters={})
    remaining([jobs[:3]], SOURCES, save_latents=True)
    assert visible(jobs[1].output).exists()


def test_a_picture_is_known_again(tmp_path: Path) -> None:
    job = Job(replace(REQUEST, frames=1), tmp_path / "a.png")
    write_png(job.output, np.zeros((16, 32, 3), np.uint8), metadata={"identity": SOURCES.video(job.request)})
    assert remaining([[job]], SOURCES) == []
    job.output.write_bytes(b"damaged")
    assert remaining([[job]], SOURCES) == [Lot([job], 0)]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_multiplier_that_is_no_number(factor: float) -> None:
    wanted = [SampledLora("never-read.safetensors", factor)]
    with pytest.raises(
        ConfigError, match=f"the multiplier of never-read.safetensors is {factor}, expected a finite number"
    ):
        open_loras(wanted, {}, SPEC, FLAVOR)
