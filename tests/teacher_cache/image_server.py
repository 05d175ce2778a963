"""An image server on the loopback with a certificate of its own, and a fetcher that finds every host there."""

import datetime
import ssl
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from teacher_cache.image_fetch import ImageFetcher
from tests.teacher_cache.test_samples import png

HOST = "images.example.org"
IMAGE = png()
MOST = 4096


def certificate(folder: Path) -> Path:
    """Write a certificate of HOST and its key into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


class Server(BaseHTTPRequestHandler):
    """Answers by the path; takes note of what is asked."""

    asked: list[str]
    hosts: list[str]
    busy_for: int

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        type(self).hosts.append(self.headers["Host"])
        handlers: dict[str, Callable[[], None]] = {
            "/moved": lambda: self.send(status=302, location=f"https://{HOST}/image.png"),
            "/moved-away": lambda: self.send(status=301, location="https://127.0.0.1/secret.png"),
            "/gone": lambda: self.send(status=404),
            "/busy": lambda: self.send(status=503 if len(type(self).asked) <= type(self).busy_for else 200),
            "/page": lambda: self.send(kind="text/html"),
            "/colours": lambda: self.send(kind="\x1b[31mtext/html"),
            "/no-image": lambda: self.send(body=b""),
            "/packed": lambda: self.send(content_encoding="gzip"),
            "/huge": lambda: self.send(content_length=str(MOST + 1)),
            "/endless": lambda: self.send(body=b"x" * 3 * MOST, content_length=None),
            "/cut": lambda: self.send(content_length=str(len(IMAGE) + 1)),
            "/cut-without-length": lambda: self.send(content_length=None),
            "/drip": self.drip,
        }
        handlers.get(self.path.partition("?")[0], self.send)()

    def send(self, *, status: int = 200, kind: str = "image/png", body: bytes = IMAGE, **headers: str | None) -> None:
        self.send_response(status)
        headers = {"content_type": kind, "content_length": str(len(body))} | headers
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        self.send(body=b"", content_length="40")
        for _ in range(40):
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, *arguments: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on purpose."""


def fetcher(port: int, pem: Path, **changes: Any) -> ImageFetcher:
    """Return one that finds every host at a port of the loopback."""
    settings: dict[str, Any] = {
        "hosts": frozenset({HOST}),
        "max_bytes": MOST,
        "timeout_s": 5.0,
        "attempts": 3,
        "pause_s": 0.0,
        "resolve": lambda host: [("127.0.0.1", port)],
        "context": ssl.create_default_context(cafile=pem),
    }
    return ImageFetcher(**(settings | changes))
