"""Sparse attention as it is typed: what generate, train and fit make of it, and what their files say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hvtrain import config
from hvtrain.config import AdapterConfig, GenerateConfig, ModelConfig, RunSettings, SparseConfig, TrainConfig
from hvtrain.errors import ConfigError
from hvtrain.fit import run as fit
from hvtrain.fit.estimate import candidate, degrees, shape_of
from hvtrain.fit.run import Asked
from hvtrain.fit.search import _ladder
from hvtrain.generate import run as generate
from hvtrain.generate import sample
from hvtrain.generate.video import read_metadata
from hvtrain.models import find
from hvtrain.models.dit import Grid
from hvtrain.models.sparse_masks import kept_share
from hvtrain.train import run as train
from hvtrain.train.mfu import work_of
from launcher import cli
from tests.generate.models import SIZE, write_dit
from tests.train import shardset

TILES = {"sparse.pattern": "tiles", "sparse.tile": "[1,1,1]", "sparse.window": "[1,1,2]"}
GIVEN = SparseConfig("tiles", tile=(1, 1, 1), window=(1, 1, 2))
PARTS = {"model.vae": "tiny:vae.safetensors", "model.llm": "tiny:llm", "model.clip": "tiny:clip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    write_dit(folder / "dit.safetensors")
    shardset.make_shards(folder / "shards")
    return folder


def typed(values: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def generated(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> torch.Tensor:
    """Latents, of the command as it is typed."""
    found: list[torch.Tensor] = []
    real = sample.keep_lot

    def kept(plan, lot, state, **options) -> None:
        found.append(state.x.clone())
        real(plan, lot, state, **options)

    monkeypatch.setattr(sample, "keep_lot", kept)
    values = {
        **PARTS, "model.dit": folder / "dit.safetensors", "model.dtype": "float32",
        "model.vae_dtype": "float32", "precision": "fp32", "prompt": "a red circle", "output": output,
        "steps": 3, **SIZE, **changes,
    }
    assert cli.main(["generate", *typed(values)]) == 0
    monkeypatch.setattr(sample, "keep_lot", real)
    return found[0]


def test_generate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Exact steps are exact to the bit; a file says what was left out, and is another
    video's than the exact one."""
    exact = generated(folder, tmp_path / "a.mp4", monkeypatch)
    assert "sparse" not in read_metadata(tmp_path / "a.mp4") and "NOT exact" not in capsys.readouterr().out
    tiles = generated(folder, tmp_path / "b.mp4", monkeypatch, **TILES)
    said = capsys.readouterr().out
    assert "sparse (tiles 1x1x1 in windows of 1x1x2, by gather; NOT exact), else sdpa attention" in said
    grid = Grid(3, 3, 5)
    assert (
        f"attention is NOT exact: {kept_share(GIVEN, grid, 1):.1%} of the pairs of video tokens are "
        "computed\n" in said
    )
    assert read_metadata(tmp_path / "b.mp4")["sparse"] == {
        "pattern": "tiles", "tile": [1, 1, 1], "window": [1, 1, 2], "exact_layers": 0, "exact_steps": 0,
    }
    last = generated(folder, tmp_path / "c.mp4", monkeypatch, **TILES, **{"sparse.exact_steps": 2})
    assert "are computed, after 2 exact steps\n" in capsys.readouterr().out
    three = generated(folder, tmp_path / "d.mp4", monkeypatch, **TILES, **{"sparse.exact_steps": 3})
    assert torch.equal(three, exact)
    assert 0 < (last - exact).norm() < (tiles - exact).norm() and (tiles - exact).norm() > 0.02 * exact.norm()
    assert len({read_metadata(tmp_path / f"{name}.mp4")["identity"] for name in "abcd"}) == 4


