"""Whether a Ray cluster is private: others cannot read its token, and it refuses whoever has none. Imports no Ray.

Whoever reaches a cluster that asks for no token runs commands as its user.
"""

import http.client
import os
import stat
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teacher_cache.errors import ConfigError, GenrecalError

ANSWER_TIMEOUT_S: Final = 10.0
REFUSALS: Final = (401, 403)
"""What a dashboard answers who has no token."""
_PROBE: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A question to Ray's control store that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Why others may run commands on a cluster."""

    found: str
    remedy: str


def token_exposure(environment: Mapping[str, str]) -> Exposure | None:
    """Return what is wrong with the token that this environment has for Ray, or None.

    Args:
        environment: With RAY_AUTH_MODE and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, where they are set.
    """
    mode = environment.get("RAY_AUTH_MODE")
    if mode is None or mode.lower() != "token":
        return Exposure(
            found=f"RAY_AUTH_MODE is {mode or 'not set'}: whoever reaches the cluster runs code as you",
            remedy="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on all nodes and here",
        )
    if environment.get("RAY_AUTH_TOKEN"):
        return None
    path = token_path(environment)
    try:
        mode_bits = path.stat().st_mode
    except OSError as error:
        return Exposure(
            found=f"no token in {path}: {error.strerror}", remedy="copy the cluster's token file there, mode 600"
        )
    if mode_bits & (stat.S_IRWXG | stat.S_IRWXO):
        return Exposure(
            found=f"others may use the token in {path}", remedy=f"run chmod 600 {path} (a Secret: defaultMode 0400)"
        )
    return None


def token_path(environment: Mapping[str, str]) -> Path:
    """Return where Ray looks for the token that is not in the environment itself."""
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def cluster_exposure(address: str) -> Exposure | None:
    """Return what is wrong with a cluster that answers us without a token, or None.

    Args:
        address: Its dashboard, http://HOST:PORT, or its control store, HOST:PORT.

    Raises:
        OSError: There is no dashboard.
        GenrecalError: The dashboard neither answers nor refuses, or the control store says nothing within
            ``ANSWER_TIMEOUT_S`` or cannot be reached.
    """
    is_dashboard = address.startswith(("http://", "https://"))
    if not (_lists_jobs(address) if is_dashboard else _answers_without_token(address)):
        return None
    return Exposure(
        found=f"the Ray cluster at {address} answers without a token, so whoever reaches it can run commands there",
        remedy="start it with RAY_AUTH_MODE=token",
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as it is: the page of a log-in is no answer of the dashboard."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def dashboard_status(address: str) -> int:
    """Return the status with which a dashboard answers who asks for its jobs without a token.

    Raises:
        OSError: It cannot be reached.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    try:
        with opener.open(f"{address}/api/jobs/", timeout=ANSWER_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except http.client.HTTPException as error:
        raise ConnectionError(f"{address} does not speak HTTP") from error


def require_private(exposure: Exposure | None, *, allowance: str) -> None:
    """Raise ConfigError, which names the remedy and what allows it, where others may run commands on a cluster."""
    if exposure is not None:
        raise ConfigError(f"{exposure.found}: {exposure.remedy}, or allow it with {allowance}")


def _lists_jobs(address: str) -> bool:
    status = dashboard_status(address)
    if status != 200 and status not in REFUSALS:
        raise GenrecalError(
            f"{address} answers {status} to who has no token, expected 200, 401 or 403: check that "
            "this is a Ray dashboard, and its logs"
        )
    return status == 200


def _answers_without_token(address: str) -> bool:
    import grpc

    unclear = [grpc.StatusCode.DEADLINE_EXCEEDED]
    # with TLS, Ray answers no plain question, and nobody who has no certificate of its own
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        unclear.append(grpc.StatusCode.UNAVAILABLE)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask: Any = channel.unary_unary(_PROBE)
        try:
            ask(b"", timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            code = error.code()
            if code in unclear:
                raise GenrecalError(
                    f"the Ray cluster at {address} does not say within {ANSWER_TIMEOUT_S:g} s whether it asks for a "
                    f"token ({code.name}): try again when it is less busy, from a machine that reaches this address"
                ) from error
            return code not in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNAVAILABLE,
            )
        return True
