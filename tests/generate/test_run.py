"""`hvtrain generate` as it is typed: one process and several, LoRAs, prompt files, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch

from hvtrain import config
from hvtrain.adapters.attach import linear_shapes
from hvtrain.config import GenerateConfig, LoraFileConfig, MergeConfig
from hvtrain.errors import CheckpointError, ConfigError, HvtrainError
from hvtrain.generate import run as generate
from hvtrain.generate import sample, write
from hvtrain.generate.tiles import Tiles, decode_own
from hvtrain.generate.video import read_metadata
from hvtrain.lorafiles.write import save_lora
from hvtrain.merge.run import run as merge
from hvtrain.models.dit import DiT
from hvtrain.models.kernels import Kernel
from hvtrain.parallel import products
from hvtrain.parallel.apply import parallelize
from hvtrain.parallel.context import ParallelContext, start
from hvtrain.parallel.swap import resident_bytes
from launcher.processes import free_port
from tests.generate.models import SIZE, random_dit, write_dit
from tests.parallel.ranks import run_ranks
from tests.weights.scaled import ScaledProduct

ROOT = Path(__file__).resolve().parents[2]
HVTRAIN = [sys.executable, "-m", "launcher.cli"]
SAME = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DiT of the tiny flavor, and a LoRA for it; VAE and text encoders are those that ship."""
    folder = tmp_path_factory.mktemp("generate")
    write_dit(folder / "dit.safetensors")
    write_lora(folder / "lora.safetensors", "double_blocks.0.img_attn_qkv", "single_blocks.3.linear2")
    return folder


def write_lora(path: Path, *layers: str) -> None:
    shapes, g, rank = linear_shapes(random_dit()), torch.Generator().manual_seed(0), 4
    tensors = {}
    for layer in layers:
        n_out, n_in = shapes[layer]
        tensors[f"{layer}.lora_down.weight"] = torch.randn(rank, n_in, generator=g) / n_in**0.5
        tensors[f"{layer}.lora_up.weight"] = torch.randn(n_out, rank, generator=g)
    save_lora(path, tensors, rank=rank, alpha=rank, architecture="hunyuan-video", metadata={})


def overrides(folder: Path, **changes: object) -> list[str]:
    values = {
        "model.dit": folder / "dit.safetensors", "model.vae": "tiny:vae.safetensors", "model.llm": "tiny:llm",
        "model.clip": "tiny:clip", "model.dtype": "float32", "model.vae_dtype": "float32",
        "precision": "fp32", "prompt": "a red circle moves left", "output": folder / "one.mp4", "steps": 3,
        **SIZE, **changes,
    }
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def make(folder: Path, **changes: object) -> list[Path]:
    return generate.run(config.load(GenerateConfig, None, overrides(folder, **changes)))


