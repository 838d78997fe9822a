"""Previews of a training run are what generation would make, also for models with true guidance."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvtrain.config import GenerateConfig, TrainConfig, load
from hvtrain.errors import ConfigError, DataError
from hvtrain.generate import run as generate
from hvtrain.generate.video import read_metadata
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.train import preview
from hvtrain.train import run as train
from hvtrain.train.preview import Previews, plan_previews
from shards import ShardSet, open_set
from tests.generate.models import random_dit, spec_and_flavor
from tests.generate.test_image import picture
from tests.models.sight import save_sight
from tests.parallel.ranks import run_ranks
from tests.train.shardset import config, make_shards

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"


def previews(folder: Path, cfg_scale: float) -> Previews:
    spec, flavor = spec_and_flavor()
    flavor = replace(
        flavor, defaults=replace(flavor.defaults, cfg_scale=cfg_scale, negative_prompt="a red circle")
    )
    prompt = "{prompt: a blue ring moves left, width: 48, height: 48, steps: 2}"
    cfg = load(
        TrainConfig, CONFIGS / "model.yaml",
        ["preview.every_steps=1", "preview.frames=5", f"preview.prompts=[{prompt}]"]
    )
    plans = plan_previews(cfg.preview, cfg.model, spec, flavor, guidance=6.0, sets=[])
    return Previews(plans, cfg.model, spec, flavor, ParallelContext(), folder=folder, precision="fp32")


def test_a_preview_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[torch.device] = []
    monkeypatch.setattr(preview, "free", freed.append)
    subject = previews(tmp_path, cfg_scale=1.0)
    model = random_dit()
    (name, frames, fps), (everything, sheet, _) = subject.make(lambda sigma: model, step=7)
    assert (everything, sheet.shape) == ("preview/all", (1, 48, 5 * 48, 3))
    assert (name, frames.shape, frames.dtype, fps) == ("preview/0", (5, 48, 48, 3), np.uint8, 8)
    assert torch.is_grad_enabled() and freed == [torch.device("cpu")]
    assert read_metadata(tmp_path / "step00000007_0.mp4")["prompt"] == "a blue ring moves left"


def test_true_guidance_is_applied(tmp_path: Path) -> None:
    made = []
    for scale in (1.0, 4.0):
        subject = previews(tmp_path, cfg_scale=scale)
        model = random_dit()
        made.append(next(iter(subject.make(lambda sigma, model=model: model, step=1)))[1].astype(int))
    assert np.abs(made[0] - made[1]).mean() > 2


def image_to_video(name: str, folder: Path, *, sets: list[ShardSet], **preview: str) -> Previews:
    spec, tiny = spec_and_flavor()
    own = spec.flavors[name]
    arch = replace(tiny.arch, in_channels=own.arch.in_channels, token_replace=own.arch.token_replace)
    flavor = spec.fitted(replace(own, defaults=tiny.defaults), arch)
    items = [f"preview.{key}={value}" for key, value in {"every_steps": "1", "steps": "2", **preview}.items()]
    items.append(f"model.llm_vision={save_sight(folder / 'vision.safetensors')}")
    cfg = load(TrainConfig, CONFIGS / "model.yaml", [*items, "preview.prompts=[{prompt: a ring}]"])
    plans = plan_previews(cfg.preview, cfg.model, spec, flavor, guidance=6.0, sets=sets)
    return Previews(plans, cfg.model, spec, flavor, ParallelContext(), folder=folder, precision="fp32")


def latents_of(subject: Previews, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What a random model makes [C T H W]."""
    made: list[torch.Tensor] = []
    real = preview.decode
    monkeypatch.setattr(preview, "decode", lambda vae, latents: made.append(latents) or real(vae, latents))
    model = random_dit(subject.flavor.arch)
    (_, (_, frames, _)) = None, next(iter(subject.make(lambda sigma: model, step=3)))
    assert frames.dtype == np.uint8 and len(made) == 1
    return made[0][0]


