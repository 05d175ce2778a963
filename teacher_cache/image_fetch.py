"""Fetch one image by https from a host that was named, and from no private address whatever its name resolves to."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urlsplit

HTTPS_PORT: Final = 443
PIECE_BYTES: Final = 1 << 16
BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which another attempt makes sense."""

Endpoint = tuple[str, int]
"""Address and port."""


class FetchError(Exception):
    """An image that was not fetched; another attempt may make sense where ``is_temporary``."""

    def __init__(self, reason: str, *, is_temporary: bool = False) -> None:
        super().__init__(reason)
        self.is_temporary = is_temporary


def public_endpoints(host: str) -> list[Endpoint]:
    """Return where a name leads to.

    Raises:
        FetchError: It leads nowhere, or any of its addresses is loopback, private, link-local or otherwise not public.
    """
    try:
        found = socket.getaddrinfo(host, HTTPS_PORT, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter for labels of no or too many letters
        raise FetchError(f"{host} does not resolve", is_temporary=isinstance(error, OSError)) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not all(map(is_public, addresses)):
        raise FetchError(f"{host} leads to an address that is not public")
    return [(address, HTTPS_PORT) for address in addresses]


def is_public(address: str) -> bool:
    """Tell whether an address is one of the public internet; IPv6 forms that hold an IPv4 address are none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


_UNICAST: Final = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is given out to the public; mapped, translated and site-local addresses lie outside."""


@dataclass(frozen=True, kw_only=True)
class ImageFetcher:
    """Fetches images under one set of limits. No redirect is followed, no proxy of the environment is used."""

    hosts: frozenset[str]
    """Names of hosts that may be asked, in lower case."""
    max_bytes: int
    timeout_s: float
    """For a whole attempt."""
    attempts: int
    pause_s: float = 1.0
    """Before the second attempt; doubled before each further one."""
    resolve: Callable[[str], Sequence[Endpoint]] = public_endpoints
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def fetch(self, url: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            FetchError: The URL is not allowed, or nothing usable came in all attempts.
        """
        parts = self.checked(url)
        for attempt in range(self.attempts):
            try:
                return self._once(parts)
            except FetchError as error:
                if not error.is_temporary or attempt == self.attempts - 1:
                    raise
            time.sleep(self.pause_s * 2**attempt)
        raise AssertionError

    def checked(self, url: str) -> SplitResult:
        """Return the parts of a URL that may be fetched.

        Raises:
            FetchError: It is none.
        """
        if not url.isascii() or not url.isprintable() or " " in url:
            raise FetchError("the URL holds characters that belong into none")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise FetchError("the URL is malformed") from error
        if parts.scheme != "https":
            raise FetchError("only https is allowed")
        if "@" in parts.netloc or port not in (None, HTTPS_PORT):
            raise FetchError("a user or a port is not allowed")
        if (parts.hostname or "") not in self.hosts:
            raise FetchError(f"the host {parts.hostname} is not among those that are allowed")
        return parts

    def _once(self, parts: SplitResult) -> bytes:
        host = parts.hostname or ""
        end = time.monotonic() + self.timeout_s
        try:
            with self._connection(host, end=end) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
                answer = connection.getresponse()
                self._check_answer(answer)
                return self._read(answer)
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{host}: {type(error).__name__}", is_temporary=True) from error

    def _connection(self, host: str, *, end: float) -> "_Connection":
        last: OSError | None = None
        for endpoint in self.resolve(host):
            try:
                return _Connection(host, endpoint, end=end, context=self.context)
            except ssl.SSLCertVerificationError as error:
                raise FetchError(f"{host}: its certificate is not valid") from error
            except OSError as error:
                last = error
        raise last or FetchError(f"{host} has no address")

    def _check_answer(self, answer: http.client.HTTPResponse) -> None:
        if answer.status != 200:
            raise FetchError(f"answered with status {answer.status}", is_temporary=answer.status in BUSY)
        kind = (answer.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") or answer.getheader("Content-Encoding"):
            raise FetchError(f"answered with {ascii(kind[:60]) if kind else 'no content type'}, expected an image")
        if answer.length is not None and answer.length > self.max_bytes:
            raise FetchError(f"{answer.length} bytes, allowed are {self.max_bytes}")

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        expected, data = answer.length, bytearray()
        while piece := answer.read1(PIECE_BYTES):
            data += piece
            if len(data) > self.max_bytes:
                raise FetchError(f"more than the {self.max_bytes} bytes that are allowed")
        if expected is not None and len(data) != expected:
            raise FetchError(f"{len(data)} of {expected} bytes came", is_temporary=True)
        return bytes(data)


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was looked at, under the name that its certificate must have; ends in time."""

    default_port = HTTPS_PORT
    """Left out of the Host header, which signed URLs are signed with."""

    def __init__(self, host: str, endpoint: Endpoint, *, end: float, context: ssl.SSLContext) -> None:
        super().__init__(host, HTTPS_PORT)
        plain = socket.create_connection(endpoint, timeout=_left(end))
        # a server that sends a byte now and then never runs into the timeout of a socket
        self._twin = plain.dup()
        self._cut = threading.Timer(end - time.monotonic(), _shut, [self._twin])
        self._cut.start()
        try:
            # a connection that is cut must not pass for the end of the image
            self.sock = context.wrap_socket(plain, server_hostname=host, suppress_ragged_eofs=False)
        except BaseException:
            plain.close()
            self.__exit__()
            raise

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        # http.client calls close() itself, before the answer was read
        self._cut.cancel()
        self._twin.close()
        self.close()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
