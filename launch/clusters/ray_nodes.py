"""Wait until a Ray cluster that is just starting has all its nodes: ``python -m launch.clusters.ray_nodes``."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

from teacher_cache.build import import_ray

INTERVAL_S = 1.0


def wait_until(condition: Callable[[], bool], *, end: float) -> bool:
    """Return whether a condition came true before a moment of the monotonic clock."""
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(INTERVAL_S)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Wait for the nodes of the cluster at RAY_ADDRESS; exit 3 when they did not come."""
    parser = argparse.ArgumentParser(prog="python -m launch.clusters.ray_nodes", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True, help="nodes that the cluster must have")
    parser.add_argument("--limit-s", type=float, required=True, help="seconds to wait for them")
    options = parser.parse_args(argv)
    address = os.environ["RAY_ADDRESS"]
    end = time.monotonic() + options.limit_s
    if not wait_until(lambda: _listens(address), end=end):
        print(f"nothing listens at {address} within {options.limit_s:.0f} s: see the log of Ray", file=sys.stderr)
        return 3
    ray = import_ray()
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")

    def alive() -> int:
        return sum(node["Alive"] for node in ray.nodes())

    if not wait_until(lambda: alive() >= options.nodes, end=end):
        message = f"{alive()} of {options.nodes} Ray nodes within {options.limit_s:.0f} s: see the log of Ray"
        print(message, file=sys.stderr)
        return 3
    return 0


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=INTERVAL_S).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