@pytest.mark.parametrize("more", [(), ("image",)], ids=["its own first frame", "the column image"])
def test_image_to_video_begins_with_a_samples_own(tmp_path: Path, more: tuple, monkeypatch) -> None:
    """Held-out sets come first; what is asked for chooses among the sizes."""
    held = open_set(make_shards(tmp_path / "held", more=more))
    subject = image_to_video("i2v", tmp_path, sets=[held])
    request = subject.plans[0].request
    assert (request.frames, request.height, request.width, request.image) == (5, 32, 32, None)
    wanted = held.get(0).tensors["image_latents" if more else "latents"].float()
    found = latents_of(subject, monkeypatch)
    assert found.shape == (16, 2, 4, 4) and torch.equal(found[:, :1], wanted[:, :1])
    assert not torch.equal(found[:, 1:2], wanted[:, :1])
    assert read_metadata(tmp_path / "step00000003_0.mp4")["width"] == 32
    assert image_to_video("i2v", tmp_path, sets=[held], width="32", frames="5").plans[0].request.height == 32
    with pytest.raises(
        ConfigError,
        match=r"preview.prompts\[0\]: no sample of this size .* give image=FILE, or .* of 5x32x32"
    ):
        image_to_video("i2v", tmp_path, sets=[held], width="64")


@pytest.mark.parametrize("name", ["i2v", "skyreels-v1-i2v"])
def test_image_to_video_begins_with_a_picture(tmp_path: Path, name: str, monkeypatch) -> None:
    green, violet = (
        picture(tmp_path / "green.png", (40, 200, 60)), picture(tmp_path / "violet.png", (200, 40, 200))
    )
    size = {"width": "48", "height": "32", "frames": "5"}
    made = [
        latents_of(image_to_video(name, tmp_path, sets=[], image=str(p), **size), monkeypatch)
        for p in (green, violet)
    ]
    assert made[0].shape == (16, 2, 4, 6) and (made[0] - made[1])[:, 1:].abs().max() > 0.05
    with pytest.raises(DataError, match="image: .* cannot be decoded"):
        (tmp_path / "broken.png").write_bytes(green.read_bytes()[:100])
        image_to_video(name, tmp_path, sets=[], image=str(tmp_path / "broken.png"), **size)


def test_a_prompts_own_keys_come_first() -> None:
    spec, flavor = spec_and_flavor()
    cfg = load(TrainConfig, None, [
        "preview.every_steps=1", "preview.shift=5", "preview.solver=unipc", "preview.seed=4",
        "preview.width=48",
        "preview.prompts=[{prompt: a}, {prompt: b, shift: 2, seed: 9, guidance: 1.5, cfg_scale: 3}]",
    ])
    a, b = (p.request for p in plan_previews(cfg.preview, cfg.model, spec, flavor, guidance=2.5, sets=[]))
    assert (a.shift, a.solver, a.seed, a.width, a.guidance, a.cfg_scale) == (5.0, "unipc", 4, 48, 2.5, 1.0)
    assert (b.shift, b.solver, b.seed, b.width, b.guidance, b.cfg_scale) == (2.0, "unipc", 9, 48, 1.5, 3.0)


def test_previews_of_skyreels_are_sampled_as_it_was_made_to_be(tmp_path: Path) -> None:
    """A true guidance of 6 with the negative prompt, an embedded one of 1, and its
    prefix before the prompt alone."""
    spec, tiny = spec_and_flavor()
    flavor = spec.fitted(spec.flavors["skyreels-v1-t2v"], tiny.arch)
    items = [
        "preview.every_steps=1", "preview.width=32", "preview.height=32", "preview.frames=5",
        "preview.steps=1"
    ]
    cfg = load(TrainConfig, CONFIGS / "model.yaml", [*items, "preview.prompts=[{prompt: a ring}]"])
    plans = plan_previews(cfg.preview, cfg.model, spec, flavor, guidance=1.0, sets=[])
    made = Previews(plans, cfg.model, spec, flavor, ParallelContext(), folder=tmp_path, precision="fp32")
    (request,) = (plan.request for plan in plans)
    assert (request.cfg_scale, request.guidance, request.shift) == (6.0, 1.0, 7.0)
    assert made.conds is not None
    assert [said.text for said in made.conds.texts] == ["FPS-24, a ring", flavor.defaults.negative_prompt]
    shown = []
    model = random_dit()
    next(iter(made.make(lambda sigma: lambda inp: shown.append(inp) or model(inp), step=1)))
    assert len(shown) == 2 and all(inp.cond["guidance"].tolist() == [1000.0] for inp in shown)
    wanted = [made.conds.of(request), made.conds.negative(request)]
    for inp in shown:
        assert any(torch.equal(inp.cond["text"], cond["text"]) for cond in wanted)
    assert not torch.equal(shown[0].cond["pooled"], shown[1].cond["pooled"])


