"""A process killed while it compiles DeepSpeed's disk access keeps no later one waiting."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hvtrain.errors import ConfigError
from hvtrain.train import zero_ops
from hvtrain.train.zero_ops import compiled

DIES = """
import os, signal, sys
from pathlib import Path
from hvtrain.train.zero_ops import compiled

class Op:
    name = "an_op"
    def load(self, verbose=False):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name
        (folder / "lock").touch()
        (folder / "half.o").touch()
        os.kill(os.getpid(), signal.SIGKILL)

compiled(Op())
"""


class Op:
    name = "an_op"

    def __init__(self, root: Path) -> None:
        self.folder, self.found = root / self.name, []

    def load(self, verbose: bool = False) -> None:
        assert (self.folder.parent / ".lock").exists()
        self.found.append(sorted(path.name for path in self.folder.iterdir()))


@pytest.fixture
def op(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return Op(tmp_path)


def test_what_a_killed_process_left_is_made_anew(op, capsys):
    dead = subprocess.run([sys.executable, "-c", DIES], cwd=Path(__file__).parents[2])
    assert dead.returncode == -9 and (op.folder / "lock").exists()
    compiled(op)
    assert op.found == [[]] and "was killed while it compiled; made anew" in capsys.readouterr().out
    assert [path.name for path in op.folder.parent.iterdir()] == [op.name]
    (op.folder / "op.so").touch()
    compiled(op)  # nothing is thrown away twice
    assert op.found[1:] == [["op.so"]] and capsys.readouterr().out == ""


def test_what_is_whole_is_kept_though_its_user_was_killed(op):
    dead = subprocess.run([sys.executable, "-c", DIES.replace(".touch()", "")], cwd=Path(__file__).parents[2])
    assert dead.returncode == -9 and (op.folder.parent / ".lock").exists()
    (op.folder / "op.so").touch()
    compiled(op)
    assert op.found == [["op.so"]]


def test_another_program_s_lock_is_waited_for_and_named(op, capsys):
    op.folder.mkdir()
    (op.folder / "lock").touch()
    with pytest.raises(ConfigError, match=f"{op.folder}/lock has been there .* rm -r '{op.folder}'"):
        compiled(op, wait_s=0.2)
    assert not op.found and (op.folder / "lock").exists()
    threading.Timer(0.3, (op.folder / "lock").unlink).start()
    compiled(op, wait_s=20)
    assert op.found == [[]] and "waiting for whoever compiles" in capsys.readouterr().out


def test_one_after_the_other(op, monkeypatch, capsys):
    monkeypatch.setattr(zero_ops, "SILENT_S", 0.1)
    inside, most = [], []

    def load(verbose: bool = False) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.3)
        inside.pop()

    op.load = load
    threads = [threading.Thread(target=compiled, args=(op,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    said = capsys.readouterr().out
    assert said.count(f"the first time: {op.folder}\n") == 3
    assert said.count(f"the first time: TORCH_EXTENSIONS_DIR: {op.folder.parent} is in use by") == 2


def test_a_folder_that_cannot_be_made(op, monkeypatch):
    (op.folder.parent / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(op.folder.parent / "file"))
    with pytest.raises(ConfigError, match=f"{os.sep}file.*set TORCH_EXTENSIONS_DIR to a directory"):
        compiled(op)