def test_a_video_that_is_there_is_not_made_again(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Unless other pairs are left out; who computes it is no part of that."""
    generated(folder, tmp_path / "a.mp4", monkeypatch, **TILES)
    base = typed({
        **PARTS, "model.dit": folder / "dit.safetensors", "model.dtype": "float32",
        "model.vae_dtype": "float32", "precision": "fp32", "prompt": "a red circle",
        "output": tmp_path / "a.mp4", "steps": 3, **SIZE,
    })
    assert cli.main(["generate", *base, *typed(TILES), "sparse.kernel=gather"]) == 0
    assert "are there already" in capsys.readouterr().out
    assert cli.main(["generate", *base, *typed(TILES), "sparse.window=[1,2,2]"]) == 0
    assert "made with other parameters" in capsys.readouterr().out


def trained(folder: Path, output: Path, *items: str) -> int:
    shards = folder / "shards"
    return train.run(shardset.config(shards, output, "run.steps=2", "run.peak_tflops=0.01", *items))


def test_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The LoRA's metadata, the banner and a preview say it; the run is another one than the exact."""
    items = [
        *typed(TILES), "sparse.exact_layers=1", "sparse.exact_steps=1", "run.recompute=selective",
        "preview.every_steps=2", "preview.steps=2", "preview.frames=5", "preview.width=32",
        "preview.height=32", "preview.prompts=[{prompt: a ring}]", *typed(PARTS), "data.allow_foreign=true",
    ]
    assert trained(folder, tmp_path / "run", *items) == 0
    said = capsys.readouterr().out
    assert "by gather, the first 1 blocks exact; NOT exact), else sdpa attention" in said
    assert (
        "attention is NOT exact: " in said
        and "of the pairs of video tokens are computed\nsteps 1 to 2" in said
    )
    with safe_open(tmp_path / "run" / "lora.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hvtrain.sparse"]) == {
            "pattern": "tiles", "tile": [1, 1, 1], "window": [1, 1, 2], "exact_layers": 1,
        }
    (video,) = (tmp_path / "run" / "previews").glob("*.mp4")
    assert read_metadata(video)["sparse"]["exact_steps"] == 1
    for other in ("sparse.pattern=none", "sparse.window=[1,2,2]"):
        with pytest.raises(
            ConfigError, match="holds another run: sparse.(pattern|window) is .* there, .* here"
        ):
            trained(folder, tmp_path / "run", *items, other)


