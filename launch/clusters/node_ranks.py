"""The training processes of one node of several: ``python -m launch.clusters.node_ranks``.

What torchrun would do, except that exit codes survive: a refusal (2 or 4) must not look like a failure worth a retry.
"""

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.clusters.endings import leave_ending
from launch.processes import SHUTDOWN_TIMEOUT_S, trainer_environment

REFUSALS = (2, 4)
DEATHS = tuple(128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS))
POLL_S = 0.2
GRACE_S = 5.0
"""Seconds in which other processes may give a better reason after the first has failed."""


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """One node among those that train together."""

    node: int
    nodes: int
    processes_per_node: int
    master_address: str
    master_port: int

    def variables(self, local_rank: int) -> dict[str, str]:
        """Return the five launch variables of one process."""
        return {
            "RANK": str(self.node * self.processes_per_node + local_rank),
            "WORLD_SIZE": str(self.nodes * self.processes_per_node),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def train_arguments(run_file: str, *, student: str) -> list[str]:
    """Return the command of one training process."""
    return [sys.executable, "-m", "launch.cli", "train", run_file, "--student", student]


def run_ranks(command: Sequence[str], *, place: NodePlace, log_dir: Path) -> int:
    """Run a command once per process of this node; return 0, or the exit code that says most about the failure.

    The first process writes to this console, the others to files under ``log_dir``. SIGTERM is passed on.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    environment = trainer_environment(num_processes=place.processes_per_node)
    processes = [
        _start(command, place=place, local_rank=rank, environment=environment, log_dir=log_dir)
        for rank in range(place.processes_per_node)
    ]
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        _signal_all(processes, signal.SIGTERM)

    main_thread = threading.current_thread() is threading.main_thread()
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, forward)} if main_thread else {}
    try:
        while any(process.poll() is None for process in processes) and not _failed(processes):
            time.sleep(POLL_S)
        _end(processes, grace_s=SHUTDOWN_TIMEOUT_S if received else GRACE_S)
    finally:
        _signal_all(processes, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return decisive([process.wait() for process in processes])


def decisive(codes: Sequence[int]) -> int:
    """Return the exit code that says most: a refusal, then a process that died; 0 when all are 0.

    Where one process is killed, the others fail with an error of their own (1) or are told to end (143).
    """
    failures = [128 - code if code < 0 else code for code in codes if code != 0]
    for group in (REFUSALS, (3,), DEATHS, (1,)):
        for code in failures:
            if code in group:
                return code
    return failures[0] if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the processes of one node; a refusal is left where the jobs that wait for this one see it."""
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.node_ranks", allow_abbrev=False)
    parser.add_argument("run_file")
    parser.add_argument("--student", required=True)
    parser.add_argument("--log-dir", type=Path, required=True, help="folder for the output of all but the first")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node", type=int, required=True, help="number of this node, from 0 on")
    parser.add_argument("--processes-per-node", type=int, required=True)
    parser.add_argument("--master", required=True, metavar="HOST:PORT", help="where the first node can be reached")
    options = parser.parse_args(argv)
    host, _, port = options.master.rpartition(":")
    place = NodePlace(
        node=options.node,
        nodes=options.nodes,
        processes_per_node=options.processes_per_node,
        master_address=host,
        master_port=int(port),
    )
    code = run_ranks(train_arguments(options.run_file, student=options.student), place=place, log_dir=options.log_dir)
    if code in REFUSALS:
        leave_ending(options.run_file, f"train {options.student}", exit_code=code)
    return code


def _start(
    command: Sequence[str], *, place: NodePlace, local_rank: int, environment: dict[str, str], log_dir: Path
) -> subprocess.Popen[bytes]:
    variables = place.variables(local_rank)
    if local_rank == 0:
        return subprocess.Popen(command, env=environment | variables)
    with (log_dir / f"rank{variables['RANK']}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment | variables, stdout=log, stderr=log)


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() not in (None, 0) for process in processes)


def _end(processes: Sequence[subprocess.Popen[bytes]], *, grace_s: float) -> None:
    """Give all processes some time to end by themselves, then tell them to, then make them."""
    for limit_s, number in ((grace_s, signal.SIGTERM), (SHUTDOWN_TIMEOUT_S, signal.SIGKILL)):
        end = time.monotonic() + limit_s
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(POLL_S)
        _signal_all(processes, number)


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
