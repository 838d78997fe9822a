"""Killed at any moment, on any rank, with a full disk: nothing is lost, doubled or torn."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from hvtrain.tiny.data import ClipsRecipe, write_clips
from shards import open_set
from shards.verify import verify
from tests.encode.test_run import CONFIG, contents, run, same

# Imports once, then forks two ranks per line read: a kill costs a second, not the
# ten of two fresh interpreters.
SERVER = """
import os, sys
import torch
torch.set_num_threads(1)
import hvtrain.encode.check, hvtrain.encode.run
import hvtrain.models.hunyuan_video.vae, hvtrain.models.hunyuan_video.text
from hvtrain.config import EncodeConfig, load
config, *items = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    port = line.strip()
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.setsid()
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            try:
                hvtrain.encode.run.run(load(EncodeConfig, config, items))
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    print(*children, flush=True)
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


class Ranks:
    """Two ranks of `hvtrain encode`, again and again."""

    def __init__(self, dataset, output):
        command = [
            sys.executable, "-c", SERVER, str(CONFIG), f"dataset={dataset}", f"output={output}",
            "samples_per_tar=1"
        ]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline().strip() == "ready"

    def start(self):
        from launcher.processes import free_port

        self.server.stdin.write(f"{free_port()}\n")
        self.server.stdin.flush()
        return [int(pid) for pid in self.server.stdout.readline().split()]

    def wait(self):
        return [int(code) for code in self.server.stdout.readline().split()]

    def close(self):
        self.server.stdin.close()
        self.server.wait(60)


def kill(pids):
    for pid in pids:
        with suppress(ProcessLookupError):  # already done
            os.kill(pid, signal.SIGKILL)


def kill_and_continue(tmp_path, n_kills, n):
    dataset = write_clips(ClipsRecipe(output=str(tmp_path / "clips"), n=n, seed=3))
    out, rng = tmp_path / "out", random.Random(5)
    ranks = Ranks(dataset, out)
    try:
        begun = time.monotonic()
        ranks.start()
        assert ranks.wait() == [0, 0]
        seconds = time.monotonic() - begun
        whole = contents(open_set(out))  # an uninterrupted run, with as many threads
        assert len(whole) == n
        reached = set()
        for number in range(n_kills):
            if number % 5 == 0 or (out / "manifest.json").exists():
                shutil.rmtree(out)  # from nothing again; else what the kills before left is continued
            pids = ranks.start()
            wanted, deadline = rng.randrange(2 * n), time.monotonic() + 2 * seconds
            while len(list(out.glob("*/*.tar"))) < wanted and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            kill(rng.choice([pids[:1], pids[1:], pids]))
            time.sleep(0.05)
            kill(pids)  # the launcher takes the others down
            ranks.wait()
            tars = len(list(out.glob("*/*.tar")))
            reached.add(tars)
            if (out / "manifest.json").exists():
                assert list(verify(out)) == []
        assert len(reached) > 2, "the kills did not fall at different moments"
        ranks.start()
        assert ranks.wait() == [0, 0]
    finally:
        ranks.close()
    assert list(verify(out)) == [] and same(whole, contents(open_set(out)))
    assert not [
        p for p in out.rglob("*") if p.name.endswith(".tmp") or ".journal" in p.name or ".progress" in p.name
    ]
    named = {tar.path for chunk in open_set(out).manifest.chunks for tar in chunk.tars.values()}
    assert {str(p.relative_to(out)) for p in out.glob("*/*.tar")} == named


def test_killed_ranks_are_continued(tmp_path):
    kill_and_continue(tmp_path, 10, 12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills(tmp_path):
    kill_and_continue(tmp_path, 50, 24)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_a_clear_error_and_a_sound_set(tmp_path, small_disk):
    small = write_clips(ClipsRecipe(output=str(tmp_path / "small"), n=4, seed=1))
    out = small_disk / "out"
    first = contents(run(small, out))
    large = write_clips(ClipsRecipe(output=str(tmp_path / "large"), n=30, seed=2))
    both = tmp_path / "both.toml"
    both.write_text("[general]\nresolution=[64,64]\n" + "".join(
        f"[[datasets]]\nvideo_directory='{d.parent}'\ntarget_frames=[9]\n" for d in (small, large)))
    command = [
        sys.executable, "-m", "launcher.cli", "encode", str(CONFIG), f"dataset={both}", f"output={out}"
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "make room" in done.stderr and "Traceback" not in done.stderr
    assert list(verify(out)) == [] and same(first, contents(open_set(out)))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "34 samples" in done.stdout, done.stderr
    assert list(verify(out)) == [] and all(
        torch.equal(first[k][n], t) for k, v in contents(open_set(out)).items() if k in first for n,
        t in v.items()
    )
