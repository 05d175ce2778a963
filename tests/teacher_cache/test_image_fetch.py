"""S10: images are fetched from named hosts at public addresses only, within limits; what was fetched is data as any."""

import datetime
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from launch.cli import main
from teacher_cache.config import DataConfig
from teacher_cache.errors import ConfigError
from teacher_cache.fetched_data import fetch_data
from teacher_cache.image_fetch import FetchError, ImageFetcher, is_public, public_endpoints
from teacher_cache.samples import read_samples
from tests.teacher_cache.test_samples import png

HOST = "images.example.org"
IMAGE = png()
MOST = 4096
MESSAGES = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A digit."}]


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
    busy_for: int

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        handlers: dict[str, Callable[[], None]] = {
            "/moved": lambda: self.send(status=302, location=f"https://{HOST}/image.png"),
            "/moved-away": lambda: self.send(status=301, location="https://127.0.0.1/secret.png"),
            "/gone": lambda: self.send(status=404),
            "/busy": lambda: self.send(status=503 if len(type(self).asked) <= type(self).busy_for else 200),
            "/page": lambda: self.send(kind="text/html"),
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


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def port(pem: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(Server, "asked", [], raising=False)
    monkeypatch.setattr(Server, "busy_for", 0, raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with Quiet(("127.0.0.1", 0), Server) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


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


def test_an_image_of_a_named_host_is_fetched(port: int, pem: Path) -> None:
    assert fetcher(port, pem).fetch(f"https://{HOST}/image.png?size=3") == IMAGE
    assert fetcher(port, pem).fetch(f"https://{HOST.upper()}:443/image.png") == IMAGE
    assert Server.asked == ["/image.png?size=3", "/image.png"]


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
        ("/page", "text/html, expected an image", 1),
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
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "2002:7f00:1::", "64:ff9b::7f00:1"),
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


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_fetched_data_is_as_if_the_files_had_been_there(suffix: str, port: int, pem: Path, tmp_path: Path) -> None:
    (tmp_path / "local.png").write_bytes(IMAGE)
    urls = [f"https://{HOST}/{number}.png" for number in range(70)]
    paths = [*urls, "local.png", f"https://{HOST}/gone"]
    given = [path if suffix == ".jsonl" else {"bytes": None, "path": path} for path in paths]
    rows = [{"id": f"s{number}", "messages": MESSAGES, "images": [image]} for number, image in enumerate(given)]
    rows.append({"id": "text", "messages": [{"role": "user", "content": "Hi?"}, MESSAGES[1]], "images": None})
    source, target = tmp_path / f"original{suffix}", tmp_path / f"train{suffix}"
    if suffix == ".jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    summary = fetch_data(source, target, fetcher=fetcher(port, pem))
    assert (summary.fetched, summary.present, list(summary.refused)) == (70, 0, [f"https://{HOST}/gone"])
    assert summary.rows == (74 if suffix == ".jsonl" else 73)
    found = read_samples(DataConfig(path=str(target), max_skipped_samples=2))
    assert [sample.sample_id for sample in found.samples] == [*(f"s{number}" for number in range(71)), "text"]
    assert len({sample.digest for sample in found.samples[:71]}) == 1
    assert found.samples[0].images == (IMAGE,)
    assert found.skipped[0].sample_id == "s71"

    Server.asked.clear()
    again = fetch_data(source, target, fetcher=fetcher(port, pem))
    assert (again.fetched, again.present) == (0, 70)
    assert Server.asked == ["/gone"]


def test_the_command_names_what_it_did_not_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    url = "https://other.example.org/image.png?token=canary-123456"
    source.write_text(json.dumps({"id": "a", "messages": MESSAGES, "images": [url]}) + "\n")
    command = ["data", "fetch", str(source), str(target)]
    assert main([*command, "--host", HOST]) == 3
    printed = capsys.readouterr().out
    assert "the host other.example.org is not among those that are allowed" in printed
    assert "canary" not in printed
    assert json.loads(target.read_text())["images"] == [url]
    assert main(command) == 2
    assert main([*command, "--host", HOST, "--attempts", "0"]) == 2
    with pytest.raises(ConfigError, match="must lie beside"):
        fetch_data(
            source,
            tmp_path / "c" / "b.jsonl",
            fetcher=ImageFetcher(hosts=frozenset(), max_bytes=1, timeout_s=1, attempts=1),
        )
