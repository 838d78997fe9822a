"""Image to video: what the model is shown at each step, and from an image file to
a video that begins with it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hvtrain import config
from hvtrain.config import GenerateConfig, ModelConfig, asset
from hvtrain.errors import ConfigError, DataError
from hvtrain.flow.solvers import SOLVERS
from hvtrain.generate import conditions, sample
from hvtrain.generate import run as generate
from hvtrain.generate.conditions import Shown, encode_requests, read_image
from hvtrain.generate.requests import Request, single_job
from hvtrain.generate.sample import sample_latents
from hvtrain.generate.spool import visible
from hvtrain.generate.video import read_metadata
from hvtrain.models.parts import open_text, open_vae
from hvtrain.models.spec import Flavor
from hvtrain.parallel.context import ParallelContext
from hvtrain.rng import generator
from tests.generate.models import SIZE, random_cond, spec_and_flavor, write_dit
from tests.generate.test_run import pixels
from tests.models.sight import save_sight
from tests.parallel.ranks import run_ranks

SPEC, TINY = spec_and_flavor()


def flavor_of(name: str) -> Flavor:
    own = SPEC.flavors[name]
    kind = {key: getattr(own.arch, key) for key in ("in_channels", "token_replace", "guidance_embed")}
    arch = replace(TINY.arch, **kind)
    return SPEC.fitted(own, arch)


def inputs_seen(name: str, solver: str, *, n: int = 2) -> tuple[
    list, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """What a model of velocity 1 is shown at each of three steps, what comes out, the image,
    and the noise of each seed."""
    flavor, seen = flavor_of(name), []
    image = torch.randn(n, 16, 1, 6, 10, generator=torch.Generator().manual_seed(1))
    request = Request.of(
        flavor, prompt="", steps=3, shift=2.0, cfg_scale=1.0, solver=solver, image="any", **SIZE
    )

    def model(inp):
        seen.append(inp)
        return torch.ones_like(inp.x[:, :16])

    cond = {**random_cond(*[3] * n), "image_latents": image}
    seeds = [4, 5][:n]
    end = sample_latents(
        lambda sigma: model, SPEC, flavor, cond, request=request, ctx=ParallelContext(), seeds=seeds
    )
    noise = torch.stack(
        [torch.randn(16, 3, 6, 10, generator=generator(seed, stream="video")) for seed in seeds]
    )
    return seen, end, image, noise


@pytest.mark.parametrize("solver", SOLVERS)
def test_token_replace_keeps_the_first_frame_at_every_step(solver: str) -> None:
    seen, end, image, noise = inputs_seen("i2v", solver)
    assert len(seen) == 3 and all(inp.token_replace for inp in seen)
    for inp in seen:
        assert inp.x.shape == (2, 16, 3, 6, 10) and torch.equal(inp.x[:, :, :1], image)
    assert torch.equal(end[:, :, :1], image)
    # The others begin at 0.999 noise + 0.001 image, as the official sampler does, and a
    # velocity of 1 takes 1 from them.
    begin = 0.999 * noise[:, :, 1:] + 0.001 * image
    assert torch.equal(seen[0].x[:, :, 1:], begin)
    if solver == "euler":
        levels = [2 * e / (1 + e) for e in (1, 2 / 3, 1 / 3, 0)]  # shift 2
        x = begin
        for inp, (here, there) in zip(seen, pairwise(levels), strict=True):
            torch.testing.assert_close(inp.x[:, :, 1:], x, atol=1e-5, rtol=0)
            assert inp.t.tolist() == pytest.approx([1000 * here] * 2)
            x = x + (there - here)
        torch.testing.assert_close(end[:, :, 1:], begin - 1, atol=1e-5, rtol=0)


def test_channel_concat_shows_the_image_beside_the_noise() -> None:
    seen, end, image, noise = inputs_seen("skyreels-v1-i2v", "euler")
    for inp in seen:
        assert inp.x.shape == (2, 32, 3, 6, 10)
        assert torch.equal(inp.x[:, 16:, :1], image) and not inp.x[:, 16:, 1:].any()
    assert torch.equal(seen[0].x[:, :16], noise)
    torch.testing.assert_close(end, noise - 1, atol=1e-5, rtol=0)  # no frame stays


def test_an_image_is_seen_as_people_see_it(tmp_path: Path) -> None:
    """Turned, scaled to cover the size, cropped in the middle: a picture of four stripes, 96 x 48 upright."""
    stripes = np.zeros((48, 96, 3), np.uint8)
    for i, level in enumerate((0, 100, 200, 255)):
        stripes[:, 24 * i : 24 * i + 24] = level
    upright = Image.fromarray(stripes)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name in ("upright.png", "turned.png"):
        found = read_image(str(tmp_path / name), width=48, height=48)
        assert found.shape == (3, 48, 48) and found.dtype == torch.float32
        levels = ((found + 1) * 127.5).round()  # the two in the middle are left
        assert (levels[:, :, :24] == 100).all() and (levels[:, :, 24:] == 200).all()
    half = read_image(str(tmp_path / "upright.png"), width=48, height=24)
    assert [round(half[0, 0, 12 * i + 6].item(), 3) for i in range(4)] == [-1.0, -0.216, 0.569, 1.0]


def picture(path: Path, color: tuple[int, int, int]) -> Path:
    """A dark disc on a colour."""
    pixels = np.full((96, 160, 3), color, np.uint8)
    y, x = np.mgrid[:96, :160]
    pixels[(y - 48) ** 2 + (x - 80) ** 2 < 30**2] = (20, 20, 20)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    for name in ("i2v", "skyreels-v1-i2v"):
        write_dit(folder / f"{name}.safetensors", name)
    picture(folder / "green.png", (40, 200, 60))
    picture(folder / "violet.png", (200, 40, 200))
    save_sight(folder / "vision.safetensors")
    return folder


def make(folder: Path, name: str, **changes: object) -> list[Path]:
    values = {
        "model.dit": folder / f"{name}.safetensors", "model.vae": "tiny:vae.safetensors",
        "model.llm": "tiny:llm", "model.clip": "tiny:clip", "model.dtype": "float32",
        "model.vae_dtype": "float32", "precision": "fp32", "prompt": "a red circle moves left",
        "output": folder / f"{name}.mp4", "steps": 2, "cfg_scale": 1, "save_latents": True,
        "model.llm_vision": folder / "vision.safetensors" if name.startswith("i2v") else None, **SIZE,
        **changes,
    }
    items = [f"{key}={value}" for key, value in values.items() if value is not None]
    return generate.run(config.load(GenerateConfig, None, items))


def with_sight(folder: Path) -> ModelConfig:
    parts = {"llm": "tiny:llm", "clip": "tiny:clip", "llm_vision": str(folder / "vision.safetensors")}
    return ModelConfig(vae="tiny:vae.safetensors", parts=parts, vae_dtype="float32", dtype="float32")


def test_a_condition_is_the_mode_of_the_posterior(folder: Path) -> None:
    model = with_sight(folder)
    flavor, path = flavor_of("i2v"), str(folder / "green.png")
    request = Request.of(flavor, prompt="a ring", image=path, **SIZE)
    found = encode_requests([request], SPEC, flavor, model, ParallelContext())
    latents = found.of(request)["image_latents"]
    assert latents.shape == (1, 16, 1, 6, 10) and Shown.of(request) == Shown((path,), 80, 48, 9)
    image = read_image(path, width=80, height=48)
    assert torch.equal(latents, open_vae(SPEC, model, "cpu").encode(image[None, :, None]))
    tiny = open_text(SPEC, model, "cpu", flavor)
    assert torch.equal(found.of(request)["seen_text"][0], tiny.encode(["a ring"], [image])[0]["seen_text"])


def test_a_video_begins_with_its_image(folder: Path) -> None:
    """Two prompts of two images are sampled together; a file's own image is in its latents, untouched."""
    lines = folder / "prompts.txt"
    lines.write_text(f"a ring --i {folder / 'green.png'}\na ring --d 0 --i {folder / 'violet.png'}\n")
    common = {"prompt": None, "prompt_file": lines, "output": folder / "two", "batch_size": 2}
    files = make(folder, "i2v", **common)
    model = ModelConfig(vae="tiny:vae.safetensors", vae_dtype="float32")
    vae = open_vae(SPEC, model, "cpu")
    for path, name, channel in zip(files, ("green.png", "violet.png"), (1, 2), strict=True):
        image = read_image(str(folder / name), width=80, height=48)
        wanted = vae.encode(image[None, :, None])
        latents = load_file(str(visible(path)))["latents"]
        assert torch.equal(latents[:, :1], wanted[0]) and not torch.equal(latents[:, 1:2], wanted[0])
        first = pixels(path)[0].astype(int)
        corner = first[:8, :8].reshape(-1, 3).mean(0)
        assert corner.argmax() in ((1,) if channel == 1 else (0, 2)), corner
        assert read_metadata(path)["image"] == name
    assert make(folder, "i2v", **common) == files


