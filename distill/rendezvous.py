"""Join the processes of a launch into one group: whatever is in the way ends in an error, not in a wait."""

import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from teacher_cache.errors import ConfigError, GenrecalError

ARRIVAL_TIMEOUT_S = 1800.0
"""Time for all processes to arrive: nodes of a cluster do not start at once, and some load their image first."""
HANDSHAKE_TIMEOUT_S = 30.0
"""Time for whatever listens at MASTER_PORT to answer like the first process of a launch."""
POLL_S = 0.2

_launches = itertools.count()


class RendezvousFailed(GenrecalError):
    """The processes of a launch did not meet; they may when they are started again."""

    code = "rendezvous"
    exit_code = 3


def join_process_group(
    environment: Mapping[str, str], *, backend: str, device: torch.device, timeout: timedelta, arrival_timeout_s: float
) -> None:
    """Make torch's default process group, once every process has arrived.

    Args:
        environment: The five launch variables.
        backend: Of torch.distributed, such as gloo or nccl.
        device: Of this process.
        timeout: Longest duration of a collective.
        arrival_timeout_s: Longest wait for the other processes.

    Raises:
        RendezvousFailed: MASTER_PORT is taken, nobody answers there, or some processes did not arrive.
        ConfigError: The processes contradict each other.
    """
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    # torchrun's store outlives a group: the next one must not find the names of this one
    store = PrefixStore(f"genrecal/{next(_launches)}", _store(environment, arrival_timeout_s=arrival_timeout_s))
    wait_for_all(store, rank=rank, world_size=world_size, timeout_s=arrival_timeout_s)
    bound: dict[str, Any] = {"device_id": device} if device.type == "cuda" and world_size > 1 else {}
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **bound
    )


def _store(environment: Mapping[str, str], *, arrival_timeout_s: float) -> TCPStore:
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # torchrun's agent keeps the store of its processes
    hosts = environment["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=arrival_timeout_s)

    def connect() -> TCPStore:
        return TCPStore(host, port, is_master=hosts, wait_for_workers=False, timeout=timeout)

    if hosts:
        try:
            return connect()
        except (DistNetworkError, DistStoreError) as error:
            reason = str(error).splitlines()[0]
            raise RendezvousFailed(
                f"this process cannot listen at MASTER_PORT {port} ({reason}): another program has it; set "
                "MASTER_PORT to a free port"
            ) from error
    _wait_for_listener(host, port, timeout_s=arrival_timeout_s)
    return _in_time(
        connect,
        timeout_s=HANDSHAKE_TIMEOUT_S,
        message=(
            f"what listens at MASTER_ADDR {host}, MASTER_PORT {port} is not the first process of this launch: another "
            "program has the port; set MASTER_PORT to a free one"
        ),
    )


def _wait_for_listener(host: str, port: int, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousFailed(
                    f"nobody listens at MASTER_ADDR {host}, MASTER_PORT {port} after {timeout_s:g} s ({error}): the "
                    "process with RANK 0 must run on that machine"
                ) from error
        time.sleep(POLL_S)


def _in_time(connect: Callable[[], TCPStore], *, timeout_s: float, message: str) -> TCPStore:
    """Run in a thread of its own: torch's own time limit does not hold against a listener that stays silent."""
    outcome: queue.SimpleQueue[TCPStore | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(connect())
        except (DistNetworkError, DistStoreError) as error:
            outcome.put(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        found = outcome.get(timeout=timeout_s)
    except queue.Empty:
        raise RendezvousFailed(message) from None
    if isinstance(found, Exception):
        raise RendezvousFailed(message) from found
    return found


def wait_for_all(store: Store, *, rank: int, world_size: int, timeout_s: float) -> None:
    """Return once every process has called this.

    Raises:
        ConfigError: Another process states another size.
        RendezvousFailed: Another has the same rank, or some did not arrive in time.
    """
    stated = store.compare_set("world_size", "", str(world_size)).decode()
    if stated != str(world_size):
        raise ConfigError(f"WORLD_SIZE is {world_size} in this process and {stated} in another: start both alike")
    if store.add(f"rank/{rank}", 1) > 1:
        # no refusal: a scheduler that replaces a process lets it meet those that the lost one has left behind
        raise RendezvousFailed(
            f"two processes have RANK {rank}: one was replaced before the others ended, or give each its own RANK and "
            "each launch its own MASTER_PORT"
        )
    arrived = store.add("arrived", 1)
    deadline = time.monotonic() + timeout_s
    while arrived < world_size:
        if time.monotonic() > deadline:
            raise RendezvousFailed(
                f"{arrived} of {world_size} processes arrived within {timeout_s:g} s: look at the logs of the others"
            )
        time.sleep(POLL_S)
        arrived = store.add("arrived", 0)
