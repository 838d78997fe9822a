"""Which device a process takes: one GPU, eight, none, one that PyTorch cannot see. No GPU
is needed: PyTorch is told."""

from __future__ import annotations

import glob
import os

import pytest
import torch

from hvtrain.errors import LaunchError
from hvtrain.parallel.context import DEVICE, ParallelContext, start

ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", DEVICE, "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "WORLD_SIZE", "RANK", "LOCAL_RANK",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
)  # fmt: skip


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """`machine(sees=, has=)`: so many GPUs for PyTorch, and for the operating
    system. Returns which were taken."""
    for name in ENVIRONMENT:
        # so that it is put back, also if it was not there and is set by what is tested
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    taken: list[torch.device] = []

    def make(*, sees: int, has: int | None = None, complains: str = "") -> list[torch.device]:
        files = [f"/dev/nvidia{i}" for i in range(sees if has is None else has)]

        def init() -> None:
            if complains:
                raise RuntimeError(complains + "\nand a second line")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: sees > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: sees)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(glob, "glob", lambda pattern: files if pattern == "/dev/nvidia[0-9]*" else [])
        return taken

    return make


def test_one_gpu_is_taken(machine):
    taken = machine(sees=1)
    ctx = start()
    assert (
        ctx.device == torch.device("cuda", 0) and taken == [ctx.device] and ctx.device_name == "NVIDIA H100"
    )


def test_a_gpu_s_memory_is_in_segments_that_grow_unless_the_user_says_otherwise(machine, monkeypatch):
    machine(sees=1)
    start(device="cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    start()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    start()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    start()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_each_of_eight_processes_takes_its_own(machine, monkeypatch):
    taken = machine(sees=8)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert start().device == torch.device("cuda", 5) and taken == [torch.device("cuda", 5)]


def test_a_process_without_a_gpu_says_how_many_there_are(machine, monkeypatch):
    machine(sees=1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        LaunchError, match=r"process 1 .* has no GPU: PyTorch sees 1; start .*--nproc 1.*HVTRAIN_DEVICE=cpu"
    ):
        start()
    monkeypatch.setenv(DEVICE, "cpu")
    assert start().device == torch.device("cpu")


def test_no_gpu_is_a_cpu(machine):
    assert machine(sees=0) == [] and start().device == torch.device("cpu")
    assert ParallelContext().device_name == "CPU"


def test_a_gpu_that_pytorch_cannot_see_is_refused_by_name(machine, monkeypatch):
    machine(sees=0, has=2, complains="The NVIDIA driver on your system is too old (found version 11040).")
    with pytest.raises(LaunchError) as error:
        start()
    text = str(error.value)
    assert "\n" not in text and torch.__version__ in text
    assert (
        "/dev/nvidia0, but PyTorch" in text
        and "driver on your system is too old (found version 11040). Install" in text
    )
    assert f"{DEVICE}=cpu" in text
    monkeypatch.setenv(DEVICE, "cpu")
    assert start().device == torch.device("cpu")


@pytest.mark.parametrize("variable", ["SLURM_JOB_GPUS", "SLURM_STEP_GPUS"])
def test_gpus_that_slurm_gave_count_too(machine, monkeypatch, variable):
    machine(sees=0)
    monkeypatch.setenv(variable, "0,1")
    with pytest.raises(
        LaunchError, match=f"Slurm gave this job {variable}=0,1, but PyTorch .* no device is visible"
    ):
        start()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_gpus_that_were_hidden_are_not_missed(machine, monkeypatch, hidden):
    machine(sees=0, has=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert start().device == torch.device("cpu")


def test_a_device_that_was_asked_for_is_that_or_an_error(machine, monkeypatch):
    machine(sees=1)
    assert start(device="cpu").device == torch.device("cpu")
    machine(sees=0)
    with pytest.raises(LaunchError, match="PyTorch sees 0"):
        start(device="cuda")
    monkeypatch.setenv(DEVICE, "cuda")
    with pytest.raises(LaunchError, match="PyTorch sees 0"):
        start()
    monkeypatch.setenv(DEVICE, "gpu")
    with pytest.raises(LaunchError, match="HVTRAIN_DEVICE is 'gpu', expected cpu or cuda"):
        start()