def test_two_ranks_make_the_video_of_one(folder: Path, tmp_path: Path) -> None:
    """Rank 0 alone reads the image."""
    common = {"image": folder / "green.png", "seed": 3}
    (alone,) = make(folder, "i2v", **common, output=tmp_path / "alone.mp4")
    run_ranks(
        2, partial(make, folder, "i2v", **common, output=tmp_path / "both.mp4", **{"parallel.ulysses": 2})
    )
    both = load_file(str(visible(tmp_path / "both.mp4")))["latents"]
    assert (both - load_file(str(visible(alone)))["latents"]).abs().max() < 1e-4


def test_first_and_last_frame_are_both_shown(folder: Path, monkeypatch) -> None:
    """Of a flavor that is given two frames the model is handed both, in this
    order; each of them is needed."""
    flavor, seen = replace(flavor_of("i2v"), given=(0, -1)), []
    green, violet = (str(folder / name) for name in ("green.png", "violet.png"))
    with pytest.raises(
        ConfigError, match=r"end_image: 'i2v' is told by an image; give end_image=FILE, or --ei FILE"
    ):
        single_job(flavor, {"image": green}, prompt="a ring", output="x.mp4")
    with pytest.raises(ConfigError, match=r"end_image is .*, but 'i2v' takes none"):
        Request.of(flavor_of("i2v"), image=green, end_image=violet)
    job = single_job(flavor, {"image": green, "end_image": violet, **SIZE}, prompt="a ring", output="x.mp4")

    def conditions_of(vae, encoders, images, shape) -> dict[str, torch.Tensor]:
        seen.append((images, tuple(shape)))
        return {"image_latents": torch.zeros(16, 1, 6, 10)}

    encode_requests(
        [job.request], replace(SPEC, image_conditions=conditions_of), flavor, with_sight(folder),
        ParallelContext()
    )
    ((images, shape),) = seen
    assert shape == (16, 3, 6, 10) and images.shape == (2, 3, 48, 80)
    assert torch.equal(images[0], read_image(green, width=80, height=48))
    assert torch.equal(images[1], read_image(violet, width=80, height=48))


