"""Joining processes: a taken port, a silent listener, processes that contradict each other."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch

from distill import rendezvous
from distill.rendezvous import RendezvousFailed, join_process_group, wait_for_all
from launch.clusters.node_ranks import REFUSALS
from teacher_cache.errors import ConfigError
from tests.ports import free_port


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """Listen on a port like another program, which answers everything alike or stays silent."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                if answer is not None:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in connections:
        connection.close()


def join(*, rank: int, port: int, world_size: int = 2, arrival_timeout_s: float = 1.0) -> None:
    join_process_group(
        {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        backend="gloo",
        device=torch.device("cpu"),
        timeout=timedelta(seconds=10),
        arrival_timeout_s=arrival_timeout_s,
    )


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "http"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_taken_port_is_named(rank: int, answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HANDSHAKE_TIMEOUT_S", 1.0)
    expected = "MASTER_PORT {}.*set MASTER_PORT to a free"
    with listener(answer) as port, pytest.raises(RendezvousFailed, match=expected.format(port)):
        join(rank=rank, port=port)


def test_an_absent_first_process_is_named() -> None:
    port = free_port()
    expected = f"nobody listens at MASTER_ADDR 127.0.0.1, MASTER_PORT {port} after 1 s"
    with pytest.raises(RendezvousFailed, match=expected):
        join(rank=1, port=port)


def test_absent_processes_are_counted() -> None:
    with pytest.raises(RendezvousFailed, match="1 of 2 processes arrived within 1 s"):
        join(rank=0, port=free_port())


def test_processes_that_contradict_each_other_are_refused() -> None:
    store = torch.distributed.HashStore()
    wait_for_all(store, rank=0, world_size=1, timeout_s=1.0)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 3 in this process and 1 in another"):
        wait_for_all(store, rank=1, world_size=3, timeout_s=1.0)


def test_a_process_that_replaces_another_is_not_refused_for_good() -> None:
    store = torch.distributed.HashStore()
    wait_for_all(store, rank=0, world_size=1, timeout_s=1.0)
    with pytest.raises(RendezvousFailed, match="two processes have RANK 0"):
        wait_for_all(store, rank=0, world_size=1, timeout_s=1.0)


def test_processes_that_did_not_meet_are_started_again() -> None:
    assert RendezvousFailed.exit_code == 3
    assert ConfigError.exit_code in REFUSALS
    assert RendezvousFailed.exit_code not in REFUSALS
