"""What doctor says of GPUs that the driver, Slurm and torch do not agree on. This machine's torch sees
none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import doctor, processes

SMI = """#!/bin/sh
case "$1" in
    -L) for i in 0 1; do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done ;;
    *) for i in 0 1; do echo "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54"; done ;;
esac
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nvidia-smi lists two GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    return smi


def gpus() -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor._gpus()}


def test_gpus_that_torch_does_not_see(
    driver: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cu130")
    found = gpus()
    assert found["GPU"].found.startswith("NVIDIA H100")
    assert found["torch sees"].found == "0 of 2 GPU(s)" and found["torch sees"].fatal
    assert "driver that is too old" in found["torch sees"].advice
    assert doctor.run() == 2
    assert "MISSING torch sees" in capsys.readouterr().out


def test_a_build_without_cuda_on_a_gpu_machine(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cpu")
    found = gpus()
    assert found["torch build"].fatal and "torch sees" not in found


def test_gpus_are_counted_as_processes_will_find_them(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.count_gpus() == 2
    for chosen, n in (("1", 1), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert doctor.count_gpus() == n, chosen
    # Hidden on purpose: nothing is missing.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "_version", lambda name: "2.13.0+cu130")
    assert "torch sees" not in gpus()


@pytest.mark.parametrize("smi", ["#!/bin/sh\nexit 0\n", "#!/bin/sh\nexec /nowhere\n", None])
def test_gpus_that_slurm_gave_and_nobody_finds(
    driver: Path, smi: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if smi is None:
        driver.unlink()
    else:
        driver.write_text(smi)
    if smi != "#!/bin/sh\nexec /nowhere\n":
        assert gpus()["GPU"].found == "none: runs on the CPU"
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    assert gpus()["GPU"].fatal is (smi != "#!/bin/sh\nexec /nowhere\n") and gpus()["GPU"].advice


def test_cores_are_those_of_the_job(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine's 96 this job has 3: too few for two GPUs, and what a
    process's threads are counted from."""
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6}, raising=False)
    assert processes.cores() == 3
    found = {f.name: f for f in doctor._system()}
    assert found["cores"].found == "3" and "fewer than 2 for each GPU" in found["cores"].advice
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert {f.name: f for f in doctor._system()}["cores"].advice == ""


def test_threads_of_a_process_are_its_share_of_the_jobs_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\nopen(sys.argv[1] + os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])\n"
    )
    monkeypatch.setattr(processes, "HVTRAIN", (processes.HVTRAIN[0], str(script)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for expected in ("3", "5"):  # 7 // 2; the user's own setting wins
        assert processes.launch([f"{tmp_path}/rank"], processes.Topology(nproc=2)) == 0
        assert [(tmp_path / f"rank{r}").read_text() for r in range(2)] == [expected] * 2
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