def test_another_picture_under_the_same_name_is_another_video(
    folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    own = picture(tmp_path / "own.png", (40, 200, 60))
    (path,) = make(folder, "skyreels-v1-i2v", image=own, output=tmp_path / "out.mp4")
    first = load_file(str(visible(path)))["latents"]
    monkeypatch.setattr(sample, "open_dit", None)
    make(folder, "skyreels-v1-i2v", image=own, output=tmp_path / "out.mp4")
    assert "are there already" in capsys.readouterr().out
    monkeypatch.undo()
    picture(own, (200, 40, 200))
    make(folder, "skyreels-v1-i2v", image=own, output=tmp_path / "out.mp4")
    assert (load_file(str(visible(path)))["latents"] - first).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("i2v", {}, "image: 'i2v' is told by an image; give image=FILE, or --i FILE in a line of a prompt "
        "file"),
        ("skyreels-v1-i2v", {}, "image: 'skyreels-v1-i2v' is told by an image"),
        ("i2v", {"image": "nowhere.png"}, "image: nowhere.png does not exist"),
        (
            "i2v", {"image": "prompts.txt"},
            r"image: .*prompts.txt: cannot be decoded .*; give another picture"
        ),
        ("tiny", {"image": "green.png"}, r"image is .*green.png, but 'tiny' takes none: leave it out"),
    ],
)
def test_what_is_refused_before_weights_are_read(
    folder: Path, name: str, changes: dict, words: str, monkeypatch
) -> None:
    (folder / "prompts.txt").write_text("no picture\n")
    (folder / "tiny.safetensors").write_bytes(Path(asset("tiny:dit.safetensors")).read_bytes())
    monkeypatch.setattr(conditions, "open_text", lambda *_: pytest.fail("weights were read"))
    changes = {key: value if "nowhere" in value else folder / value for key, value in changes.items()}
    with pytest.raises((ConfigError, DataError), match=words):
        make(folder, name, **changes, output=folder / "never.mp4")


