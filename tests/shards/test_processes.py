"""Reader processes: their memory is used again and never too early, and none outlives
its reader or hides its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch

from shards import ShardError
from shards.loader import AHEAD, BatchLoader
from shards.processes import read_ahead
from tests.shards.sets import make_set


def test_memory_is_used_again_when_the_last_view_is_gone(tmp_path):
    """Batches of two sizes: kept ones stay what they are, dropped ones' memory holds the next."""
    found = make_set(tmp_path, sizes=((6, 3), (6, 3000)))
    options = {"batch_size": 2, "workers": 2, "seed": 1}
    wanted = [b.tensors for b in islice(BatchLoader(found, **options), 60)]
    stream = read_ahead(BatchLoader(found, worker_type="process", **options))
    kept = [b.tensors["latents"][1:] for b in islice(stream, 20)]  # a part of a batch keeps its memory
    workers = stream.gi_frame.f_locals["workers"]
    held = [len(w.slots) for w in workers]
    assert min(held) >= 10 - AHEAD and all(torch.equal(k, w["latents"][1:]) for k, w in zip(kept, wanted))
    kept = kept[:1]
    for batch, tensors in zip(islice(stream, 40), wanted[20:]):
        assert all(torch.equal(batch.tensors[n], tensors[n]) for n in tensors)
    assert (
        all(len(w.slots) <= n + AHEAD for w, n in zip(workers, held))
        and torch.equal(kept[0], wanted[0]["latents"][1:])
    )
    stream.close()
    assert torch.equal(kept[0], wanted[0]["latents"][1:]) and not any(w.process.is_alive() for w in workers)


def test_slots_do_not_pile_up(tmp_path):
    found = make_set(tmp_path, sizes=((6, 3), (6, 3000)))
    stream = read_ahead(BatchLoader(found, batch_size=2, workers=1, worker_type="process"))
    for _ in islice(stream, 60):
        pass
    (worker,) = stream.gi_frame.f_locals["workers"]
    assert len(worker.slots) <= AHEAD + 2
    stream.close()


def test_a_worker_s_death_is_told_and_a_signal_for_the_run_is_none_of_its_business(tmp_path):
    found = make_set(tmp_path)
    stream = read_ahead(BatchLoader(found, batch_size=2, workers=1, worker_type="process"))
    next(stream)
    (worker,) = stream.gi_frame.f_locals["workers"]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.process.pid, number)
    assert [len(next(stream).keys) for _ in range(5)] and worker.process.is_alive()
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(
        ShardError, match=r"a reader process died \(exit code -9\); out of memory\? lower data.workers"
    ):
        for _ in range(2 * AHEAD):
            next(stream)


def test_a_bad_sample_ends_the_stream_with_its_name(tmp_path):
    found = make_set(tmp_path)
    tar = tmp_path / found.manifest.chunks[0].tars["latents"].path
    data = bytearray(tar.read_bytes())
    member = found.tar(found.manifest.chunks[0], "latents").members["clip0_1.safetensors"]
    data[member.offset + member.size - 1] ^= 1
    tar.write_bytes(bytes(data))
    with pytest.raises(ShardError, match="clip0_1.*damaged"):
        list(islice(BatchLoader(found, batch_size=1, workers=2, worker_type="process"), 9))
    skipping = BatchLoader(found, batch_size=1, workers=2, worker_type="process", on_bad_sample="skip")
    assert any("clip0_1" in text for batch in islice(skipping, 9) for text in batch.bad)


def test_workers_end_with_their_reader(tmp_path):
    """A script that just ends, and one that is killed."""
    make_set(tmp_path)
    code = (
        "import sys, os, time\n"
        "from shards import open_set\n"
        "from shards.loader import BatchLoader\n"
        "from shards.processes import read_ahead\n"
        "if __name__ == '__main__':\n"
        f"    stream = read_ahead(BatchLoader(open_set({str(tmp_path)!r}), batch_size=2, workers=2, "
        "worker_type='process'))\n    next(stream)\n"
        "    print(*[w.process.pid for w in stream.gi_frame.f_locals['workers']], flush=True)\n"
        "    if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)\n"
    )
    (script := tmp_path / "script.py").write_text(code)
    for how in ("ends", "killed"):
        done = subprocess.run([sys.executable, script, how], capture_output=True, text=True, timeout=120)
        assert done.returncode == (-9 if how == "killed" else 0), done.stderr
        pids, deadline = [int(pid) for pid in done.stdout.split()], time.monotonic() + 30
        assert len(pids) == 2 and not done.stderr
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_runs, pids)), how


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
