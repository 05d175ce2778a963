"""Whether Ray is safe to use from here: the token that guards it, and the cluster to reach. Imports no Ray."""

import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from launch.doctor.findings import Finding, ok, problem, warning
from teacher_cache.errors import GenrecalError
from teacher_cache.ray_guard import REFUSALS, cluster_exposure, dashboard_status, token_exposure, token_path

CONNECT_TIMEOUT_S = 3.0
GCS_PORT = 6379
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_ray(environment: Mapping[str, str], *, dashboard: str | None = None) -> Iterator[Finding]:
    """Yield findings about the cluster that the environment or a run file names.

    Args:
        environment: With RAY_ADDRESS, RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE and the token, where they are set.
        dashboard: Address of the dashboard in the run file.
    """
    address = environment.get("RAY_ADDRESS")
    dashboard = dashboard or environment.get("RAY_API_SERVER_ADDRESS")
    yield check_authentication(environment, uses_cluster=bool(address or dashboard))
    if address and address not in ("local", "auto"):
        yield check_cluster(address)
    if dashboard:
        yield check_dashboard(dashboard)


def check_authentication(environment: Mapping[str, str], *, uses_cluster: bool) -> Finding:
    """Return whether a token guards the cluster, and whether others may read it."""
    if not uses_cluster and environment.get("RAY_AUTH_MODE") is None:
        return ok("Ray authentication", "no cluster is named: a build starts its own, with a token of its own")
    if (exposure := token_exposure(environment)) is not None:
        return problem("Ray authentication", exposure.found, remedy=exposure.remedy)
    place = "the environment" if environment.get("RAY_AUTH_TOKEN") else token_path(environment)
    return ok("Ray authentication", f"token, from {place}")


def check_cluster(address: str) -> Finding:
    """Return whether a cluster's control store answers at HOST:PORT, and refuses who has no token."""
    reached = check_reachable("Ray cluster", address)
    if reached.status != "ok" or "://" in address:
        return reached
    try:
        exposure = cluster_exposure(address if ":" in address else f"{address}:{GCS_PORT}")
    except GenrecalError as error:
        return problem("Ray cluster", str(error), remedy="look at the cluster's logs")
    return reached if exposure is None else problem("Ray cluster", exposure.found, remedy=exposure.remedy)


def check_reachable(check: str, address: str) -> Finding:
    """Return whether something answers at HOST:PORT."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        place = (parts.hostname or "", parts.port or GCS_PORT)
    except ValueError:
        return problem(check, f"{address} is no HOST:PORT", remedy="correct the address")
    try:
        with socket.create_connection(place, timeout=CONNECT_TIMEOUT_S):
            return ok(check, f"{place[0]}:{place[1]} answers")
    except OSError as error:
        return problem(
            check,
            f"{place[0]}:{place[1]} does not answer: {error.strerror or error}",
            remedy="start the cluster, correct the address, or open the port to this machine",
        )


def check_dashboard(address: str) -> Finding:
    """Return whether the dashboard answers, and refuses who has no token."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return problem("Ray dashboard", f"{address} is no http://HOST:PORT", remedy="correct the address")
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    reached = check_reachable("Ray dashboard", f"{parts.hostname}:{parts.port or 8265}")
    if reached.status != "ok":
        return reached
    try:
        status = dashboard_status(place)
    except OSError as error:
        return problem(
            "Ray dashboard", f"{place} gives no answer: {type(error).__name__}", remedy="look at the cluster's logs"
        )
    if status == 200:
        return problem(
            "Ray dashboard", f"{place} lists jobs to whoever asks", remedy="start the cluster with RAY_AUTH_MODE=token"
        )
    if status not in REFUSALS:
        return warning("Ray dashboard", f"{place} answers {status}", remedy="check that this is a Ray dashboard")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        return warning(
            "Ray dashboard", f"{place} asks for a token, but sends it in clear text", remedy="use a tunnel or https"
        )
    return ok("Ray dashboard", f"{place} asks for a token")