def pixels(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def difference(path: Path, reference: np.ndarray) -> float:
    """Mean over all values. The codec amplifies: one pixel that rounds the other way before it is a mean of
    1.5 after it, so SAME is no exact comparison; another seed or prompt is a mean of 28."""
    return np.abs(pixels(path).astype(int) - reference).mean()


@pytest.fixture(scope="module")
def plain(folder: Path) -> np.ndarray:
    (path,) = make(folder)
    return pixels(path)


def test_a_video_with_its_parameters(folder: Path, plain: np.ndarray) -> None:
    assert plain.shape == (9, 48, 80, 3) and plain.std() > 5
    said = read_metadata(folder / "one.mp4")
    assert said["prompt"] == "a red circle moves left" and said["model"] == "hunyuan-video"
    assert (said["seed"], said["steps"], said["shift"], said["dit"]) == (0, 3, 3.0, "dit.safetensors")


class Made(NamedTuple):
    """By one rank."""

    frames: np.ndarray | None  # what it gives to the encoder
    n_tiles: int  # that it decoded
    resident: list[int]  # bytes of weights, of each model that samples


def before_the_codec(*runs: list[str]) -> list[Made]:
    """Of each run; this process ends after the call."""
    made: list[Made] = []
    ctx = start(ulysses=int(os.environ["WORLD_SIZE"]))
    for arguments in runs:
        frames, shapes, resident = [], [], []
        write.write_video = lambda path, video, frames=frames, **_: frames.append(video)

        def counted(tiles: Tiles, ctx: ParallelContext, shapes: list = shapes) -> list[torch.Tensor]:
            found = decode_own(tiles, ctx)
            shapes += found
            return found

        def weighed(model: DiT, *args: object, resident: list = resident, **options: object) -> Kernel:
            resident.append(resident_bytes(model, options.get("visits")))
            return parallelize(model, *args, **options)

        write.decode_own, sample.parallelize = counted, weighed
        generate.run(config.load(GenerateConfig, None, arguments), ctx)
        made.append(Made(frames[0] if frames else None, len(shapes), resident))
    return made


def test_ranks_that_share_a_video_make_that_of_one(folder: Path) -> None:
    """Exactly, but for values on the edge between two of the 256 levels. With weights that are cut over them
    too, and tiles that are decoded by both."""
    tiled = {"width": 96, "height": 64, "model.vae_tiling.spatial": 32}
    alone = run_ranks(
        1, before_the_codec, overrides(folder, output=folder / "n1.mp4"),
        overrides(folder, output=folder / "n2.mp4", **tiled)
    )[0]
    both = {"parallel.ulysses": 2}
    runs = [
        overrides(folder, output=folder / "n3.mp4", **both),
        overrides(folder, output=folder / "n4.mp4", **both, **tiled),
        overrides(folder, output=folder / "n5.mp4", **both, shard_weights="true"),
    ]
    first, second = run_ranks(2, before_the_codec, *runs)
    for n, like in zip(range(3), (0, 1, 0), strict=True):
        off = np.abs(first[n].frames.astype(int) - alone[like].frames)
        assert off.max() <= 1 and off.mean() < 1e-3 and second[n].frames is None
    assert (first[2].frames == first[0].frames).all()  # gathered weights are the same weights
    # Tiles of 32 every 24 pixels: 4 x 3.
    assert [one.n_tiles for one in first] == [0, 6, 0] == [one.n_tiles for one in second]
    (whole,), (part,) = first[0].resident, first[2].resident
    blocks, slots = blocks_and_slots()
    assert part == pytest.approx(whole - blocks / 2 + slots, rel=1e-3) and second[2].resident == [part]


def blocks_and_slots() -> tuple[int, int]:
    """Bytes of the tiny flavor's blocks, and of two of the largest."""
    sizes = [sum(p.nbytes for p in block.parameters()) for block in random_dit().blocks]
    return sum(sizes), 2 * max(sizes)


def test_two_processes_make_the_video_of_one(folder: Path, plain: np.ndarray) -> None:
    done = launch(2, *overrides(folder, output=folder / "two.mp4"), "parallel.ulysses=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.mp4") == 1  # one rank speaks
    assert difference(folder / "two.mp4", plain) < SAME


def test_two_machines_make_the_video_of_one(folder: Path, plain: np.ndarray) -> None:
    command = ["generate", *overrides(folder, output=folder / "nodes.mp4"), "parallel.ring=2"]
    where = ["--nnodes", "2", "--master-addr", "localhost", "--master-port", str(free_port())]
    nodes = [
        subprocess.Popen(
            [*HVTRAIN, "launch", "--nproc", "1", *where, "--node-rank", str(node), *command], cwd=ROOT
        )
        for node in range(2)
    ]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    assert difference(folder / "nodes.mp4", plain) < SAME


def test_torchrun_starts_it_too(folder: Path, plain: np.ndarray) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        "--no-python", *HVTRAIN, "generate", *overrides(folder, output=folder / "t.mp4"), "parallel.ulysses=2"
    ]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert difference(folder / "t.mp4", plain) < SAME


def make_in_a_rank(arguments: list[str]) -> None:
    generate.run(config.load(GenerateConfig, None, arguments))


def test_prompts_are_dealt_to_data_parallel_ranks(folder: Path, plain: np.ndarray) -> None:
    (folder / "prompts.txt").write_text("a red circle moves left\na blue square\na ring --d 9\n")
    changes = {
        "prompt": None, "prompt_file": folder / "prompts.txt", "output": folder / "many", "batch_size": 8
    }
    run_ranks(2, make_in_a_rank, overrides(folder, **changes))
    files = sorted((folder / "many").iterdir())
    assert [f.name for f in files] == ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert [read_metadata(f)["seed"] for f in files] == [0, 1, 9]
    assert difference(files[0], plain) < SAME and difference(files[1], plain) > SAME


def test_a_lora_changes_the_video_as_its_merged_model_does(folder: Path, plain: np.ndarray) -> None:
    lora = folder / "lora.safetensors"
    (path,) = make(folder, output=folder / "lora.mp4", lora=f"[{{path: {lora}, multiplier: 0.5}}]")
    assert difference(path, plain) > SAME
    assert read_metadata(path)["lora"] == [{"file": "lora.safetensors", "multiplier": 0.5}]
    merged = folder / "merged.safetensors"
    files = (LoraFileConfig(str(lora), 0.5),)
    merge(MergeConfig(dit=str(folder / "dit.safetensors"), lora=files, output=str(merged)))
    (other,) = make(folder, **{"output": folder / "merged.mp4", "model.dit": merged})
    # weights are equal bit for bit, their alignment in memory is not
    assert difference(other, pixels(path)) < SAME