# --- the same as `hvtrain generate` -------------------------------------------------------------------------

PROMPTS = (
    "a red circle moves left --w 48 --h 32 --f 5 --s 2\na blue ring --w 32 --h 32 --f 1 --s 2 --d 9 --l 2 "
    "--n green\n"
)


def pixels(path: Path) -> np.ndarray:
    """uint8 [F H W 3]."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image)[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def generated(prompts: Path, output: Path, *items: str) -> list[np.ndarray]:
    cfg = load(GenerateConfig, CONFIGS / "model.yaml", [
        f"prompt_file={prompts}", f"output={output}", "precision=fp32", "seed=3", *items,
    ])
    return [pixels(path) for path in generate.run(cfg)]


def trained(shards: Path, run: Path, *items: str) -> Path:
    assert train.run(config(shards, run, *PARTS, "run.steps=2", "preview.seed=3", *items)) == 0
    return run


PARTS = (
    "model.vae=tiny:vae.safetensors", "model.llm=tiny:llm", "model.clip=tiny:clip", "model.vae_dtype=float32"
)


def test_a_preview_is_bit_for_bit_what_generate_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base before the first step. Of the moving averages after the last, those of
    NAME-ema.safetensors, as near as that file's bfloat16 allows."""
    (prompts := tmp_path / "prompts.txt").write_text(PROMPTS)
    latents: list[torch.Tensor] = []
    real = preview.decode
    monkeypatch.setattr(preview, "decode", lambda vae, x: latents.append(x[0].clone()) or real(vae, x))
    run = trained(
        make_shards(tmp_path / "set"), tmp_path / "run", "adapter.type=none", "run.ema_decay=0.5",
        "optim.lr=0.01", f"preview.prompt_file={prompts}", "preview.at_start=true", "preview.every_steps=2",
        "preview.ema=true",
    )
    assert len(latents) == 4  # two prompts, before the first step and after the second
    folder = run / "previews"
    ema, plain = (f"model.dit={run / name}" for name in ("lora-ema.safetensors", "lora.safetensors"))
    for n, (step, dit) in enumerate([(0, "model.dit=tiny:dit.safetensors"), (2, ema)]):
        wanted = generated(prompts, tmp_path / f"made{step}", dit, "save_latents=true")
        for i, x in enumerate(latents[2 * n : 2 * n + 2]):
            made = load_file(tmp_path / f"made{step}" / f"000{i}.latents.safetensors").values()
            (kept,) = (t for t in made if t.shape == x.shape)
            assert (kept - x).norm() <= (0.02 if step else 0.0) * x.norm(), (step, i)
        assert [w.shape for w in wanted] == [(5, 32, 48, 3), (1, 32, 32, 3)]
        assert np.abs(
            pixels(folder / f"step{step:08d}_1.png").astype(int) - wanted[1]
        ).max() <= (4 if step else 0)
        far = np.abs(pixels(folder / f"step{step:08d}_0.mp4").astype(int) - wanted[0])
        assert far.mean() < 2 if step else far.max() == 0
    other = generated(prompts, tmp_path / "plain", plain)[1].astype(int)
    assert np.abs(pixels(folder / "step00000002_1.png") - other).max() > 20
    assert [read_metadata(folder / f"step00000002_{name}")["seed"] for name in ("0.mp4", "1.png")] == [3, 9]
    with Image.open(folder / "step00000002.png") as sheet:
        assert sheet.size == (5 * 48, 32 + 32)  # a row a prompt: five frames, and one with black beside it
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag in ("preview/0", "preview/1", "preview/all"):
        assert [event.step for event in events.Images(tag)] == [0, 2]


