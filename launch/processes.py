"""Start trainer processes on this machine, and pass signals on to them."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHUTDOWN_TIMEOUT_S = 120  # torchrun's own 30 s is too short to finish a step and write a checkpoint


def under_launcher() -> bool:
    """Return True when deepspeed, torchrun or srun started this process (even with variables missing)."""
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def torchrun_command(arguments: Sequence[str], *, num_processes: int) -> list[str]:
    """Return the command that runs ``genrecal`` with ``arguments`` in several processes on this machine."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(num_processes), "--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S)),
        *("-m", "launch.cli", *arguments),
    ]


def trainer_environment(*, num_processes: int) -> dict[str, str]:
    """Return the environment of trainer processes: cores shared out, third-party warning noise off."""
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    return {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore::FutureWarning"} | dict(os.environ)


def run_process(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run a command to its end and return its exit code: 128 + n when signal n reached this process meanwhile."""
    received: list[int] = []
    process = subprocess.Popen(command, env=dict(environment))

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        process.send_signal(signum)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code