def test_an_exact_run_says_nothing_and_differs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its file, and its loss."""
    losses = []
    for name, items in (("exact", []), ("sparse", typed(TILES))):
        assert trained(folder, tmp_path / name, *items) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines if "train/loss" in line])
        if name == "exact":
            assert "NOT exact" not in capsys.readouterr().out
            with safe_open(tmp_path / name / "lora.safetensors", "pt") as file:
                assert "hvtrain.sparse" not in file.metadata()
    assert losses[0][0] != losses[1][0]


def test_utilization_counts_what_is_computed() -> None:
    """The polynomial times the share that is kept is what a trace of the sparse step counts."""
    from hvtrain.config import ParallelConfig, ZeroConfig
    from hvtrain.fit.estimate import Candidate, Training, of_training
    from hvtrain.fit.trace import Shape

    spec = find("hunyuan-video")
    flavor, run, adapter = (
        spec.flavor("tiny"), RunSettings(recompute="none", precision="fp32"), AdapterConfig(rank=4)
    )
    cfg = SparseConfig("tiles", tile=(1, 1, 1), window=(1, 1, 2), exact_layers=2)
    work = work_of(spec, flavor, ModelConfig(), adapter, run, peak=1.0, sparse=cfg)
    shape = Shape(1, 9, 96, 64)
    grid = flavor.latent.grid(flavor.latent.shape(frames=9, height=96, width=64))
    sections = Training(ModelConfig(), adapter, ParallelConfig(), ZeroConfig("torch", 0), run, sparse=cfg)
    counted = of_training(sections, Candidate(spec, flavor), shape, 1).flops
    assert work.flops(math.prod(grid), work.kept(grid)) == pytest.approx(counted, rel=1e-3)
    assert counted < 0.99 * work.flops(math.prod(grid)) and work.kept(grid) < 0.7


def test_fit_says_it_and_proposes_no_ring() -> None:
    items = ["model.dit=null", "model.flavor=t2v", "sparse.pattern=tiles", "adapter.rank=8", "run.steps=1"]
    asked = Asked(gpus=(1,), memory_gib=200, width=1280, height=720, frames=129)
    said = fit.training(config.load(TrainConfig, None, items), asked)
    line = (
        "sparse attention, NOT exact (tiles 6x8x8 in windows of 3x3x3): 8.0% of the pairs of 33 x 45 x 80 "
        "video tokens are "
    )
    assert f"{line}computed, by flex_attention 9.5% of the blocks\n" in said
    dense = fit.training(config.load(TrainConfig, None, [*items, "sparse.pattern=none"]), asked)
    per_step = [
        int(text.split(" sample(s): ")[1].split(" TFLOP")[0].replace(",", "")) for text in (said, dense)
    ]
    assert per_step[0] < 0.25 * per_step[1] and "NOT exact" not in dense
    sampled = fit.sampling(config.load(GenerateConfig, None, items[:3]), Asked(gpus=(4,), memory_gib=80))
    assert line[:60] in sampled and "U4 x R1" in sampled and "R2" not in sampled
    with pytest.raises(
        ConfigError, match="--gpus 5: sparse attention has no ring, and 5 does not divide 24 heads"
    ):
        fit.sampling(config.load(GenerateConfig, None, items[:3]), Asked(gpus=(5,), memory_gib=80))
    assert degrees(24, 8, GIVEN) == [(8, 1)]


def test_the_nearest_config_has_no_ring() -> None:
    cfg = config.load(TrainConfig, None, ["model.dit=null", "model.flavor=t2v", "run.recompute=offload"])
    about = candidate(cfg.model)
    shape_of(about.flavor)
    sections = fit.sections(cfg)
    for sparse, rings in ((SparseConfig(), True), (GIVEN, False)):
        steps = [change for change, _ in _ladder(replace(sections, sparse=sparse), about, 10)]
        assert any("parallel.ring=5" in change for change in steps) is rings


@pytest.mark.parametrize(
    "given, said",
    [
        ("parallel.ring=2", "sparse.pattern 'tiles' cannot be used with parallel.ring 2"),
        (
            "sparse.window=[0,1,1]",
            r"sparse.window is \[0, 1, 1\], expected three numbers of 1 or more: time, height, width"
        ),
        ("sparse.tile=[1,1,-2]", r"sparse.tile is \[1, 1, -2\]"),
        ("sparse.width=0", "sparse.width is 0.0, expected more than 0"),
        ("sparse.width=.inf", "sparse.width is inf, expected a finite number"),
        ("sparse.block=0", "sparse.block is 0, expected 1 or more"),
        ("sparse.exact_steps=-1", "sparse.exact_steps is -1, expected 0 or more"),
        ("sparse.pattern=window", "sparse.pattern"),
        ("sparse.kernel=flash", "sparse.kernel"),
        ("sparse.kernel=flex", "sparse.kernel: 'flex' cannot be used: it needs a CUDA device, this is cpu"),
        ("sparse.exact_layers=7", "sparse.exact_layers is 7 of "),
    ],
)
def test_what_is_refused_before_anything_is_read(given: str, said: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        trained(folder, tmp_path / "run", *typed(TILES), given)
    values = {
        **PARTS, "model.dit": folder / "dit.safetensors", "prompt": "a", "output": tmp_path / "a.mp4", **SIZE,
        **TILES
    }
    with pytest.raises(ConfigError, match=said):
        generate.run(config.load(GenerateConfig, None, [*typed(values), given]))
    assert not list(tmp_path.iterdir())
