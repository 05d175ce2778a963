"""A Slurm cluster of two nodes on this machine, from Debian's packages, with a folder and ports of its own."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName={host}2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return which of Slurm's programs this machine lacks."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster, yield the environment in which its programs work, end its processes."""
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    for name in ("state", f"spool-{socket.gethostname()}", f"spool-{socket.gethostname()}2"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=socket.gethostname(), user=getpass.getuser(), ports=ports)
    )
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{len(daemons)}-{command[0]}.out").open("wb") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        munge = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
        munge |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        start("munged", "--foreground", "--force", *(f"--{name}={value}" for name, value in munge.items()))
        _wait(lambda: (folder / "munge.socket").exists(), what="munged", folder=folder)
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", socket.gethostname())
        start("slurmd", "-D", "-N", f"{socket.gethostname()}2")
        _wait(lambda: _idle_nodes(environment) == 2, what="two idle nodes", folder=folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment, check=False, capture_output=True)
        _wait(lambda: not _queue(environment), what="an empty queue", folder=folder)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            daemon.wait(timeout=120)


def _idle_nodes(environment: dict[str, str]) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle"], env=environment, capture_output=True, text=True, check=False
    )
    return len(done.stdout.splitlines())


def _queue(environment: dict[str, str]) -> str:
    command = ["squeue", "--noheader", "--states=PENDING,RUNNING,COMPLETING"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _wait(condition: Callable[[], bool], *, what: str, folder: Path, limit_s: float = 180) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"no {what} within {limit_s:.0f} s\n{logs}")
        time.sleep(0.2)
