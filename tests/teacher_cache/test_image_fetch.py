"""S10: images are fetched from named hosts at public addresses only, within limits."""

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.image_fetch import FetchError, ImageFetcher, is_public, public_endpoints
from tests.teacher_cache.image_server import HOST, IMAGE, MOST, Server, fetcher


def test_an_image_of_a_named_host_is_fetched(port: int, pem: Path) -> None:
    assert fetcher(port, pem).fetch(f"https://{HOST}/image.png?size=3") == IMAGE
    assert fetcher(port, pem).fetch(f"https://{HOST.upper()}:443/image.png") == IMAGE
    assert Server.asked == ["/image.png?size=3", "/image.png"]
    assert Server.hosts == [HOST, HOST]


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/image.png",
        f"ftp://{HOST}/image.png",
        "file:///etc/hostname",
        "data:image/png;base64,iVBORw0KGgo=",
        "https://127.0.0.1/image.png",
        "https://[::1]/image.png",
        "https://169.254.169.254/latest/meta-data/",
        "https://other.example.org/image.png",
        f"https://sub.{HOST}/image.png",
        f"https://{HOST}.evil.org/image.png",
        f"https://{HOST}@evil.org/image.png",
        f"https://user:pass@{HOST}/image.png",
        f"https://{HOST}:8443/image.png",
        f"https://{HOST}:99999/image.png",
        f"https://{HOST}\\@evil.org/image.png",
        f"https://{HOST}/a\r\nHost: evil.org",
        f"https://{HOST}/a b",
        f"https://{HOST}。evil.org/",
        "https:///image.png",
        "https://[::1/image.png",
    ],
)
def test_other_urls_are_refused_before_anything_is_looked_up(url: str) -> None:
    def resolve(host: str) -> list[tuple[str, int]]:
        raise AssertionError(host)

    limits: dict[str, Any] = {"hosts": frozenset({HOST}), "max_bytes": MOST, "timeout_s": 5.0, "attempts": 3}
    with pytest.raises(FetchError):
        ImageFetcher(**limits, resolve=resolve).fetch(url)


@pytest.mark.parametrize(
    ("path", "message", "requests"),
    [
        ("/moved", "status 302", 1),
        ("/moved-away", "status 301", 1),
        ("/gone", "status 404", 1),
        ("/page", "'text/html', expected an image", 1),
        ("/colours", r"'\\x1b\[31mtext/html', expected an image", 1),
        ("/packed", "expected an image", 1),
        ("/huge", "allowed are 4096", 1),
        ("/endless", "more than the 4096 bytes", 1),
        ("/cut", "SSLEOFError", 3),
        ("/cut-without-length", "SSLEOFError", 3),
    ],
)
def test_answers_that_are_no_image_within_the_limits_are_refused(
    path: str, message: str, requests: int, port: int, pem: Path
) -> None:
    with pytest.raises(FetchError, match=message):
        fetcher(port, pem).fetch(f"https://{HOST}{path}")
    assert Server.asked == [path] * requests


def test_attempts_are_bounded(port: int, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "busy_for", 2)
    assert fetcher(port, pem).fetch(f"https://{HOST}/busy") == IMAGE
    Server.asked.clear()
    with pytest.raises(FetchError, match="status 503"):
        fetcher(port, pem, attempts=2).fetch(f"https://{HOST}/busy")
    assert len(Server.asked) == 2


def test_a_server_that_drips_is_cut_off(port: int, pem: Path) -> None:
    with pytest.raises(FetchError):
        fetcher(port, pem, timeout_s=0.3, attempts=1).fetch(f"https://{HOST}/drip")
    with pytest.raises(FetchError, match="TimeoutError"):
        fetcher(port, pem, timeout_s=0.0, attempts=1).fetch(f"https://{HOST}/image.png")


def test_the_time_of_connecting_counts(port: int, pem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    connect, timer = socket.create_connection, threading.Timer

    def connect_late(*arguments: Any, **options: Any) -> socket.socket:
        time.sleep(0.2)
        return connect(*arguments, **options)

    def take_note(seconds: float, *arguments: Any) -> threading.Timer:
        left.append(seconds)
        return timer(seconds, *arguments)

    monkeypatch.setattr(socket, "create_connection", connect_late)
    monkeypatch.setattr(threading, "Timer", take_note)
    fetcher(port, pem, timeout_s=30.0).fetch(f"https://{HOST}/image.png")
    assert len(left) == 1
    assert left[0] <= 29.8


def test_a_certificate_of_another_name_is_refused(port: int, pem: Path) -> None:
    other = fetcher(port, pem, hosts=frozenset({"other.example.org"}))
    with pytest.raises(FetchError, match="certificate is not valid"):
        other.fetch("https://other.example.org/image.png")
    assert Server.asked == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "2002:7f00:1::", "64:ff9b::7f00:1", "::7f00:1", "fec0::1"),
        "2001:0:4136:e378::1",
    ],
)
def test_names_that_lead_inside_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_public(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        entries = [(socket.AF_INET, "8.8.8.8"), (family, address)]
        return [(kind, socket.SOCK_STREAM, 6, "", (found, port)) for kind, found in entries]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(FetchError, match="not public"):
        public_endpoints(HOST)


def test_public_addresses_are_connected_to_as_they_were_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "1.1.1.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    assert public_endpoints(HOST) == [("8.8.8.8", 443), ("1.1.1.1", 443)]
    assert is_public("2606:4700:4700::1111")
