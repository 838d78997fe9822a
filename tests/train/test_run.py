"""A training run: what it writes, how it stops, continues and refuses."""

import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hvtrain.config import asset
from hvtrain.errors import ConfigError, DataError, HvtrainError
from hvtrain.lorafiles.files import read_lora
from hvtrain.models import find
from hvtrain.models.load import load_dit
from hvtrain.train import checkpoint
from hvtrain.train import run as train
from hvtrain.train.checkpoint import Progress, Snapshot
from hvtrain.train.objective import drop_captions
from launcher import cli
from tests.train.shardset import config, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def same(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def test_a_run_and_its_files(shards, tmp_path, capsys, monkeypatch):
    cfg = config(shards, tmp_path / "run", "run.name=mine", "run.save_every_steps=2", "run.keep_last=2",
                 f"eval.shards={shards}", "eval.every_steps=3", "eval.max_batches=2",
                 "data.caption_dropout=0.5",
                 "adapter.dropout=0.1")
    assert train.run(cfg) == 0
    # the process computes as before: subnormal numbers live
    assert torch.tensor(2.0**-1060, dtype=torch.float64) * 2 > 0
    out = tmp_path / "run"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [x["train/loss"] for x in lines if "train/loss" in x]
    assert len(losses) == 6 and all(0 < x < 50 for x in losses)
    held = [x["eval/loss"] for x in lines if "eval/loss" in x]
    assert len(held) == 2 and held[0] != held[1]
    assert list((out / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    with safe_open(out / "mine.safetensors", "pt") as file:
        info, names = file.metadata(), list(file.keys())
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in names
    assert info["ss_network_dim"] == "4" and info["ss_steps"] == "6" and len(info["sshs_model_hash"]) == 64
    loaded = load_dit(asset("tiny:dit.safetensors"), dtype=torch.float32)
    shapes = {
        n: (m.out_features, m.in_features) for n,
        m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert len(read_lora(out / "mine.safetensors", shapes, spec=loaded.spec).pairs) == 2 * 8 + 4 * 2
    # The command that it names makes the file that ComfyUI loads whole: dotted names,
    # with dots in `img_mlp.fc1` too.
    said = next(line for line in capsys.readouterr().out.splitlines() if "for ComfyUI" in line)
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(said.partition(": hvtrain ")[2])) == 0
    comfy = list(load_file(tmp_path / "comfyui.safetensors"))
    assert len(comfy) == len(names) == 72 and all(name.startswith("diffusion_model.") for name in comfy)
    assert "diffusion_model.double_blocks.0.img_mlp.fc1.lora_A.weight" in comfy
    # The same command again: nothing to do, nothing changed.
    before = (out / "mine.safetensors").stat().st_mtime_ns
    assert train.run(cfg) == 0 and (out / "mine.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("engine", ["zero.engine=torch", "zero.stage=2", "zero.stage=3"])
def test_resume_equals_no_interruption(shards, tmp_path, engine, monkeypatch, capfd):
    """Six steps, and three and then three more with another process's worth of state: the same bits."""
    # DeepSpeed's ZeRO-3 replaces this function for the whole process; put it back
    # for the tests after this one.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    extra = (
        "adapter.dropout=0.1", "data.caption_dropout=0.3", "optim.schedule=cosine", "optim.warmup_steps=2",
        "run.grad_accum=2", "run.save_every_steps=3",
        engine.replace("zero.stage", "zero.engine=deepspeed,zero.stage")
    )
    extra = tuple(part for item in extra for part in item.split(","))
    assert train.run(config(shards, tmp_path / "whole", *extra)) == 0
    assert train.run(config(shards, tmp_path / "cut", *extra)) == 0
    assert capfd.readouterr().out.count("training LoRA rank 4 (76,800 parameters)") == 2  # ZeRO-3 hides them
    last = tmp_path / "cut/checkpoints/step-00000006"
    (last / "COMPLETE").unlink()  # as if it had been killed while writing: not complete, so it does not count
    (tmp_path / "cut/lora.safetensors").unlink()
    assert train.run(config(shards, tmp_path / "cut", *extra)) == 0
    assert same(tmp_path / "whole/lora.safetensors", tmp_path / "cut/lora.safetensors")
    for name in ("params", "optimizer"):
        assert same(
            tmp_path / f"whole/checkpoints/step-00000006/{name}.safetensors", last / f"{name}.safetensors"
        )


def test_sigterm_saves_and_a_restart_finishes(shards, tmp_path):
    many = ("run.steps=12",)
    assert train.run(config(shards, tmp_path / "whole", *many)) == 0

    def interrupt():
        while (
            not (tmp_path / "cut/metrics.jsonl").exists() or not (tmp_path / "cut/metrics.jsonl").read_text()
        ):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = train.run(config(shards, tmp_path / "cut", *many))
    thread.join()
    assert code == 75
    stopped = checkpoint.load(checkpoint.newest(tmp_path / "cut/checkpoints")).progress.step
    assert 0 < stopped < 12
    assert train.run(config(shards, tmp_path / "cut", *many)) == 0
    assert same(tmp_path / "whole/lora.safetensors", tmp_path / "cut/lora.safetensors")


def test_epochs(shards, tmp_path):
    """10 samples, 2 a step: two epochs are ten steps; a save each time half an epoch is complete."""
    cfg = config(
        shards, tmp_path / "run", "run.steps=null", "run.epochs=2", "run.save_every_epochs=0.5",
        "run.keep_last=0"
    )
    assert train.run(cfg) == 0
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").iterdir())
    assert saved == [3, 5, 8, 10]
    assert [
        checkpoint.load(tmp_path / f"run/checkpoints/step-{s:08d}").progress.epoch for s in saved
    ] == [0, 1, 1, 2]


def test_full_fine_tune_from_scratch_with_ema(shards, tmp_path):
    cfg = config(
        shards, tmp_path / "run", "adapter.type=none", "model.dit=null", "model.flavor=tiny",
        "run.ema_decay=0.5", "run.steps=2", "run.name=dit"
    )
    assert train.run(cfg) == 0
    loaded = load_dit(tmp_path / "run/dit.safetensors", dtype=torch.float32)
    assert loaded.flavor.name == "tiny" and loaded.arch == find("hunyuan-video").flavors["tiny"].arch
    assert not same(tmp_path / "run/dit.safetensors", tmp_path / "run/dit-ema.safetensors")


def test_another_run_is_refused(shards, tmp_path):
    train.run(config(shards, tmp_path / "run", "run.steps=1"))
    with pytest.raises(ConfigError, match="holds another run: adapter.rank is 4 there, 8 here; choose"):
        train.run(config(shards, tmp_path / "run", "adapter.rank=8"))
    with pytest.raises(ConfigError, match="run.resume is 'never'"):
        train.run(config(shards, tmp_path / "run", "run.resume=never"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    with pytest.raises(ConfigError, match="no run of hvtrain"):
        train.run(config(shards, tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["photo.jpg"]
    with pytest.raises(ConfigError, match="photo.jpg cannot be made a directory"):
        train.run(config(shards, tmp_path / "mine/photo.jpg"))


def test_changed_shards_are_another_run_and_moved_ones_are_not(tmp_path):
    train.run(config(make_shards(tmp_path / "a", n=3), tmp_path / "run", "run.steps=1"))
    assert train.run(config(make_shards(tmp_path / "moved", n=3), tmp_path / "run", "run.steps=2")) == 0
    with pytest.raises(
        ConfigError, match=r'data.shards is \["3 samples, .*"\] there, \["4 samples, .*"\] here;'
    ):
        train.run(config(make_shards(tmp_path / "more", n=4), tmp_path / "run"))


def test_killed_between_the_last_files(shards, tmp_path, monkeypatch):
    """A run that dies before its last checkpoint is whole writes the user's file again;
    it never has one without it."""
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", die)
        train.run(config(shards, tmp_path / "run", "run.steps=1"))
    (tmp_path / "run/lora.safetensors").unlink()
    assert train.run(config(shards, tmp_path / "run", "run.steps=1")) == 0
    assert (tmp_path / "run/lora.safetensors").exists()


def test_nan_stops_and_names_the_samples(tmp_path):
    shards = make_shards(tmp_path / "shards", n=1, poison="clip0")
    with pytest.raises(HvtrainError, match="2 steps in a row had no finite gradient.*clip0 loss nan"):
        train.run(config(shards, tmp_path / "run", "run.max_bad_steps=2", "data.batch_size=1"))
    assert '"train/loss": null' in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.shards=[]", "data.shards is empty"),
        ("data.shards=nowhere", "nowhere does not exist"),
        ("model.dit=gone.safetensors", "gone.safetensors does not exist"),
        ("model.dit=null", "a LoRA needs the weights"),
        ("run.steps=null", "either run.steps or run.epochs"),
        ("run.grad_accum=0", "run.grad_accum is 0"),
        ("optim.warmup_steps=7", "optim.warmup_steps is 7"),
        ("optim.name=adamww", "did you mean .adamw."),
        ("model.dtype=bfloat16", "needs model.dtype float32"),
        ("zero.offload_optimizer=cpu", "torch engine"),
        ("parallel.kernel=sage", "sage"),
        ("adapter.exclude=.*", "leaves nothing to train"),
        ("preview.every_steps=1", "preview.prompts is empty"),
        ("eval.every_steps=1", "eval.shards is empty"),
        ("adapter.alpha=-1", "adapter.alpha is -1.0, expected more than 0"),
        ("adapter.init_from=gone.safetensors", "adapter.init_from: gone.safetensors does not exist"),
        ("optim.lr=-1", "optim.lr is -1.0, expected 0 or more"),
        ("optim.betas=[0.9, 1.0]", r"optim.betas\[1\] is 1.0"),
        ("flow.shift=0", "flow.shift is 0.0, expected more than 0"),
        ("data.workers=-1", "data.workers is -1"),
        ("run.name=a/b", "without a directory"),
        ("parallel.ulysses=3", "does not divide the 1 process"),
    ],
)
def test_mistakes(shards, tmp_path, override, says):
    with pytest.raises(HvtrainError, match=says) as caught:
        train.run(config(shards, tmp_path / "run", override))
    assert "\n" not in str(caught.value)


def test_shards_of_another_model(tmp_path):
    from shards.schema import Chunk, Manifest, save_manifest
    from shards.writer import write_tar

    tars = {
        "latents": write_tar(tmp_path, "latents/0.tar", [("a", {"latents": torch.zeros(4, 1, 2, 2)}, {})])
    }
    save_manifest(tmp_path, Manifest(("latents",), (Chunk("1x16x16", ("a",), tars),)))
    with pytest.raises(DataError, match="latents of 4 channels"):
        train.run(config(tmp_path, tmp_path / "run"))


def test_checkpoints_are_rotated_and_incomplete_ones_ignored(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(
            tmp_path, Snapshot(Progress(step), {"w": torch.ones(2)}, {"w": {"step": torch.tensor(1.0)}}),
            keep_last=2
        )
    (tmp_path / "step-00000009").mkdir()
    assert checkpoint.newest(tmp_path).name == "step-00000003"
    assert not (tmp_path / "step-00000001").exists()
    assert checkpoint.load(tmp_path / "step-00000003").optimizer["w"]["step"] == 1
    (tmp_path / "step-00000003/params.safetensors").write_bytes(b"x")
    with pytest.raises(HvtrainError, match="step-00000003: cannot be read"):
        checkpoint.load(tmp_path / "step-00000003")


def test_caption_dropout():
    batch = {"text": torch.ones(400, 3, 2), "text_len": torch.full((400,), 3), "pooled": torch.ones(400, 4)}
    empty = {"text": torch.zeros(5, 2), "pooled": torch.zeros(4)}
    shares, fields = [0.25] * len(batch["text_len"]), find("hunyuan-video").flavor(None).cond
    out = drop_captions(batch, empty, shares=shares, draw=torch.Generator().manual_seed(0), fields=fields)
    dropped = out["text_len"] == 5
    assert 70 < dropped.sum() < 130
    assert not out["text"][dropped].any() and not out["pooled"][dropped].any()
    assert out["text"][~dropped][:, :3].all() and not out["text"][~dropped][:, 3:].any()