def test_previews_by_epochs_and_the_weights_stay(tmp_path: Path) -> None:
    """5 steps of 2 of 10 samples are an epoch. With the averages shown in between,
    training goes on from the weights."""
    shards = make_shards(tmp_path / "set")
    (tmp_path / "p.yaml").write_text("- {prompt: a ring, width: 32, height: 32, frames: 5, steps: 1}\n")
    common = ("run.ema_decay=0.9", "run.steps=6", f"preview.prompt_file={tmp_path / 'p.yaml'}")
    run = tmp_path / "run"
    assert train.run(
        config(shards, run, *PARTS, *common, "preview.every_epochs=0.5", "preview.ema=true")
    ) == 0
    assert sorted(p.name for p in (run / "previews").glob("*.mp4")) == [
        "step00000003_0.mp4", "step00000005_0.mp4"
    ]
    assert train.run(config(shards, tmp_path / "plain", *common)) == 0
    for name in ("lora.safetensors", "lora-ema.safetensors"):
        one, two = (load_file(folder / name) for folder in (run, tmp_path / "plain"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _two(folder: Path) -> int:
    return train.run(config(
        folder / "set", folder / "run", *PARTS, "zero.engine=deepspeed", "zero.stage=2", "parallel.ulysses=2",
        "run.steps=1", "preview.at_start=true", "preview.ema=true", "run.ema_decay=0.5", "preview.seed=3",
        f"preview.prompt_file={folder / 'prompts.txt'}",
    ), start(2))  # fmt: skip


def test_two_processes_share_a_preview(tmp_path: Path) -> None:
    """Sequence-parallel under ZeRO, with the averages in the weights' place: the
    picture is that of one process."""
    make_shards(tmp_path / "set")
    (prompts := tmp_path / "prompts.txt").write_text("a blue ring --w 48 --h 32 --f 1 --s 2 --d 9\n")
    assert run_ranks(2, _two, tmp_path) == [0, 0]
    made = pixels(tmp_path / "run" / "previews" / "step00000000_0.png").astype(int)
    (wanted,) = generated(prompts, tmp_path / "made", "model.dit=tiny:dit.safetensors")
    assert np.abs(made - wanted).max() <= 1


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["preview.every_epochs=1"], "preview.prompts is empty but previews are asked for"),
        (["preview.at_start=true", "preview.prompt_file=no.txt"], "preview.prompt_file: no.txt does not "
        "exist"),
        (
            ["preview.at_start=true", "preview.prompts=[{prompt: a}]", "preview.ema=true"],
            "preview.ema: the run keeps no moving"
        ),
        (["preview.at_start=true", "preview.prompt_file=FILE.txt"], "no option '--x'"),
        (["preview.at_start=true", "preview.prompt_file=FILE.yaml"], "FILE.yaml, prompt 2: unknown key "
        "'promt'"),
        (["preview.at_start=true", "preview.prompt_file=LIST.yaml"], "expected a list of prompts"),
        (["preview.at_start=true", "preview.prompt_file=SIZE.txt"], "SIZE.txt:1: width is 33"),
    ],
)
def test_mistakes_in_previews(
    items: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE.txt").write_text("a cat --x 1\n")
    Path("FILE.yaml").write_text("- {prompt: a}\n- {promt: a}\n")
    Path("LIST.yaml").write_text("prompt: a\n")
    Path("SIZE.txt").write_text("a --w 33\n")
    with pytest.raises((ConfigError, DataError), match=re.escape(says)):
        train.run(config(make_shards(tmp_path / "set"), tmp_path / "run", *PARTS, *items))
