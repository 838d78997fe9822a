"""Rules for every test: no network, no GPU unless marked, slow ones only when asked for."""

from __future__ import annotations

import gc
import os
import random
import re
import socket
import sys
import zlib
from pathlib import Path

import pytest

# Before anything imports the libraries that read them; child processes inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Also where pytest is started in a directory that holds a `shards` or a `types.py`: no
# child looks for modules there.
os.environ["PYTHONSAFEPATH"] = "1"

# The files that take longest, most of it in processes of their own: begun first, so that none is left for the
# end, when one worker would have it alone and the others nothing.
HERE = Path(__file__).parent
LONGEST = (
    "slurm/test_real_slurm.py", "parallel/test_parity.py", "train/test_faults.py", "fit/test_command.py",
    "parallel/test_architectures.py", "strange/test_verbs.py", "test_docs.py", "generate/test_run.py",
    "generate/test_resume.py", "encode/test_crash.py", "test_model_contract.py", "train/test_both_experts.py",
    "test_workdir.py", "fit/test_memory.py", "train/test_ranks.py", "train/test_monitor.py",
    "generate/test_experts.py", "generate/test_preview.py", "train/test_optimizer_table.py",
    "models/hunyuan_video_15/test_road.py", "fuzz/test_commands.py", "fuzz/test_files.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config: pytest.Config) -> None:
    """Parity tests compare with the CPU, and a machine with one GPU has none for a second
    rank: `-m gpu` asks for GPUs."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # xdist would begin with the files of most tests, which are short ones
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    turn = {HERE / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turn.get(item.path, len(turn)))
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes; run with --slow"
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            reasons["gpu"] = "needs a CUDA device, and to be asked for: -m gpu"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by now stays: a full garbage collection, of which the code under test asks for many,
    then does not look through half a million objects (0.35 s) each time."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is drawn without a seed does not depend on the tests that this worker happened to run before."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails by name instead of passing where
    there happens to be a network."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test opened a connection to {address}: tests use no network")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
