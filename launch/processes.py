"""Start trainer processes on this machine: signals passed on, exit codes kept, no process left behind."""

import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHUTDOWN_TIMEOUT_S = 120  # torchrun's own 30 s is too short to finish a step and write a checkpoint
FATE_SHARED = "GENRECAL_PARENT_PID"
PR_SET_PDEATHSIG = 1


def under_launcher() -> bool:
    """Return True when deepspeed, torchrun or srun started this process (even with variables missing)."""
    by_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return by_srun or any(name in os.environ for name in LAUNCHER_VARIABLES)


def process_rank() -> int:
    """Return the rank that the launcher gave this process; 0 where it runs alone. Rank 0 owns the console."""
    if "RANK" in os.environ or not under_launcher():
        return int(os.environ.get("RANK", "0"))
    return int(os.environ.get("SLURM_PROCID", "0"))


def trainer_environment(*, num_processes: int) -> dict[str, str]:
    """Return the environment of trainer processes: cores shared out, third-party noise off, no orphans."""
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # torch 2.13 warns at each collective of deepspeed 0.19.8
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return defaults | dict(os.environ) | {FATE_SHARED: str(os.getpid())}


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, where that was this project.

    Otherwise trainers outlive a killed job and write into the same folder as its continuation.
    """
    if FATE_SHARED not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # the kernel says nothing of a parent that was gone before; one further up may be named, and be alive
    parent = int(os.environ[FATE_SHARED])
    if os.getppid() != parent and not _is_running(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def run_process(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run a command to its end and return its exit code, 128 + n where signal n ended it.

    Raises:
        SystemExit: With 128 + n: signal n reached this process meanwhile; it was passed on.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if process is not None:
            process.send_signal(signum)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, env=dict(environment))
        if received:  # before there was a process to pass it to
            process.send_signal(received[0])
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])
    return code if code >= 0 else 128 - code


def run_trainers(command: Sequence[str], *, num_processes: int, log_dir: Path) -> int:
    """Run a command in several processes that torch.distributed connects; return the exit code of the first to fail.

    Rank 0 writes to this console, the others to files under ``log_dir``. torchrun itself would turn every
    failure into exit code 1 and add its own traceback to ours.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ |= trainer_environment(num_processes=num_processes)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    log_dir.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        logs_specs=DefaultLogsSpecs(log_dir=str(log_dir), redirects=dict.fromkeys(range(1, num_processes), Std.ALL)),
        run_id=f"genrecal-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0
