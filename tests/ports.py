"""Ports for servers that tests start."""

import contextlib
import secrets
import socket

_GIVEN: set[int] = set()


def free_port() -> int:
    """Return a port below those that a kernel hands out, so that nobody takes it before the server does."""
    while True:
        port = 10_000 + secrets.randbelow(5_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port
