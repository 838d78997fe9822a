"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd in a temporary directory."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")

PACE = "bf_interval=1,sched_interval=1,sched_min_interval=200000,batch_sched_delay=1,default_queue_depth=50"
CONF = """ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ctl}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters={pace}
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=30
MinJobAge=600
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=4 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if absent:
        return f"Slurm is not installed ({absent[0]} is missing): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "starting slurmctld and slurmd needs root"
    with suppress(KeyError):
        pwd.getpwnam("munge")
        return ""
    return "there is no user munge"


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.daemons: list[subprocess.Popen] = []
        self.host = socket.gethostname().split(".")[0]
        self.env = {
            **os.environ, "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        self._munge()
        for folder in ("state", "spool.n1", "spool.n2"):
            (self.root / folder).mkdir()
        ctl, one, two = free_ports(3)
        (self.root / "slurm.conf").write_text(
            CONF.format(pace=PACE, host=self.host, root=self.root, ctl=ctl, one=one, two=two)
        )
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(
            lambda: self.out("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], "both nodes idle", 60
        )

    def _munge(self) -> None:
        folder, user = self.root / "munge", pwd.getpwnam("munge")
        folder.mkdir()
        os.chmod(self.root, 0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        for path in (key, folder):
            os.chown(path, user.pw_uid, user.pw_gid)
        key.chmod(0o400)
        folder.chmod(0o755)
        command = [
            "munged", "-F", f"--key-file={key}", f"--socket={folder / 'munge.socket'}",
            f"--pid-file={folder / 'munged.pid'}", f"--log-file={folder / 'munged.log'}",
            f"--seed-file={folder / 'munged.seed'}", "--force",
        ]
        self.daemons.append(subprocess.Popen(
            command, env=self.env, user=user.pw_uid, group=user.pw_gid, extra_groups=[],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ))
        self._until((folder / "munge.socket").exists, "munged", 20)

    def _daemon(self, *command: str) -> None:
        with (self.root / f"{command[0]}.out").open("ab") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    def stop(self) -> None:
        with suppress(Exception):
            self.out("scancel", "--user=root")
            time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout, cwd=self.root
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done

    def out(self, *command: str) -> str:
        return self.run(*command, check=False).stdout

    def state(self, job: str) -> str:
        """Slurm's word for the job."""
        words = dict(w.partition("=")[::2] for w in self.out("scontrol", "show", "job", "-o", job).split())
        return words.get("JobState", "")

    def wait(self, job: str, *wanted: str, seconds: float = 180) -> str:
        """Until the job is in one of these states; requeued jobs need not sit out all of their two
        minutes."""
        def there() -> bool:
            state = self.state(job)
            if state == "PENDING" and "BeginTime" in self.out("squeue", "-h", "-j", job, "-o", "%r"):
                # the node must have forgotten the job's first start, else the second one fails
                time.sleep(10)
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
            return state in wanted

        self._until(there, f"job {job} {' or '.join(wanted)}", seconds, lambda: f"it is {self.state(job)}")
        return self.state(job)

    def _until(self, there, what: str, seconds: float, found=lambda: "") -> None:
        end = time.monotonic() + seconds
        while not there():
            if time.monotonic() > end:
                logs = "\n".join(p.read_text()[-1500:] for p in self.root.glob("*.log"))
                raise AssertionError(f"waited {seconds} s for {what}; {found()}\n{logs}")
            time.sleep(0.3)
