"""An S3 server on the loopback, and a proxy before it that injects faults and counts requests."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest

from tests.ports import free_port

Fault = Literal["503", "500", "429", "409", "reset", "truncate", "lost-answer", "stall"]
BUCKET = "bucket"
STALL_S = 3.0


@dataclass
class S3:
    """A running server; ``fault`` decides about each request by method and path."""

    port: int
    uri: str = f"s3://{BUCKET}/caches/one"
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def count(self, method: str) -> int:
        """Return how many requests there were."""
        return sum(found == method for found, _ in self.requests)

    @property
    def lists(self) -> int:
        """Return how many of them were listings."""
        return sum("list-type" in path for _, path in self.requests)


class _Proxy(ThreadingHTTPServer):
    request_queue_size = 128
    """With the default of 5, a busy machine drops connections, which then wait for their turn for seconds."""


@contextlib.contextmanager
def start_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Start the server and point the environment at it."""
    behind = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(behind)]
    moto = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    s3 = S3(port=0)
    proxy = _Proxy(("127.0.0.1", 0), _handler(s3, behind))
    s3.port = proxy.server_port
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    try:
        thread.start()
        _create_bucket(behind)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "AKIDCANARY",
            "AWS_SECRET_ACCESS_KEY": "canary-secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        yield s3
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.terminate()
        moto.wait(120)


def _handler(s3: S3, behind: int) -> type[BaseHTTPRequestHandler]:
    one_put = threading.Lock()  # moto looks whether a name is free, then writes: of two conditional puts both may win

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            s3.requests.append((self.command, self.path))
            fault = s3.fault(self.command, self.path)
            if fault in ("503", "500", "429", "409"):
                self._answer(int(fault), {}, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
                return
            if fault == "reset":
                self._hang_up()
                return
            if fault == "stall":
                time.sleep(STALL_S)
            with one_put if self.command == "PUT" else contextlib.nullcontext():
                status, headers, answer = self._forward(body)
            if fault == "lost-answer":
                self._hang_up()
            elif fault == "truncate" and len(answer) > 1 and self.command == "GET":
                self._answer(status, headers, answer, cut=len(answer) // 2)
                self._hang_up()
            else:
                self._answer(status, headers, answer)

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", behind, timeout=30)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: int | None = None) -> None:
            self.send_response_only(status)
            dropped = ("connection", "transfer-encoding", "date", "server")
            kept = {name: value for name, value in headers.items() if name.lower() not in dropped}
            kept.setdefault("Content-Length", str(len(body)))
            for name, value in kept.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])

        def _hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError, BrokenPipeError):
                super().handle_one_request()

        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
        setattr(Handler, f"do_{method}", Handler._serve)
    return Handler


def _create_bucket(port: int) -> None:
    for _ in range(1200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("PUT", f"/{BUCKET}", headers={"Host": "127.0.0.1"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise RuntimeError("the S3 server does not start")
