"""A working directory that holds folders and files with the names of modules, as a user's may:
README calls a folder shards."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvtrain.tiny.data import ClipsRecipe, write_clips
from launcher.program import HVTRAIN

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "tiny"
SCRIPTS = Path(sys.executable).parent
FOLDERS, FILES = ("shards", "launcher", "slurm", "hvtrain"), ("random.py", "types.py", "selectors.py")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("odd")
    for name in FOLDERS:
        (here / name).mkdir()
    for name in FILES:
        (here / name).write_text(f"raise ImportError('{name} of the working directory was imported')\n")
    return here


def start(odd: Path, *command: str, code: int = 0) -> str:
    """What a shell in that directory would see: nothing that our own tests set for themselves."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        command, cwd=odd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def test_the_road_under_launch_with_reader_processes(odd: Path) -> None:
    """The README's own: encode into ./shards, train from it, on two processes; the
    readers are processes, too."""
    write_clips(ClipsRecipe(output=str(odd / "clips"), n=2, seed=3))
    encode = ["encode", f"{CONFIGS}/encode.yaml", "dataset=clips/dataset.toml", "output=shards"]
    start(odd, *HVTRAIN, "launch", "--nproc", "2", *encode)
    train = [
        "train", f"{CONFIGS}/lora.yaml", "data.shards=shards", "data.batch_size=1", "run.steps=1",
        "optim.warmup_steps=0", "preview.every_steps=0", "zero.engine=torch", "zero.offload_optimizer=none"
    ]
    readers = ["data.workers=1", "data.worker_type=process"] if sys.version_info >= (3, 11) else []
    start(odd, str(SCRIPTS / "hvtrain"), "launch", "--nproc", "2", *train, "run.output_dir=two", *readers)
    assert (odd / "two" / "zorb.safetensors").is_file()
    start(odd, str(SCRIPTS / "hvtrain"), *train, "run.output_dir=one", *readers)
    assert (odd / "one" / "zorb.safetensors").is_file()


def test_under_torchrun_and_deepspeeds_launcher(odd: Path) -> None:
    """As docs/train.md writes the line; `deepspeed` puts --local_rank=N before the arguments."""
    torchrun = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    out = start(odd, *torchrun, str(SCRIPTS / "hvtrain"), "selftest", "--dir", ".")
    assert "ulysses" in out.lower() and "rank 1" not in out
    env = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    rank = [shutil.which("env") or "env", *(f"{k}={v}" for k, v in env.items()), *HVTRAIN, "--local_rank=0"]
    assert "unknown key 'nothing'" in start(odd, *rank, "train", "nothing=1", code=2)


def test_modules_started_by_name_leave_the_working_directory(tmp_path: Path) -> None:
    """`-m` is not how hvtrain starts itself; but who does so meets a folder of data, if not a
    file named as Python's own."""
    for name in ("shards", "hvtrain"):
        (tmp_path / name).mkdir()
    (tmp_path / "yaml.py").write_text("raise ImportError('yaml.py of the working directory was imported')\n")
    for module in ("launcher", "launcher.cli", "launcher.worker"):
        assert start(tmp_path, sys.executable, "-m", module, "config", "train").startswith("model:"), module


def test_scripts_of_slurm_call_the_same_program(odd: Path) -> None:
    text = start(
        odd, *HVTRAIN, "launch", "--slurm", "--dry-run", "--nproc", "2", "train", f"{CONFIGS}/lora.yaml",
        "data.shards=shards", "run.output_dir=a"
    )
    line = next(line for line in text.splitlines() if line.strip().startswith("srun"))
    assert f"{shlex.join(HVTRAIN)} launch" in line and " -m " not in line
