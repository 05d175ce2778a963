"""S10: an image that is given as a URL is never fetched, whatever the URL leads to."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from teacher_cache.errors import SampleError
from teacher_cache.samples import parse_row

URLS = (
    "http://127.0.0.1:{port}/image.png",
    "HTTP://127.0.0.1:{port}/image.png",
    "https://127.0.0.1:{port}/image.png",
    "http://user:pass@127.0.0.1:{port}/image.png",
    "http://localhost:{port}/redirect",
    "http://localtest.me:{port}/image.png",
    "http://[::1]:{port}/image.png",
    "http://0x7f000001:{port}/image.png",
    "http://169.254.169.254/latest/meta-data/",
    "ftp://127.0.0.1:{port}/image.png",
    "file:///etc/hostname",
    "file://127.0.0.1/etc/hostname",
    "s3://bucket/image.png",
    "gs://bucket/image.png",
    "hf://datasets/owner/name/image.png",
    "//127.0.0.1:{port}/image.png",
    "data:image/png;base64,iVBORw0KGgo=",
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[str]]]:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    resolve = socket.getaddrinfo

    def note_names(host: object, *args: object, **options: object) -> object:
        requests.append(f"name {host!r}")
        return resolve(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", note_names)
    yield listening.server_port, requests
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.mark.parametrize("form", ["text", "record"])
@pytest.mark.parametrize("url", URLS)
def test_no_url_is_fetched(url: str, form: str, server: tuple[int, list[str]], tmp_path: Path) -> None:
    port, requests = server
    given = url.format(port=port)
    messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A digit."}]
    row = {"id": "a", "messages": messages, "images": [given if form == "text" else {"bytes": None, "path": given}]}
    with pytest.raises(SampleError) as refused:
        parse_row(row, place=0, image_root=tmp_path)
    assert refused.value.reason in ("bad-row", "missing-image")
    assert requests == []