def test_true_guidance_and_bf16(folder: Path, plain: np.ndarray) -> None:
    (path,) = make(
        folder, output=folder / "cfg.mp4", cfg_scale=3.0, negative_prompt="a blue square", precision="bf16"
    )
    assert difference(path, plain) > SAME
    assert read_metadata(path)["precision"] == "bf16"


def test_a_swapped_model_makes_the_same_video(folder: Path, plain: np.ndarray) -> None:
    (out,) = make(folder, output=folder / "swapped.mp4", blocks_to_swap=2)
    assert difference(out, plain) < SAME


def test_a_float8_model_makes_nearly_the_same_video(folder: Path, plain: np.ndarray) -> None:
    (out,) = make(folder, output=folder / "eight.mp4", **{"model.quantize": "fp8_scaled"})
    assert 0 < difference(out, plain) < 20  # another seed or prompt: 28


def test_float8_products_sum_fast_where_nothing_is_learnt(
    folder: Path, plain: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And make another video than dequantised weights: what was made so is not taken for it."""
    monkeypatch.setattr(products, "missing", lambda device, dtype: None)
    product = ScaledProduct()
    monkeypatch.setattr(torch, "_scaled_mm", product)
    asked = {"precision": "bf16", "model.quantize": "fp8", "output": folder / "products.mp4"}
    (out,) = make(folder, **asked, **{"model.fp8_matmul": "true"})
    assert len(product.fast) > 60 and all(product.fast) and 0 < difference(out, plain) < 20
    assert "float8 products in the forward of" in capsys.readouterr().out
    n = len(product.fast)
    make(folder, **asked, **{"model.fp8_matmul": "true"})
    assert "made with these parameters" in capsys.readouterr().out
    make(folder, **asked, **{"model.fp8_matmul": "false"})
    said = capsys.readouterr().out
    assert "made with other parameters" in said and "float8 layers dequantised" in said
    assert len(product.fast) == n


def test_everything_wrong_is_found_before_weights_are_read(folder: Path) -> None:
    """Encoding text with an 8B model takes minutes: mistakes must not wait for it.
    The text encoder here is none."""
    torch.save({}, folder / "none.pt")
    late = {"model.llm": folder / "none.pt"}
    write_lora(folder / "other.safetensors", "double_blocks.0.img_attn_qkv")
    whole = (folder / "other.safetensors").read_bytes()
    renamed = whole.replace(b"double_blocks_0_img_attn_qkv", b"blocks_0_cross_attn_of_other")
    (folder / "other.safetensors").write_bytes(renamed)
    with pytest.raises(CheckpointError, match="other.safetensors"):
        make(folder, lora=f"[{{path: {folder / 'other.safetensors'}}}]", **late)
    with pytest.raises(CheckpointError, match="none.pt"):
        make(folder, **late, **{"model.dit": folder / "none.pt"})
    with pytest.raises(ConfigError, match="4 attention heads"):
        cfg = config.load(GenerateConfig, None, overrides(folder, **late))
        generate.run(cfg, ParallelContext(world=3, ulysses=3))
    with pytest.raises(ConfigError, match="is told by an image"):
        make(folder, **late, **{"model.dit": write_dit(folder / "i2v.safetensors", "i2v")})
    with pytest.raises(ConfigError, match="a CPU, has no float8 products; use auto"):
        make(folder, **late, **{"model.quantize": "fp8", "model.fp8_matmul": "true"})
    with pytest.raises(ConfigError, match="needs model.dtype float32"):
        make(folder, **late, **{"model.dtype": "bfloat16"})
    with pytest.raises(HvtrainError, match=r"none\.pt"):  # and without a mistake, it is the encoder's turn
        make(folder, **late)


@pytest.mark.parametrize(
    ("nproc", "extra", "words"),
    [
        (3, ["parallel.ulysses=3"], "does not divide the model's 4 attention heads; choose one of 1, 2, 4"),
        (2, [], "1 video(s) for 2 data-parallel groups of processes"),
        (2, ["frames=10"], "frames is 10, expected 4n + 1"),
        (2, ["model.dit=nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_several_processes_say_a_mistake_once(folder: Path, nproc: int, extra: list[str], words: str) -> None:
    done = launch(nproc, *overrides(folder, output=folder / "never.mp4"), *extra)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr, (
        done.stderr
    )
    assert not (folder / "never.mp4").exists()


def launch(nproc: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [*HVTRAIN, "launch", "--nproc", str(nproc), "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