def test_a_line_without_its_image_is_named(folder: Path) -> None:
    lines = folder / "lines.txt"
    lines.write_text(f"a ring --i {folder / 'green.png'}\na ring\n")
    with pytest.raises(ConfigError, match=r"lines.txt:2: image: 'i2v' is told by an image"):
        make(folder, "i2v", prompt=None, prompt_file=lines, output=folder / "never")
    lines.write_text("a ring --i nowhere.png\n")
    with pytest.raises(ConfigError, match=r"lines.txt:1: image: nowhere.png does not exist"):
        make(folder, "i2v", prompt=None, prompt_file=lines, output=folder / "never")


def test_skyreels_prompts_begin_with_its_prefix(folder: Path) -> None:
    """The negative prompt does not; it is HunyuanVideo's, at a true guidance of 6
    beside an embedded one of 1."""
    flavor = flavor_of("skyreels-v1-i2v")
    request = Request.of(flavor, prompt="a ring", image=str(folder / "green.png"), **SIZE)
    assert (
        (request.guidance, request.cfg_scale, request.steps, request.shift) == (1.0, 6.0, 30, 7.0)
        and request.guided
    )
    found = encode_requests([request], SPEC, flavor, with_sight(folder), ParallelContext())
    tiny = open_text(SPEC, with_sight(folder), "cpu", flavor)
    negative = SPEC.flavor("t2v").defaults.negative_prompt
    for cond, text in ((found.of(request), "FPS-24, a ring"), (found.negative(request), negative)):
        wanted = tiny.encode([text])[0]
        assert (
            torch.equal(cond["text"][0], wanted["text"]) and torch.equal(cond["pooled"][0], wanted["pooled"])
        )
        assert cond["image_latents"].shape == (1, 16, 1, 6, 10)
    again = Request.of(flavor, prompt="FPS-24, a ring", image=str(folder / "green.png"), **SIZE)
    assert torch.equal(
        encode_requests([again], SPEC, flavor, with_sight(folder), ParallelContext()).of(again)["text"][0],
        tiny.encode(["FPS-24, a ring"])[0]["text"]
    )


def test_a_negative_prompt_is_read_beside_a_black_image(folder: Path) -> None:
    flavor, image = flavor_of("i2v"), str(folder / "green.png")
    request = Request.of(flavor, prompt="a ring", image=image, cfg_scale=3.0, **SIZE)
    found = encode_requests([request], SPEC, flavor, with_sight(folder), ParallelContext())
    tiny = open_text(SPEC, with_sight(folder), "cpu", flavor)
    black = torch.full((3, 48, 80), -1.0)
    assert torch.equal(
        found.negative(request)["seen_text"][0],
        tiny.encode([request.negative_prompt], [black])[0]["seen_text"]
    )
    assert request.negative_prompt.startswith("deformation, a poor composition and deformed video")


def test_modes_of_image_to_video_begin_otherwise() -> None:
    """Steady: a trace of the image in every frame, also in the model of 33 channels; dynamic:
    noise alone. Shift 7, 7 and 17."""
    for name, trace, shift in (("i2v", 0.001, 7.0), ("i2v-concat", 0.001, 7.0), ("i2v-dynamic", 0.0, 17.0)):
        seen, _, image, noise = inputs_seen(name, "euler")
        assert SPEC.flavors[name].defaults.shift == shift
        begin = (1 - trace) * noise + trace * image
        assert torch.equal(seen[0].x[:, :16, 1:], begin[:, :, 1:]), name
        if name == "i2v-concat":
            assert (
                seen[0].x.shape[1] == 33 and torch.equal(seen[0].x[:, 16:32, :1], image)
                and "guidance" not in seen[0].cond
            )
            assert seen[0].x[:, 32].amax((2, 3)).tolist() == [[1, 0, 0]] * 2
            assert torch.equal(seen[0].x[:, :16, :1], begin[:, :, :1])
